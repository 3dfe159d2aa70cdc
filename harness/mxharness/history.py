"""What the baselines of one device class say over time: series, steps, and growth that no single version shows.

A number is compared with the version before only where both measured the same thing with the same ruler: the same
inputs, the same number of elements, a tolerance that did not change. Where the bits are the same and the error/bound
ratio is not, the ruler moved and not the kernel. Such a place breaks a series, and so does a version whose growth was
accepted; steps and growth are sought between breaks, in the logarithm of the number, where a factor is a distance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mxharness import baseline
from mxharness.baseline import Baseline, Entry, Root
from mxharness.changes import NATS
from mxharness.errors import UserError

Version = Baseline
"""A baseline, seen as one of a line: `name`, `created`, `environment["commit"]`, `checks`, `perplexity`."""

FLOOR = 1e-6
"""Ratios below count as this much, so that a check that was exact has a logarithm."""
SPREAD = 0.2
"""Standard deviation of log(error/bound) of one case when its roundings are drawn anew: 0.18 measured over 87 cases
of 7 operators, 0.13 to 0.25 from one to the other, by running them in float32 and on tensor cores. The largest of n
normal errors has one of about pi / sqrt(6) / (2 ln n): 0.19 for 30 elements, 0.09 for 1,000."""
DEVIATIONS = 3.0
"""A step, and growth of an operator, is more than so many standard deviations of a difference."""
CASE_BUDGET = 4.0
"""A case's ratio may grow so much in all: two bits of accuracy, and five standard deviations of chance."""
OPERATOR_BUDGET = 1.25
"""So may an operator's, the geometric mean over its cases: a third of a bit that all lose together; or what chance may
do to a mean of few cases, where that is more."""
PERPLEXITY_BUDGET = math.exp(3 * NATS)
"""Three moves in one direction that each passed as none."""


@dataclass(frozen=True)
class Point:
    """One version's value."""

    version: str
    """Name of the baseline."""
    created: str
    """UTC, ISO 8601."""
    value: float
    digest: str
    """Of the bits; empty for an operator and for a perplexity."""
    comparable: bool
    """Whether it can be compared with the point before; False at the first."""


@dataclass(frozen=True)
class Series:
    """One number over the versions that have it, oldest first."""

    key: str
    """"case gate", an operator, or what names a perplexity."""
    op: str
    """The operator, or "perplexity"."""
    quantity: str
    """ratio, max_ulp, nmse, "ratio, relative" (an operator's chain index, 1 at its start) or perplexity."""
    points: tuple[Point, ...]
    spread: float
    """Standard deviation of the value's logarithm by chance."""
    budget: float
    """The factor by which it may grow in all."""


@dataclass(frozen=True)
class Step:
    """A jump between two levels."""

    version: str
    """The first one on the new level."""
    before: float
    after: float
    """Geometric means of the levels."""


@dataclass(frozen=True)
class Growth:
    """What has come together since the last break."""

    since: str
    until: str
    """Names of versions."""
    factor: float
    """Last value / first value; 1 where there is one only."""
    budget: float

    @property
    def exceeded(self) -> bool:
        """What was blessed move by move is too much in all."""
        return self.factor > self.budget

    def sentence(self, quantity: str) -> str:
        """What has grown, by how much, since when, and what was allowed."""
        return f"{quantity} has grown to {self.factor:.4g} times what it was at {self.since}, {self.budget:.4g} allowed"


def history(device_class: str, root: Root = None) -> tuple[Version, ...]:
    """Every baseline of a device class, oldest first. root: as in baseline.load. Raises UserError as it does."""
    found = baseline.survey(device_class, root)
    if found.damaged:
        raise UserError(found.damaged[0].why)
    return in_order(found.versions)


def in_order(found: Iterable[Version]) -> tuple[Version, ...]:
    """Versions, oldest first."""
    return tuple(sorted(found, key=lambda version: (version.created, version.name)))


def check_series(versions: Sequence[Version], quantity: str = "ratio") -> tuple[Series, ...]:
    """A column of every check (ratio, max_ulp or nmse), by key, over the versions that have it."""
    found = []
    for key in sorted({key for version in versions for key in version.checks}):
        holders = [version for version in versions if key in version.checks]
        points = [
            Point(
                version.name,
                version.created,
                _number(version.checks[key], quantity),
                str(version.checks[key]["digest"]),
                before is not None and same_ruler(before, version, key),
            )
            for before, version in zip([None, *holders], holders, strict=False)
        ]
        op = str(holders[-1].checks[key]["op"])
        found.append(Series(key, op, quantity, tuple(points), SPREAD, CASE_BUDGET))
    return tuple(found)


def operator_series(versions: Sequence[Version]) -> tuple[Series, ...]:
    """The error/bound ratio of every operator relative to its first version: a chain of geometric means.

    Each link is the geometric mean of after/before over the checks that both versions have and that can be compared, so
    that new cases and moved rulers change nothing (a chained Jevons index; ILO, Consumer Price Index Manual, 2004).
    """
    found = []
    for op in sorted({str(entry["op"]) for version in versions for entry in version.checks.values()}):
        holders = [version for version in versions if any(entry["op"] == op for entry in version.checks.values())]
        points = [Point(holders[0].name, holders[0].created, 1.0, "", False)]
        fewest = math.inf
        for before, after in pairwise(holders):
            moves = _moves(before, after, op)
            fewest = min(fewest, len(moves) or math.inf)
            link = math.exp(sum(moves) / len(moves)) if moves else 1.0
            points.append(Point(after.name, after.created, points[-1].value * link, "", bool(moves)))
        spread = SPREAD / math.sqrt(fewest) if math.isfinite(fewest) else SPREAD
        budget = max(OPERATOR_BUDGET, math.exp(DEVIATIONS * math.sqrt(2) * spread))
        found.append(Series(op, op, "ratio, relative", tuple(points), spread, budget))
    return tuple(found)


