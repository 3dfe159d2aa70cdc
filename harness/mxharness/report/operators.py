"""What a run says about each operator: its coverage under each gate, and error / bound over its shapes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from mxharness import manifest, plot
from mxharness.fuzz import BITWISE, BOUNDED
from mxharness.op import GATES, Outcome
from mxharness.record import RunRecord, is_right


@dataclass(frozen=True)
class Row:
    """One operator."""

    op: str
    cells: tuple[tuple[int, int], ...]
    """Right and executed under each of GATES."""
    elements: int
    ratio: float | None
    """The largest error / bound; None where no gate has a bound."""
    ties: int

    @property
    def right(self) -> bool:
        """Everything that ran was right."""
        return all(right == total for right, total in self.cells)


@dataclass(frozen=True)
class Family:
    """One kernel file."""

    name: str
    anchor: str
    rows: tuple[Row, ...]
    plots: tuple[tuple[str, str], ...]
    """Operator and its plot, an <svg>."""


@dataclass(frozen=True)
class Suite:
    """One file of suites/: what it was asked for, and what came of it."""

    name: str
    selected: int
    ran: int
    failed: int


def families(record: RunRecord) -> list[Family]:
    """One entry a kernel file, in the order of the operators."""
    found: list[Family] = []
    for name, operators in _by_file(record).items():
        plots = [
            (op, _plot(op, record.axes.get(op, "").split(), bounded))
            for op, outcomes in operators.items()
            if (bounded := [outcome for outcome in outcomes if outcome.gate == "bound"])
        ]
        judged = tuple(_row(op, outcomes) for op, outcomes in operators.items())
        found.append(Family(name, f"operators-{len(found)}", judged, tuple(plots)))
    return found


def rows(record: RunRecord) -> list[Row]:
    """One entry an operator, without plots."""
    return [_row(op, outcomes) for operators in _by_file(record).values() for op, outcomes in operators.items()]


def _by_file(record: RunRecord) -> dict[str, dict[str, list[Outcome]]]:
    """Kernel file to operator to outcomes, in the order of the operators."""
    found: dict[str, dict[str, list[Outcome]]] = {}
    places = {op: place for place, op in enumerate(record.sources)}  # workers of a parallel run end in any order
    for outcome in sorted(record.outcomes, key=lambda outcome: places.get(outcome.op, len(places))):
        found.setdefault(record.sources.get(outcome.op, outcome.op), {}).setdefault(outcome.op, []).append(outcome)
    return found


def suites(record: RunRecord) -> list[Suite]:
    """One entry a suite file, from what the run selected; empty for records of before they said so."""
    if record.coverage is None:
        return []

    def by_file(ids: tuple[str, ...]) -> Counter[str]:
        return Counter(id_.partition("::")[0].rpartition("/")[2] for id_ in ids)

    wrong = {f"{outcome.case}-{outcome.gate}" for outcome in record.outcomes if not is_right(outcome)}
    checks = tuple(id_ for id_ in record.coverage.selected if wrong and manifest.parameters(id_) in wrong)
    failed = by_file((*checks, *(failure.id for failure in record.tests.failures)))
    selected, missing = by_file(record.coverage.selected), by_file(record.coverage.missing)
    names = sorted({*selected, *failed})
    return [Suite(name, selected[name], selected[name] - missing[name], failed[name]) for name in names]


def _plot(op: str, axes: list[str], outcomes: list[Outcome]) -> str:
    """Error / bound as SVG; over the contraction length where the operator has one."""
    k = axes.index("K") if "K" in axes and all(len(outcome.shape) == len(axes) for outcome in outcomes) else None
    points = [
        plot.Point(
            x=max(1, outcome.elements if k is None else outcome.shape[k]),
            ratio=outcome.ratio,
            dtype=outcome.dtype,
            passed=is_right(outcome),
        )
        for outcome in outcomes
    ]
    return plot.ratio_svg(op, points, "elements" if k is None else "K, contraction length")


def _row(op: str, outcomes: list[Outcome]) -> Row:
    cells = []
    for gate in GATES:
        judged = [is_right(outcome) for outcome in outcomes if outcome.gate == gate]
        cells.append((sum(judged), len(judged)))
    bounded = [outcome.ratio for outcome in outcomes if outcome.gate in BOUNDED]
    return Row(
        op=op,
        cells=tuple(cells),
        elements=sum(outcome.elements for outcome in outcomes),
        ratio=largest(bounded),
        ties=sum(outcome.ties for outcome in outcomes),
    )


def largest(ratios: list[float]) -> float | None:
    """The largest, NaN above all; None where there is none."""
    return max(ratios, key=lambda ratio: (math.isnan(ratio), ratio)) if ratios else None


def totals(record: RunRecord) -> Mapping[str, tuple[int, int]]:
    """Right and executed of what was compared bit for bit, and of what has a bound; what there is of either."""
    found = {}
    for name, gates in (("bit for bit", BITWISE), ("within bounds", BOUNDED)):
        judged = [is_right(outcome) for outcome in record.outcomes if outcome.gate in gates]
        if judged:
            found[name] = sum(judged), len(judged)
    return found
