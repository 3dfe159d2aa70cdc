"""What moved from a baseline, as a table of the page; and the page of two baselines."""

from __future__ import annotations

from collections.abc import Mapping

from mxharness.changes import PASSING
from mxharness.drift import Comparison
from mxharness.report import head, trend
from mxharness.report.table import Column, Table
from mxharness.wording import counted

_PAGE_OF_CHANGES = 20
_NAMED = 8
"""Of what fails or vanished, at the head of the page."""
_KERNELS = "kernels/"


def table(comparison: Comparison | None) -> Table | None:
    """What is not as in the baseline, the gravest first; None where nothing is."""
    moved = head.moved(comparison)
    if comparison is None or not moved:
        return None
    return Table(
        noun="entries that moved",
        page=_PAGE_OF_CHANGES,
        badly="that fail the comparison",
        columns=(
            Column("status", "text", [change.status for change in moved], chosen=True),
            Column("check", "name", [change.key for change in moved]),
            Column("what moved", "message", [change.message for change in moved]),
            Column("error / bound before", "number", [_ratio(change.before) for change in moved]),
            Column("now", "number", [_ratio(change.after) for change in moved]),
            Column("operator", "text", [change.op for change in moved], chosen=True),
        ),
        anchors=[f"moved:{change.key.replace(' ', ':')}" for change in moved],
        bad=[change.status not in PASSING for change in moved],
        details={},
        repeat=comparison.command,
        repeated=(5, 1, 0),
    )


def grave(comparison: Comparison | None) -> int:
    """How many of them fail the comparison."""
    return sum(change.status not in PASSING for change in head.moved(comparison))


def render(comparison: Comparison, history: trend.History | None) -> str:
    """The page of two baselines as HTML text. history: the versions up to the later one."""
    from mxharness.report.page import template

    return template("diff.html.j2").render(
        comparison=comparison,
        notes=_notes(comparison),
        moved=table(comparison),
        grave=grave(comparison),
        history=history,
    )


def _notes(comparison: Comparison) -> list[str]:
    """Which kernels are not the same, and in how many checks that shows."""
    files = [what.removeprefix(_KERNELS) for what, _, _ in comparison.environment if what.startswith(_KERNELS)]
    if not (comparison.cross or comparison.baseline.startswith("host/")):
        files = [name for name in files if not name.startswith("host/")]  # which only the host device compiles
    checks = [change for change in comparison.changes if change.before and change.after and "digest" in change.before]
    other = sum(_digest(change.before) != _digest(change.after) for change in checks)
    changed = (
        f"{counted(len(files), 'kernel file')} changed: {', '.join(files)}" if files else "the kernels are the same"
    )
    worst = [
        f"{status}: {change.key}"
        for status in ("failed", "vanished")
        for change in comparison.changes
        if change.status == status
    ]
    left = len(worst) - _NAMED
    return [
        changed,
        f"{counted(len(checks), 'check')} in both, {other:,} of them with other bits",
        *(worst if left <= 0 else (*worst[:_NAMED], f"and {left:,} more like these, in the table below")),
    ]


def _digest(entry: Mapping[str, object] | None) -> object:
    return entry["digest"] if entry else None


def _ratio(entry: Mapping[str, object] | None) -> object:
    return entry.get("ratio", "") if entry else ""
