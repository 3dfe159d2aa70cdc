"""Running error analysis: a float64 value and how far a kernel's may lie from it, carried from stage to stage.

Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.3. A whole function's reference is
computed from its inputs alone; what its stages may have lost on the way is `error`, element by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import product

import torch

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Of rounding to nearest into a dtype."""
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
"""Smallest subnormal."""


@dataclass(frozen=True)
class Bounded:
    """Reference `value` and a bound `error` on a kernel's distance from it, both float64 of one shape."""

    value: torch.Tensor
    error: torch.Tensor


def exact(x: torch.Tensor) -> Bounded:
    """What the kernel reads as the reference does."""
    return Bounded(x.double(), torch.zeros_like(x, dtype=torch.float64))


_FACTOR: ContextVar[float] = ContextVar("factor", default=1.0)


@contextmanager
def widened(factor: float) -> Iterator[None]:
    """Take every unit roundoff times `factor`: for a device whose tensor core loses more than Hopper's (facts.py)."""
    token = _FACTOR.set(factor)
    try:
        yield
    finally:
        _FACTOR.reset(token)


def factor() -> float:
    """By how much the device's roundings are larger than those that the operators' bounds are written with."""
    return _FACTOR.get()


def gamma(chain: int, unit_roundoff: float = 2.0**-24) -> float:
    """gamma_n = n u / (1 - n u): what n roundings may do to a sum of |terms|."""
    n_u = chain * unit_roundoff * factor()
    return n_u / (1 - n_u)


LAMBDA = 6.0
"""Standard deviations of the probabilistic line; fewer than 4 in 10^8 errors of independent roundings pass it."""


def probable(chain: int, unit_roundoff: float = 2.0**-24) -> float:
    """LAMBDA sqrt(n) u, what n roundings do to a sum as good as ever; never more than gamma_n, what they may do at all.

    Source: Ipsen and Zhou, Probabilistic error analysis for inner products, arXiv 1906.10465.
    """
    return min(LAMBDA * math.sqrt(chain) * unit_roundoff * factor(), gamma(chain, unit_roundoff))


def multiplied(elements: int) -> float:
    """The lambda with which all of `elements` results stay under their lines as surely as one does with LAMBDA.

    One error passes lambda with a probability of at most 2 exp(-lambda^2 / 2), one of N with N times that.
    """
    return math.sqrt(LAMBDA**2 + 2 * math.log(max(elements, 1)))


def quantum(x: torch.Tensor) -> torch.Tensor:
    """The largest power of two of which every number along the last dimension is an integer multiple, float64.

    Infinite where all are zero, 0 where one is NaN or Inf.
    """
    mantissa, exponent = torch.frexp(x.double())
    whole = (mantissa.nan_to_num(0.0, 0.0, 0.0) * 2.0**53).to(torch.int64)
    low = (whole & -whole).double() * torch.exp2((exponent - 53).double())
    return torch.where(x == 0, torch.inf, torch.where(x.isfinite(), low, 0.0)).amin(-1)


def contraction(x: Bounded, w: torch.Tensor, chain: int) -> Bounded:
    """X (..., M, K) w (..., N, K)^T, summed in float32 with a longest chain of `chain` roundings."""
    weights = w.double()
    largest = x.value.abs() + x.error
    value = x.value @ weights.mT
    return Bounded(value, x.error @ weights.abs().mT + gamma(chain) * (largest @ weights.abs().mT))


def rounded(x: Bounded, dtype: torch.dtype) -> Bounded:
    """Stored in `dtype`."""
    return Bounded(x.value, x.error + UNIT_ROUNDOFF[dtype] * (x.value.abs() + x.error) + SMALLEST[dtype])


def apply(function: Callable[..., torch.Tensor], *arguments: Bounded, roundoff: torch.Tensor | float = 0.0) -> Bounded:
    """An elementwise function, monotone in each argument across its interval or nearly so; broadcasts.

    The error is the largest change of the function over the corners and half-way points of the arguments' intervals,
    a tenth more for a turning point between them, plus `roundoff`: what the kernel's own evaluation may lose, absolute.
    """
    value = function(*(argument.value for argument in arguments))
    error = torch.zeros_like(value)
    for steps in product((-1.0, -0.5, 0.5, 1.0), repeat=len(arguments)):
        moved = function(*(a.value + step * a.error for a, step in zip(arguments, steps, strict=True)))
        error = torch.maximum(error, (moved - value).abs())
    return Bounded(value, 1.1 * error + roundoff)
