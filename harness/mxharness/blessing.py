"""What a baseline would become: shown before it is written, by `mxharness baseline create` and `--update-baseline`."""

from __future__ import annotations

from dataclasses import dataclass

from mxharness import baseline, changes, drift, history
from mxharness.baseline import Damaged, Root
from mxharness.changes import Change
from mxharness.record import RunRecord


@dataclass(frozen=True)
class Blessing:
    """What blessing a run says yes to."""

    against: str | None
    """The baseline it is held against: the one in its place, else the newest of its class; None where there is none."""
    changes: tuple[Change, ...]
    """Everything that either holds, with what is the same."""
    grown: tuple[tuple[str, str], ...]
    """(what, how): growth past its budget, which is blessed for a reason only."""
    damaged: tuple[Damaged, ...]
    """Baselines of the class that cannot be read: one that is damaged must not keep its own successor."""


def weigh(name: str, found: RunRecord, root: Root = None) -> Blessing:
    """What making `found` the baseline `name` of its device class would change. root: as in baseline.load."""
    surveyed = baseline.survey(found.device_class, root)
    there = history.in_order(surveyed.versions)
    if not there:
        return Blessing(None, (), (), surveyed.damaged)
    before = next((one for one in there if one.name == name), there[-1])
    after = baseline.of(found)
    grown = drift.overgrown(after, [one for one in there if one.name != name])
    return Blessing(
        against=f"{before.device_class}/{before.name}",
        changes=changes.between(before, after),
        grown=tuple((series.key, growth.sentence(series.quantity)) for series, growth in grown),
        damaged=surveyed.damaged,
    )
