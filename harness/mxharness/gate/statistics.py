"""Paired differences of whole windows: estimates with their errors, Student's t, Holm's procedure.

Tokens of one window share their context, so their differences are not independent: the window is the unit. Treating
tokens as independent quadruples the false passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[tuple[int], np.dtype[np.float64]]

CONFIDENCE = 0.95
"""Of every bound here, one-sided."""
DETECTABLE = 3.29
"""z(0.95) + z(0.95): a change so many standard errors large is told from none with errors of 5 % either way."""
_BRACKET = 1e6  # |t| of one degree of freedom at a probability of 3e-7


@dataclass(frozen=True)
class Estimate:
    """A mean per token, and how well windows fix it."""

    mean: float
    error: float
    """Standard error, from windows."""
    windows: int
    tokens: int

    @property
    def lower(self) -> float:
        """One-sided lower bound at CONFIDENCE; -inf for a single window."""
        return self.mean - self._reach

    @property
    def upper(self) -> float:
        """One-sided upper bound at CONFIDENCE; inf for a single window."""
        return self.mean + self._reach

    @property
    def detectable(self) -> float:
        """The smallest change that is told from none with errors of 5 % either way."""
        return DETECTABLE * self.error

    def beyond(self, value: float) -> float:
        """P(an estimate this high or higher) were the true mean `value`: small where the mean is above it."""
        if self.error == 0 or self.windows < 2:
            return 0.5 if self.windows < 2 or self.mean == value else float(self.mean < value)
        return 1 - student_cdf((self.mean - value) / self.error, self.windows - 1)

    @property
    def _reach(self) -> float:
        if self.windows < 2:
            return math.inf
        return student_quantile(CONFIDENCE, self.windows - 1) * self.error


def clustered(sums: Floats, counts: Floats) -> Estimate:
    """The mean per token of what windows sum up to, with the error that windows as units give it.

    sums (W,): over a window's tokens; counts (W,): how many these are. For windows of one size this is Student's
    one-sample t of window means; else the ratio estimator (Cochran, Sampling Techniques, 3rd edition, section 6.4).
    """
    windows, tokens = len(sums), float(counts.sum())
    mean = float(sums.sum()) / tokens
    if windows < 2:
        return Estimate(mean, math.inf, windows, int(tokens))
    residual = sums - mean * counts
    error = math.sqrt(windows / (windows - 1) * float(residual @ residual)) / tokens
    return Estimate(mean, error, windows, int(tokens))


def student_cdf(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t with `freedom` degrees of freedom, by Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(odd, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 * (1 + inside)


def student_quantile(probability: float, freedom: int) -> float:
    """The t that Student's t with `freedom` degrees of freedom stays below with `probability`, by bisection."""
    low, high = -_BRACKET, _BRACKET
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def holm(values: Sequence[float]) -> list[float]:
    """P-values adjusted for being one of several, in their order (Holm, Scand. J. Statist. 6 (1979) 65)."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, largest = [1.0] * len(values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = largest
    return adjusted
