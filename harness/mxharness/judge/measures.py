"""Numbers that are recorded beside a verdict, for trends: none of them decides alone."""

from __future__ import annotations

import math

import torch

from mxharness.judge.compare import INTEGERS


def ulps(output: torch.Tensor, want: torch.Tensor) -> float:
    """Largest distance to the correctly rounded reference in units in the last place; inf for a NaN that is not due."""
    if not output.is_floating_point():
        return float((output.double() - want).abs().max())
    integer = INTEGERS[output.dtype]
    rounded = want.to(torch.float32).to(output.dtype)
    keep = output.isfinite() & rounded.isfinite()
    if bool((rounded.isfinite() & ~output.isfinite()).any()):
        return math.inf
    if not keep.any():
        return 0.0

    def ordered(x: torch.Tensor) -> torch.Tensor:
        bits = x.view(integer).long()
        return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)

    return float((ordered(output)[keep] - ordered(rounded)[keep]).abs().max())


def nmse(output: torch.Tensor, want: torch.Tensor) -> float:
    """Sum of squared errors over sum of squared references, finite references; inf for a NaN that is not due."""
    keep = output.double().isfinite() & want.isfinite()
    if bool((want.to(torch.float32).to(output.dtype).double().isfinite() & ~keep).any()):
        return math.inf
    y, reference = output.double()[keep], want[keep]
    scale = reference.abs().max() if reference.numel() else torch.tensor(0.0)
    if scale == 0:
        return 0.0 if not y.any() else math.inf
    return float(((y - reference) / scale).square().sum() / (reference / scale).square().sum())


def cosine(output: torch.Tensor, want: torch.Tensor) -> float:
    """Of the angle between output and reference where both are finite; 1 where either is all zero there."""
    keep = output.isfinite() & want.isfinite()
    y, reference = output.double()[keep], want[keep]
    if not y.any() or not reference.any():
        return 1.0
    y, reference = y / y.abs().max(), reference / reference.abs().max()
    return float((y @ reference) / (y.norm() * reference.norm()))


def high_ratio(ratio: torch.Tensor) -> float:
    """The 99.9th percentile of error / bound."""
    if not ratio.numel():
        return math.inf
    return float(ratio.flatten().kthvalue(max(1, math.ceil(0.999 * ratio.numel()))).values)
