"""What a row of the bench measures, and what the makers of rows share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import torch

from mxharness import mxfp4
from mxharness.device import Device
from mxharness.mxfp4 import BLOCK, Quantized
from mxharness.timing import Call, copies_for

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SOME_ROWS, SOME_COLUMNS = 16, 512
"""Of an output, so much is held against its float64 reference."""
_CENTRE = 121
"""Scale byte around which weights lie: products of 16,384 terms stay far below 65,504, where fp16 ends."""


@dataclass(frozen=True)
class Rival:
    """Somebody else's way to the same result."""

    call: Call
    copies: int
    judged: bool = True
    """False where it does not compute the same, as a plain copy of as many bytes."""
    part: Callable[[torch.Tensor], torch.Tensor] | None = None
    """As the work's, where its output lies otherwise."""


@dataclass(frozen=True)
class Work:
    """One row's work, ready to be called."""

    call: Call
    copies: int
    nbytes: int
    """That one call must move at least."""
    flops: int
    """Of its matrix products."""
    golden: torch.Tensor
    """Float64: what `part` of the first call's output should be."""
    part: Callable[[torch.Tensor], torch.Tensor]
    row: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Of an output, what must not depend on the batch, and by `alone` does not."""
    alone: Callable[[], torch.Tensor] | None = None
    rivals: Mapping[str, Rival] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    """Rivals that cannot run here, and why."""
    reference: str = ""
    """The rival that ratios are to; empty: there is none."""


def floor_seconds(nbytes: int, flops: int, bandwidth: float, matrix_rate: float) -> float:
    """Seconds below which no kernel can be: the larger of bytes by bandwidth and operations by rate."""
    return max(nbytes / bandwidth, flops / matrix_rate)


def packed_bytes(*shape: int) -> int:
    """Bytes of an MXFP4 tensor (.., K)."""
    return mxfp4.nbytes(shape)


def generator(device: torch.device, seed: int) -> torch.Generator:
    """A generator on the device."""
    return torch.Generator(device).manual_seed(seed)


def activations(device: Device, count: int, shape: Sequence[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """`count` tensors of normal numbers."""
    where = device.torch_device
    numbers = generator(where, 1)
    return [torch.randn(*shape, generator=numbers, device=where).to(dtype) for _ in range(count)]


def weights(device: Device, shape: tuple[int, ...], count: int) -> tuple[Quantized, ...]:
    """`count` MXFP4 tensors (.., K): all codes, scales within 2^-8 and 2^-4; the last few asked for are kept."""
    return _weights(device.torch_device, shape, count)


def decoded(device: Device, shape: tuple[int, ...], count: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The first tensors of `weights(device, shape, count)` as torch has them: as many as leave the cache cold."""
    return _decoded(device.torch_device, shape, count, dtype)


@lru_cache(maxsize=2)
def _weights(where: torch.device, shape: tuple[int, ...], count: int) -> tuple[Quantized, ...]:
    numbers = generator(where, 2)

    def drawn(low: int, high: int, columns: int) -> torch.Tensor:
        size = (*shape[:-1], columns)
        return torch.randint(low, high, size, dtype=torch.uint8, device=where, generator=numbers)

    K = shape[-1]
    return tuple(Quantized(drawn(0, 256, K // 2), drawn(_CENTRE - 2, _CENTRE + 3, K // BLOCK)) for _ in range(count))


@lru_cache(maxsize=2)
def _decoded(where: torch.device, shape: tuple[int, ...], count: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    wanted = min(count, copies_for(2 * prod(shape)))
    return tuple(values(one, dtype) for one in _weights(where, shape, count)[:wanted])


def values(weight: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """A weight decoded by the reference, its first dimension in pieces that need little memory."""
    codes, scales = weight
    step = max(1, (1 << 24) // max(codes[0].numel(), 1))
    pieces = [
        mxfp4.dequantize(codes[i : i + step], scales[i : i + step], dtype) for i in range(0, codes.shape[0], step)
    ]
    return torch.cat(pieces)


def exact(weight: Quantized) -> torch.Tensor:
    """A weight of `weights` in float64; its values are float32 numbers."""
    return values(weight, torch.float32).double()


def released() -> None:
    """Give back the tensors that are kept from row to row."""
    _weights.cache_clear()
    _decoded.cache_clear()


def corner(y: torch.Tensor) -> torch.Tensor:
    """The part of an output (.., M, N) that is held against its reference."""
    return y[..., :SOME_ROWS, :SOME_COLUMNS]


def first_row(y: torch.Tensor) -> torch.Tensor:
    """Row 0 of an output (M, ..)."""
    return y[:1]