def perplexity_series(versions: Sequence[Version]) -> tuple[Series, ...]:
    """Every perplexity over the versions that measured it on the same text, tokens and model."""
    found = []
    for key in sorted({key for version in versions for key in version.perplexity}):
        holders = [version for version in versions if key in version.perplexity]
        points = [
            Point(
                version.name,
                version.created,
                _number(version.perplexity[key], "perplexity"),
                "",
                before is not None
                and not version.accepted
                and _same_experiment(before.perplexity[key], version.perplexity[key]),
            )
            for before, version in zip([None, *holders], holders, strict=False)
        ]
        found.append(Series(key, "perplexity", "perplexity", tuple(points), NATS / 3, PERPLEXITY_BUDGET))
    return tuple(found)


def all_series(versions: Sequence[Version]) -> tuple[Series, ...]:
    """The ratio of every operator and every check, and every perplexity."""
    return (*operator_series(versions), *check_series(versions), *perplexity_series(versions))


def same_ruler(before: Version, after: Version, key: str) -> bool:
    """Whether a check's numbers of two versions differ by what the kernel computes alone, and count from before on."""
    old, new = before.checks[key], after.checks[key]
    op = str(new["op"])
    if after.accepted:
        return False
    if old["inputs"] != new["inputs"] or old["elements"] != new["elements"]:
        return False
    known = op in before.tolerances and op in after.tolerances
    if known and dict(before.tolerances[op]) != dict(after.tolerances[op]):
        return False
    moved = abs(_log(_number(old, "ratio")) - _log(_number(new, "ratio"))) > math.log1p(1e-2)
    return not (moved and old["digest"] == new["digest"])


def steps(series: Series) -> tuple[Step, ...]:
    """Where the level changed: the piecewise constant fit of the logarithms that costs least.

    Cost: squared residuals over spread^2 plus a penalty a step; found by optimal partitioning (Jackson et al., An
    algorithm for optimal partitioning of data on an interval, IEEE Signal Processing Letters 12, 2005). The penalty is
    2 ln n (Yao, Estimating the number of change-points via Schwarz' criterion, Statistics & Probability Letters 6,
    1988), and at least DEVIATIONS^2, which is what a difference of so many standard deviations saves.
    """
    found = []
    for run in _runs(series.points):
        values = [_log(point.value) for point in run]
        bounds = [0, *_level_starts([value / series.spread for value in values]), len(run)]
        means = [math.exp(sum(values[a:b]) / (b - a)) for a, b in pairwise(bounds)]
        found += [
            Step(run[start].version, before, after)
            for start, (before, after) in zip(bounds[1:-1], pairwise(means), strict=True)
        ]
    return tuple(found)


def growth(series: Series) -> Growth:
    """How much the value has grown since the last break, in steps or in moves too small to be one."""
    run = _runs(series.points)[-1]
    factor = math.exp(_log(run[-1].value) - _log(run[0].value))
    return Growth(run[0].version, run[-1].version, factor, series.budget)


def _level_starts(values: Sequence[float]) -> list[int]:
    """Indices at which a new level begins, for values in units of their standard deviation."""
    n = len(values)
    penalty = max(2 * math.log(n), DEVIATIONS**2)
    best, start_of = [-penalty], [0]
    for end in range(1, n + 1):
        costs = []
        total = squares = 0.0
        for start in range(end - 1, -1, -1):
            distance = values[start] - values[end - 1]  # from a value nearby: no cancellation
            total, squares = total + distance, squares + distance**2
            costs.append((best[start] + squares - total**2 / (end - start) + penalty, start))
        least, start = min(costs)
        best.append(least)
        start_of.append(start)
    found = []
    end = n
    while end:
        end = start_of[end]
        found.append(end)
    return sorted(found)[1:]


def _runs(points: Iterable[Point]) -> list[list[Point]]:
    """The points between breaks."""
    runs: list[list[Point]] = []
    for point in points:
        if point.comparable and runs:
            runs[-1].append(point)
        else:
            runs.append([point])
    return runs


def _moves(before: Version, after: Version, op: str) -> list[float]:
    """log(after / before) of every ratio of an operator that can be compared; not of those that are exact in both."""
    pairs = [
        (_number(before.checks[key], "ratio"), _number(entry, "ratio"))
        for key, entry in after.checks.items()
        if entry["op"] == op and key in before.checks and same_ruler(before, after, key)
    ]
    return [_log(new) - _log(old) for old, new in pairs if max(old, new) > FLOOR]


def _same_experiment(before: Entry, after: Entry) -> bool:
    """Whether what fixes a perplexity, hashes and counts, is the same."""
    return all(
        before.get(name) == after.get(name)
        for name in before.keys() | after.keys()
        if isinstance(before.get(name, after.get(name)), str | int)
    )


def _log(value: float) -> float:
    return math.log(value) if FLOOR < value < math.inf else math.log(FLOOR) if value <= FLOOR else -math.log(FLOOR)


def _number(entry: Entry, name: str) -> float:
    value = entry[name]
    return float(value) if isinstance(value, int | float) else math.nan
