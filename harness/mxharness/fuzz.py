"""Random cases: how many of each operator, in which parts, from which seed, and how near they came to their bounds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mxharness.op import Op, Outcome
from mxharness.repeat import of_random

if TYPE_CHECKING:
    import pytest

WHOLE = 100
"""So many examples or fewer of an operator are one test; more are PARTS of them, which workers share."""
PARTS = 8
BITWISE = ("exact", "exact-arithmetic", "predicted")
BOUNDED = ("bound", "composed")


@dataclass(frozen=True)
class Part:
    """One test's share of the random cases of an operator."""

    index: int
    count: int
    examples: int
    seed: int
    """Of the run."""

    def __str__(self) -> str:
        return f"@{self.index}of{self.count}@"

    def stream(self, op: Op) -> int:
        """The seed of this operator's and this part's random numbers."""
        return int.from_bytes(hashlib.sha256(f"{self.seed} {op.name} {self}".encode()).digest()[:8], "big")


@dataclass(frozen=True)
class FuzzRow:
    """What the random cases of one operator showed."""

    op: str
    planned: int = 0
    examples: int = 0
    """Random cases judged and found right."""
    checks: int = 0
    """Verdicts under one gate each."""
    bitwise: int = 0
    """Those of them that compared bits."""
    rejected: int = 0
    """Random cases whose bound was too wide to prove anything."""
    largest: float = 0.0
    """Largest error / bound of all of them."""
    seed: int = 0
    command: str = ""
    """What to type to draw the same cases again; none in records of before 0.6."""

    @property
    def bounded(self) -> int:
        """Verdicts under a bound."""
        return self.checks - self.bitwise

    @property
    def margin(self) -> float:
        """How far the worst element of all stayed below its bound, as a share of the bound."""
        return 1 - self.largest


class Tally:
    """Counts one test's random cases; what it holds travels with the test's report."""

    def __init__(self, node: pytest.Item, device: str) -> None:
        """device: "host" or "cuda"."""
        op, part = node.callspec.params["op"], node.callspec.params["part"]  # type: ignore[attr-defined]  # a Function
        command = of_random(device, node.nodeid, op.name, node.config.option.fuzz, part.seed)
        self._row: dict[str, Any] = asdict(FuzzRow(op.name, planned=part.examples, seed=part.seed, command=command))
        node.user_properties.append(("fuzz", self._row))

    @property
    def planned(self) -> int:
        """Random cases asked for."""
        return int(self._row["planned"])

    def add(self, outcomes: Sequence[Outcome], *, refused: bool) -> None:
        """Count a case that no gate found wrong."""
        row = self._row
        if refused:
            row["rejected"] += 1
            return
        row["examples"] += 1
        row["checks"] += len(outcomes)
        row["bitwise"] += sum(one.gate in BITWISE for one in outcomes)
        row["largest"] = max([row["largest"], *(one.ratio for one in outcomes if one.gate in BOUNDED)])


def parts(examples: int, seed: int) -> list[Part]:
    """The tests of one operator; their examples add up to `examples`."""
    count = PARTS if examples > WHOLE else 1
    return [Part(i + 1, count, examples // count + (i < examples % count), seed) for i in range(count)]


def merged(rows: Iterable[Mapping[str, Any]]) -> tuple[FuzzRow, ...]:
    """One row an operator, sorted, from those of its parts."""
    found: dict[str, FuzzRow] = {}
    for values in rows:
        row = FuzzRow(**values)
        before = found.get(row.op, FuzzRow(row.op, seed=row.seed))
        found[row.op] = FuzzRow(
            op=row.op,
            **{
                name: getattr(before, name) + getattr(row, name)
                for name in ("planned", "examples", "checks", "bitwise", "rejected")
            },
            largest=max(before.largest, row.largest),
            seed=row.seed,
            command=before.command or row.command,
        )
    return tuple(found[op] for op in sorted(found))


def reasons(rows: Iterable[FuzzRow]) -> list[str]:
    """Why random cases prove too little; empty when they do not."""
    found = []
    if idle := [row.op for row in rows if row.examples == 0]:
        found.append(f"no random case was judged of {', '.join(idle)}")
    for row in rows:
        if row.examples and row.rejected > row.examples:
            found.append(
                f"most random cases of {row.op} prove nothing: "
                f"{row.rejected:,} of {row.rejected + row.examples:,} rejected"
            )
    return found


def sentence(rows: Sequence[FuzzRow]) -> str:
    """How many random cases held, and by how much."""
    judged = f"{sum(row.examples for row in rows):,} random cases right"
    bounded = [row for row in rows if row.bounded]
    if not bounded:
        return judged
    closest = min(bounded, key=lambda row: row.margin)
    return f"{judged}, smallest margin {closest.margin:.2g} of the bound ({closest.op})"
