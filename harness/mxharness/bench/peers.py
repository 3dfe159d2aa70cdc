"""Libraries that multiply by MXFP4 weights on a GPU, where they are installed."""

from __future__ import annotations

import torch

from mxharness.bench.work import Rival
from mxharness.mxfp4 import Quantized


def product_rivals(
    xs: list[torch.Tensor], stored: tuple[Quantized, ...], copies: int
) -> tuple[dict[str, Rival], dict[str, str]]:
    """Rivals of x W^T, and those that are absent with the reason."""
    return {}, {}
