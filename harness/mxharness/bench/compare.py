"""A bench record against an older one: what became slower than the spread of both explains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mxharness.bench.result import Bench, Row
from mxharness.errors import UserError
from mxharness.wording import counted

Status = Literal["same", "slower", "faster", "unsound", "new", "vanished"]
RUN_TO_RUN = 0.04
"""Two runs of the same kernels on one H100 differ by less in 95 of 100 rows, whatever each run's own spread."""
WHAT = ("unit", "driver")
"""What must be the same in both unless the caller says otherwise."""


@dataclass(frozen=True)
class Moved:
    """A row in both records, or in one of them."""

    key: str
    status: Status
    message: str


@dataclass(frozen=True)
class Comparison:
    """All rows."""

    before: str
    """What the older record is called."""
    rows: tuple[Moved, ...]
    differs: tuple[tuple[str, str, str], ...] = ()
    """What differs between the machines, as the caller allowed: name, before, now."""

    @property
    def passed(self) -> bool:
        """Nothing is slower, unsound or gone."""
        return not self.failing

    @property
    def failing(self) -> tuple[Moved, ...]:
        """The rows that are."""
        return tuple(row for row in self.rows if row.status in ("slower", "unsound", "vanished"))

    @property
    def first_line(self) -> str:
        """PASS or FAIL, and how many."""
        count = {status: sum(row.status == status for row in self.rows) for status in ("same", "faster", "new")}
        kinds = {status: [row.key for row in self.failing if row.status == status] for status in _FAILS}
        bad = [f"{len(keys)} {status}: {', '.join(keys)}" for status, keys in kinds.items() if keys]
        good = (
            f"{counted(len(self.rows), 'row')} against {self.before}, {count['same']} as fast, {count['faster']} faster"
        )
        good += f", {count['new']} new" if count["new"] else ""
        return f"{'FAIL' if bad else 'PASS'}: {'; '.join((*bad, good))}"


_FAILS: tuple[Status, ...] = ("slower", "unsound", "vanished")


def compare(before: Bench, after: Bench, name: str, despite: Iterable[str] = ()) -> Comparison:
    """Every row of both. Rows that `after` was not asked for are left out.

    despite: of WHAT, what may differ. Raises UserError where something else does.
    """
    pairs = [(what, str(getattr(before, what)), str(getattr(after, what))) for what in WHAT]
    differs = [(what, old, new) for what, old, new in pairs if old != new]
    refused = [(what, old, new) for what, old, new in differs if what not in despite]
    if refused:
        said = " and ".join(f"the {what} was {old} and is {new}" for what, old, new in refused)
        options = " ".join(f"--despite {what}" for what, _, _ in refused)
        raise UserError(f"times of {name} cannot be compared: {said}; {options} compares all the same")
    rows = [
        _moved(key, before.rows.get(key), after.rows.get(key), after)
        for key in sorted({*before.rows, *after.rows})
        if key in after.rows or not after.filters
    ]
    return Comparison(name, tuple(rows), tuple(differs))


def allowed(before: Row, after: Row) -> float:
    """How many times slower the later row may be: both spreads together, and at least what runs differ by."""
    return 1 + max(RUN_TO_RUN, before.timing.spread + after.timing.spread)


def _moved(key: str, before: Row | None, after: Row | None, bench: Bench) -> Moved:
    if after is None:
        return Moved(key, "vanished", "was measured before")
    if not after.sound:
        what = "does not repeat its bits" if not after.repeatable else "depends on the batch"
        return Moved(key, "unsound", what)
    if before is None:
        return Moved(key, "new", f"{after.timing.us:.4g} us")
    ratio, limit = after.timing.us / before.timing.us, allowed(before, after)
    said = f"{before.timing.us:.4g} -> {after.timing.us:.4g} us, {ratio:.3f}x; the spread explains {limit:.3f}x"
    old, new = before.peers.get(after.reference), after.peers.get(after.reference)
    if old and new:
        said += f"; {after.reference} {new.timing.us / old.timing.us:.3f}x"
    status: Status = "slower" if ratio > limit else "faster" if 1 / ratio > limit else "same"
    return Moved(key, status, said)
