"""Signal to quantisation noise: how far weights in MXFP4 are from what they were."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mxharness.mxfp4 import Quantized


def energies(exact: torch.Tensor, quantized: Quantized) -> tuple[float, float]:
    """The sums of squares of weights (rows, K) and of what quantising changed, in float64."""
    from mxharness import mxfp4

    wide = exact.double()
    error = mxfp4.dequantize(*quantized)[..., : exact.shape[-1]].double() - wide
    return float(wide.square().sum()), float(error.square().sum())


def decibels(signal: float, noise: float) -> float:
    """10 log10 of signal by noise: inf where nothing changed, NaN where there is no signal."""
    if signal == 0:
        return math.nan
    return 10 * math.log10(signal / noise) if noise else math.inf
