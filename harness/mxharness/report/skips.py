"""The section "What did not run" of a report: skips by their reason, and what narrowed the run."""

from __future__ import annotations

from dataclasses import dataclass

from mxharness.record import RunRecord
from mxharness.wording import counted


@dataclass(frozen=True)
class Group:
    """What was skipped for one reason."""

    why: str
    asked: bool
    """The caller left it out on purpose."""
    count: int
    """Tests."""
    what: tuple[str, ...]


def groups(record: RunRecord) -> list[Group]:
    """One entry a reason, in the order of the record; tests whose suite gave none come last."""
    found: dict[tuple[str, bool], Group] = {}
    for skip in record.skipped:
        key = skip.why, skip.asked
        before = found.get(key, Group(*key, 0, ()))
        found[key] = Group(*key, before.count + skip.count, (*before.what, skip.what))
    if record.tests.skipped:
        found["", False] = Group("skipped by their suite", False, record.tests.skipped, ("other tests",))
    return list(found.values())


def narrowed(record: RunRecord) -> list[str]:
    """What the run was never asked to do, in a sentence."""
    if not record.filters:
        return []
    asked = f"The run was limited by {' '.join(record.filters)}"
    left = unselected(record)
    if record.coverage is None or not left:
        return [f"{asked}."]
    return [f"{asked}: {counted(left, 'test')} of {record.coverage.demanded:,} were not selected."]


def unselected(record: RunRecord) -> int:
    """Tests of the manifest that filters left out."""
    if record.coverage is None or not record.filters:
        return 0
    return max(0, record.coverage.demanded - len(record.coverage.selected))
