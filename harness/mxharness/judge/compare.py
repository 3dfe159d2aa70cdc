"""One output against its reference, element by element: bits, permitted ids, or a bound.

NaN and Inf are looked at before any maximum is taken. Every bound is per element (Tolerance in op.py); no bound is ever
collapsed to one number per tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mxharness.bounds import SMALLEST, UNIT_ROUNDOFF, factor, gamma, probable
from mxharness.judge.evidence import inexact, loose
from mxharness.op import Expected, Gate, Tolerance

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
"""The integer type of a dtype's bits."""


@dataclass(frozen=True)
class Verdict:
    """On one output tensor."""

    bad: torch.Tensor
    """bool, the output's shape."""
    ratio: torch.Tensor
    """float64, error / bound; 0 where bitwise equal, inf where a bitwise gate fails or a NaN or Inf is wrong."""
    want: torch.Tensor
    """float64, the reference."""
    refusal: str = ""
    """Why the case proves nothing; empty when it does."""
    ties: int = 0
    """Permitted ids that are not the reference's own choice."""
    line: float = 0.0
    """Largest error over what the probabilistic line allows; past 1 it has drifted, which is no failure."""
    chain: int = 0
    """Length of the chain of roundings behind the bound; 0 where there is none."""


def compare(output: torch.Tensor, expected: Expected, gate: Gate, tolerance: Tolerance) -> Verdict:
    """The verdict on one output under one gate."""
    if expected.permitted is not None:
        return _permitted(output, expected.value, expected.permitted)
    if gate in ("bound", "composed") and expected.magnitude is not None:
        ceiling = factor() * (tolerance.composed_ceiling if gate == "composed" else tolerance.ceiling)
        return _within_bound(output, expected, tolerance, ceiling)
    want = expected.value
    if gate == "exact-arithmetic":
        want = want.to(torch.float32).to(output.dtype)
    same = (output == want) if not output.is_floating_point() else _same_bits(output, want)
    ratio = torch.where(same, 0.0, torch.inf).double()
    return Verdict(~same, ratio, want.double(), inexact(expected) if gate == "exact-arithmetic" else "")


def _same_bits(output: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Bitwise, but for the payload of NaN, which no standard fixes."""
    integer = INTEGERS[output.dtype]
    return (output.view(integer) == want.view(integer)) | (output.isnan() & want.isnan())


def _permitted(output: torch.Tensor, choice: torch.Tensor, permitted: torch.Tensor) -> Verdict:
    """Ids: the reference's own choice, or one that its bounds cannot tell from it."""
    ids = output.long()
    known = (ids >= 0) & (ids < permitted.shape[-1])
    right = known & permitted.gather(-1, ids.where(known, 0).unsqueeze(-1)).squeeze(-1)
    ratio = torch.where(right, 0.0, torch.inf).double()
    return Verdict(~right, ratio, choice.double(), ties=int((right & (ids != choice)).sum()))


def _within_bound(output: torch.Tensor, expected: Expected, tolerance: Tolerance, ceiling: float) -> Verdict:
    """|y - reference| <= gamma_n magnitude + slack + u_out (|reference| (1 + gamma_n) + slack) + eta, times a scale.

    NaN and Inf exactly where due.
    """
    if expected.magnitude is None:
        raise ValueError("a bound needs the magnitude of the sum")
    gamma_n = gamma(expected.chain, tolerance.unit_roundoff)
    y, want = output.double(), expected.value
    summed = gamma_n * expected.magnitude
    if expected.slack is not None:
        summed = summed + expected.slack * (1 + UNIT_ROUNDOFF[output.dtype])
    bound = summed + UNIT_ROUNDOFF[output.dtype] * want.abs() * (1 + gamma_n) + SMALLEST[output.dtype]
    bound = tolerance.scale * bound
    largest = torch.finfo(output.dtype).max
    # A reference within its bound of the largest finite number may round to it or to Inf.
    may_overflow = want.abs() + bound > largest
    right_inf = y.isinf() & (y.sign() == want.sign()) & may_overflow
    due_nan = want.isnan()
    # A partial sum may pass float32's range though the whole does not: no bound holds there.
    out_of_range = expected.magnitude.isfinite() & (expected.magnitude * (1 + gamma_n) >= 2.0**128)
    error = (y - want).abs()
    ordinary = y.isfinite() & want.isfinite()
    ratio = torch.where(ordinary & ~bound.isnan(), error / bound, torch.inf)
    ratio = torch.where(right_inf | (due_nan & y.isnan()) | out_of_range, 0.0, ratio)
    line = largest_of(ratio)
    if (likely := probable(expected.chain, tolerance.unit_roundoff)) < gamma_n:
        along = error / (bound - tolerance.scale * (gamma_n - likely) * expected.magnitude)
        line = largest_of(torch.where(ratio > 0, along, 0.0).nan_to_num(torch.inf))
    refusal = loose(bound, want, out_of_range, ceiling)
    return Verdict(ratio > 1, ratio, want, refusal, line=line, chain=expected.chain)


def largest_of(ratio: torch.Tensor) -> float:
    """The largest of all; infinite where there is none."""
    return float(ratio.max()) if ratio.numel() else math.inf
