"""Weights that went wrong on their way to a kernel: what a gate must see, each by its name.

A defect takes a healthy matrix and gives the MXFP4 bytes that a faulty quantiser or loader would have left.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from mxharness.model.checkpoint import Stored, values
from mxharness.model.config import Weight
from mxharness.model.config import weights as weights_of
from mxharness.mxfp4 import Quantized, quantize

if TYPE_CHECKING:
    from mxharness.model.checkpoint import Checkpoint

Choose = Callable[[Weight], bool]


@dataclass(frozen=True)
class Defect:
    """A way to spoil a matrix, (..., K) float32 -> MXFP4, and in words what it does."""

    summary: str
    spoil: Callable[[torch.Tensor, torch.Generator], Quantized]


def _some(shape: torch.Size, share: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator) < share


def _zeroed(x: torch.Tensor, generator: torch.Generator) -> Quantized:
    codes, scales = quantize(x)
    hit = _some(scales.shape, 3e-4, generator).repeat_interleave(16, dim=-1)
    return Quantized(codes.masked_fill(hit, 0), scales)


def _flipped(x: torch.Tensor, generator: torch.Generator) -> Quantized:
    codes, scales = quantize(x)
    low, high = (_some(codes.shape, 0.01, generator).to(torch.uint8) for _ in range(2))
    return Quantized(codes ^ (low | (high << 4)), scales)


def _doubled(x: torch.Tensor, generator: torch.Generator) -> Quantized:
    codes, scales = quantize(x)
    return Quantized(codes, scales + _some(scales.shape, 1e-3, generator).to(torch.uint8))


DEFECTS = {
    "ties-away": Defect("ties rounded away from zero", lambda x, _: quantize(x, "floor", "away")),
    "zeroed-blocks": Defect("0.03 % of the blocks zeroed", _zeroed),
    "flipped-codes": Defect("lowest bit of 1 % of the codes flipped", _flipped),
    "doubled-scales": Defect("scale of 0.1 % of the blocks doubled", _doubled),
    "other-scale-rule": Defect("the scale rule even in place of floor", lambda x, _: quantize(x, "even", "even")),
}


def quantised(checkpoint: Checkpoint, choose: Choose, defect: Defect | None = None, seed: int = 0) -> Checkpoint:
    """A checkpoint whose packed weights that `choose` picks are MXFP4 (floor, even), or what a defect makes of them.

    Others stay as they are. Its hash stays, too: what is spoilt is not the file, but what was made of it.
    """
    tensors = dict(checkpoint.tensors)
    for weight in weights_of(checkpoint.config):
        if weight.packed and choose(weight):
            read = partial(_read, checkpoint.tensors[weight.name], weight, defect, seed)
            tensors[weight.name] = Stored(weight.shape, "MXFP4", read)
    return replace(checkpoint, tensors=tensors)


def everything(_weight: Weight) -> bool:
    """Every packed weight."""
    return True


def feed_forward(weight: Weight) -> bool:
    """Gate, up and down."""
    return weight.name.rsplit(".", 1)[-1] in {"gate", "up", "gate_up", "down"}


def _read(stored: Stored, weight: Weight, defect: Defect | None, seed: int) -> Quantized:
    matrix = values(stored)
    if defect is None:
        return quantize(matrix)
    generator = torch.Generator().manual_seed(zlib.crc32(weight.name.encode()) + seed)
    return defect.spoil(matrix, generator)
