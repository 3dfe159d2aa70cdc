"""Two runs side by side: what changed from the first to the second, the largest change first."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from mxharness.fuzz import BOUNDED
from mxharness.op import Outcome
from mxharness.record import RunRecord, is_right, verdict
from mxharness.report import checks, operators
from mxharness.report.page import template
from mxharness.report.table import Column, Detail, Table
from mxharness.wording import counted

Status = Literal[
    "broken", "fixed", "still wrong", "vanished", "new", "other inputs", "other bits", "judged otherwise", "same"
]

_ORDER: tuple[Status, ...] = (
    "broken", "still wrong", "vanished", "new", "fixed", "other inputs", "other bits", "judged otherwise", "same"
)  # fmt: skip
_BAD: frozenset[Status] = frozenset({"broken", "still wrong", "vanished"})
_FLOOR = 1e-6
"""Ratios below count as this much, so that a check that was exact has a logarithm."""
_JITTER = 1e-2


@dataclass(frozen=True)
class Change:
    """One check in both runs."""

    op: str
    case: str
    gate: str
    status: Status
    before: float | None
    """Largest error / bound in the first run; None where it has no such check."""
    after: float | None
    digests: tuple[str, str]
    message: str
    """What the second run says is wrong; where it has nothing to say, the first."""

    @property
    def moved(self) -> float:
        """How far the ratio moved, as |log(after / before)|; 0 where one side has none."""
        if self.before is None or self.after is None:
            return 0.0
        if not (math.isfinite(self.before) and math.isfinite(self.after)):
            return 0.0 if str(self.before) == str(self.after) else math.inf
        return abs(math.log(max(self.after, _FLOOR) / max(self.before, _FLOOR)))


@dataclass(frozen=True)
class Row:
    """One operator in both runs."""

    op: str
    counts: tuple[tuple[int, int], tuple[int, int]]
    """Right and executed, in the first and in the second run."""
    statuses: tuple[tuple[Status, int], ...]
    """What there is besides "same", the gravest first."""
    ratios: tuple[float | None, float | None]
    """The largest error / bound."""


@dataclass(frozen=True)
class Pair:
    """What a page of two runs shows."""

    names: tuple[str, str]
    verdicts: tuple[str, str]
    headline: str
    worse: bool
    """Whether anything is wrong or gone in the second run."""
    notes: tuple[str, ...]
    changes: tuple[Change, ...]
    """All of them, the gravest first, then by how far the ratio moved."""
    rows: tuple[Row, ...]
    perplexity: tuple[tuple[str, object, object], ...]
    environment: tuple[tuple[str, str, str], ...]
    """What differs."""
    counts: tuple[tuple[Status, int], ...] = field(default=())


def compare(first: RunRecord, second: RunRecord, names: tuple[str, str]) -> Pair:
    """Set two runs side by side; a check that ran twice in one run counts with its first verdict."""
    sides = [_by_check(record) for record in (first, second)]
    keys = list(dict.fromkeys((*sides[0], *sides[1])))
    changes = sorted(
        (_change(sides[0].get(key), sides[1].get(key)) for key in keys),
        key=lambda change: (_ORDER.index(change.status), -change.moved, change.case, change.gate),
    )
    found = Counter(change.status for change in changes)
    counts = tuple((status, found[status]) for status in _ORDER if found[status])
    words = ", ".join(f"{number:,} {status}" for status, number in counts) or "no check in either"
    ops = list(dict.fromkeys((*first.sources, *second.sources, *(change.op for change in changes))))
    facts = dict.fromkeys((*first.environment, *second.environment))
    both = [(name, str(first.environment.get(name, "-")), str(second.environment.get(name, "-"))) for name in facts]
    return Pair(
        names=names,
        verdicts=(verdict(first).first_line, verdict(second).first_line),
        headline=f"from {names[0]} to {names[1]}: {words}",
        worse=any(status in _BAD for status, _ in counts),
        notes=tuple(_notes(first, second, names)),
        changes=tuple(changes),
        rows=tuple(row for op in ops if (row := _row(op, changes, first, second))),
        perplexity=_perplexity(first, second),
        environment=tuple(one for one in both if one[1] != one[2]),
        counts=counts,
    )


def render(pair: Pair) -> str:
    """The page as HTML text."""
    return template("pair.html.j2").render(
        pair=pair, table=_table(pair), wrong=sum(one.status in _BAD for one in pair.changes)
    )


def _by_check(record: RunRecord) -> dict[tuple[str, str], Outcome]:
    found: dict[tuple[str, str], Outcome] = {}
    for outcome in record.outcomes:
        found.setdefault((outcome.case, outcome.gate), outcome)
    return found


def _change(before: Outcome | None, after: Outcome | None) -> Change:
    one = after or before
    if one is None:
        raise ValueError("a check that neither run has")
    said = [side.message for side in (after, before) if side and side.message]
    return Change(
        op=one.op,
        case=one.case,
        gate=one.gate,
        status=_status(before, after),
        before=before.ratio if before else None,
        after=after.ratio if after else None,
        digests=(before.digest if before else "-", after.digest if after else "-"),
        message=said[0] if said else "",
    )


def _status(before: Outcome | None, after: Outcome | None) -> Status:
    if after is None:
        return "vanished"
    if not is_right(after):
        return "still wrong" if before and not is_right(before) else "broken"
    if before is None:
        return "new"
    return _moved(before, after) if is_right(before) else "fixed"


def _moved(before: Outcome, after: Outcome) -> Status:
    """Of a check that is right in both runs."""
    if (before.inputs, before.elements) != (after.inputs, after.elements):
        return "other inputs"
    near = abs(after.ratio - before.ratio) <= _FLOOR + _JITTER * abs(before.ratio)
    if before.digest != after.digest:
        return "other bits"
    return "same" if near else "judged otherwise"


def _row(op: str, changes: list[Change], first: RunRecord, second: RunRecord) -> Row | None:
    sides = [[one for one in record.outcomes if one.op == op] for record in (first, second)]
    if not any(sides):
        return None
    found = Counter(change.status for change in changes if change.op == op)
    before, after = ((sum(map(is_right, side)), len(side)) for side in sides)
    bounded = [[one.ratio for one in side if one.gate in BOUNDED] for side in sides]
    return Row(
        op=op,
        counts=(before, after),
        statuses=tuple((status, found[status]) for status in _ORDER[:-1] if found[status]),
        ratios=(operators.largest(bounded[0]), operators.largest(bounded[1])),
    )


def _notes(first: RunRecord, second: RunRecord, names: tuple[str, str]) -> list[str]:
    found = []
    if first.device_class != second.device_class:
        found.append(f"two device classes: {first.device_class} in {names[0]}, {second.device_class} in {names[1]}")
    if first.arithmetic != second.arithmetic:
        found.append(f"two arithmetics: {first.arithmetic} and {second.arithmetic}, so the bits differ")
    if first.filters == second.filters != ():
        found.append(f"both were limited by {' '.join(first.filters)}")
    else:
        found += [
            f"{name} was limited by {' '.join(record.filters)}: what it left out shows as vanished or new"
            for record, name in zip((first, second), names, strict=True)
            if record.filters
        ]
    kernels = sorted(
        name.removeprefix("kernels/")
        for name in {*first.environment, *second.environment}
        if name.startswith("kernels/") and first.environment.get(name) != second.environment.get(name)
    )
    found.append(
        f"{counted(len(kernels), 'kernel file')} changed: {', '.join(kernels)}" if kernels else "the same kernels"
    )
    return found


def _perplexity(first: RunRecord, second: RunRecord) -> tuple[tuple[str, object, object], ...]:
    def named(record: RunRecord) -> dict[str, object]:
        return {
            f"{row.get('name')}, {row.get('text')}, {row.get('protocol')}": row.get("perplexity")
            for row in record.perplexity
        }

    sides = named(first), named(second)
    return tuple(
        (name, sides[0].get(name, "-"), sides[1].get(name, "-")) for name in dict.fromkeys((*sides[0], *sides[1]))
    )


def _table(pair: Pair) -> Table:
    changes = pair.changes
    factors = [after / before if (before := one.before) and (after := one.after) is not None else "" for one in changes]
    return Table(
        noun="checks",
        badly="broken, wrong or gone",
        columns=(
            Column("change", "text", [one.status for one in changes], chosen=True),
            Column("case", "name", [one.case for one in changes]),
            Column("gate", "text", [one.gate for one in changes], chosen=True),
            Column(f"error / bound in {pair.names[0]}", "number", [_cell(one.before) for one in changes]),
            Column(f"in {pair.names[1]}", "number", [_cell(one.after) for one in changes]),
            Column("factor", "number", factors),
            Column("operator", "text", [one.op for one in changes], chosen=True),
            Column(f"digest in {pair.names[0]}", "bits", [one.digests[0] for one in changes]),
            Column(f"in {pair.names[1]}", "bits", [one.digests[1] for one in changes]),
        ),
        anchors=[checks.anchor(one.case, one.gate) for one in changes],
        bad=[one.status in _BAD for one in changes],
        details={place: Detail(tuple(checks.clauses(one.message))) for place, one in enumerate(changes) if one.message},
    )


def _cell(ratio: float | None) -> object:
    return "" if ratio is None else ratio
