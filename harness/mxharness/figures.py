"""Figures of speed, free of torch so that who only reads them starts fast: a call's time, what a device can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles


@dataclass(frozen=True)
class Ceilings:
    """What a device can do at most, and where these numbers come from."""

    bandwidth: float
    """Bytes per second."""
    matrix_rate: float
    """Floating point operations per second of a matrix product."""
    source: str
    """The device, and how each of the two was found."""


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    us: float
    """The median of the repeats."""
    low: float
    high: float
    """First and last decile of the repeats."""
    repeats: int
    """Of which each is one replay of a graph, or one call on the CPU."""
    calls: int = 1
    """In a repeat."""

    @property
    def spread(self) -> float:
        """Between the deciles, as a share of the median."""
        return (self.high - self.low) / self.us


def timing(seconds: Sequence[float], calls: int = 1) -> Timing:
    """The timing of repeats that took so long, each of so many calls; at least 2."""
    each = [1e6 * one / calls for one in seconds]
    deciles = quantiles(each, n=10, method="inclusive")
    return Timing(median(each), deciles[0], deciles[-1], len(each), calls)
