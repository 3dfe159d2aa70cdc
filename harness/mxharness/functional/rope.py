"""Rotary position embedding: the table of angles, and the rotation of queries.

Sources: Su et al., RoFormer (arXiv 2104.09864); YaRN: Peng et al. (arXiv 2309.00071), with gpt-oss' choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from mxharness.device import Device
from mxharness.errors import UserError
from mxharness.functional.common import ACTIVATIONS, check_tensor, check_tensors, device_of, integer, number, single

ORDERS = {"half": 0, "interleaved": 1}
"""Which elements of a row form a pair: i and i + D/2 (Llama, transformers, gpt-oss), or 2i and 2i + 1 (GPT-J, GGUF)."""
HEAD_DIMS = (32, 64, 80, 96, 128)
LANES = 4
"""Threads of kv_cache.cu for 32 elements of a row."""
_MOST_POSITIONS = 1 << 30
"""So that the end of a sequence, a position and a number of tokens, stays within 32 bits."""


@dataclass(frozen=True)
class Yarn:
    """Interpolation of low frequencies so that a model reaches `factor` times its original context."""

    factor: float = 32.0
    original_context: int = 4096
    beta_fast: float = 32.0
    """Pairs that turn more often than this over the original context keep their frequency."""
    beta_slow: float = 1.0
    """Pairs that turn less often than this have it divided by the factor."""
    truncate: bool = False
    """Whether the ends of the ramp between the two are rounded outwards to whole pairs; gpt-oss does not."""

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by: 0.1 ln(factor) + 1."""
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class Rope:
    """How rows are rotated: by which angles, in which pairs."""

    table: torch.Tensor
    """(positions, D/2, 2) float32: cos and sin, as `rope_table` makes it, on the device of the kernels."""
    order: str = "half"
    """A key of ORDERS."""


def rope_table(length: int, head_dim: int, base: float = 10000.0, *, scaling: Yarn | None = None) -> torch.Tensor:
    """Cos and sin (length, D/2, 2) float32 of position times base^(-2 i / D), on the CPU.

    Computed in float64 and rounded once; with YaRN the frequencies are interpolated and both are multiplied by its
    attention factor. Raises UserError for a length below 1, an odd head_dim, or a base that is not above 1.
    """
    length, head_dim, base = integer(length, "length"), integer(head_dim, "head_dim"), number(base, "base")
    if length < 1 or head_dim < 2 or head_dim % 2 or not 1 < base < math.inf:
        raise UserError(
            f"rope_table takes a length of at least 1, an even head_dim and a base above 1, "
            f"not {length}, {head_dim} and {base}"
        )
    frequency = base ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)  # (D/2)
    factor = 1.0
    if scaling is not None:
        _check_yarn(scaling)
        keep = _kept_share(head_dim, base, scaling)
        frequency = frequency / scaling.factor * (1 - keep) + frequency * keep
        factor = scaling.attention_factor
    angles = np.arange(length, dtype=np.float64)[:, None] * frequency
    return torch.from_numpy(np.stack((np.cos(angles), np.sin(angles)), -1) * factor).to(torch.float32)


def _check_yarn(scaling: Yarn) -> None:
    """UserError unless its numbers are positive."""
    if not isinstance(scaling, Yarn):
        raise UserError(f"scaling must be a Yarn, not {type(scaling).__name__}")
    for name in ("factor", "original_context", "beta_fast", "beta_slow"):
        if not 0 < number(getattr(scaling, name), name) < math.inf:
            raise UserError(f"{name} must be a positive number, not {getattr(scaling, name)}")


def _kept_share(head_dim: int, base: float, scaling: Yarn) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """(D/2): 1 where a frequency stays, 0 where it is divided by the factor, a ramp between."""

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(scaling.original_context / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return 1 - np.clip((np.arange(head_dim // 2, dtype=np.float64) - low) / (high - low), 0, 1)


def apply_rope(
    x: torch.Tensor, rope: Rope, positions: torch.Tensor, *, validate: bool = True, device: Device | None = None
) -> torch.Tensor:
    """Y (B, T, H, D), contiguous: token t of sequence b turned by the angles of position positions[b] + t.

    x is (B, T, H, D) bf16 or fp16; its heads and elements must be contiguous, tokens may be apart (a view of a fused
    projection). positions (B) int32. Computed in float32, rounded once to x's dtype. Raises UserError for another
    shape, dtype or head_dim, a table that does not fit, and positions outside it. Looking at positions waits for a GPU;
    validate=False leaves it out (graph capture), and then the caller answers for them: the kernel reads where they say.
    """
    device = device_of(x, device, "x")
    stride = check_heads(device, x, "x")
    B, T, H, D = x.shape
    check_starts(device, positions, B, "positions", validate=validate)
    order = check_rope(device, rope, D, int(positions.max()) + T if validate else 0)
    y = device.empty((B, T, H, D), x.dtype)
    threads = B * T * H * -(-D // 32) * LANES
    device.launch(
        "kv_cache.cu", f"rope_{ACTIVATIONS[x.dtype]}", (-(-threads // 128),), (128,),
        y, x, stride, rope.table, positions, B, T, H, D, order,
    )  # fmt: skip
    return y


def check_heads(device: Device, x: torch.Tensor, name: str) -> int:
    """Elements from one token of x (B, T, H, D) to the next. UserError unless it is bf16 or fp16 and laid out so."""
    check_tensor(x, name)
    if x.dtype not in ACTIVATIONS:
        raise UserError(f"{name} must be bfloat16 or float16, not {x.dtype}")
    if x.ndim != 4 or 0 in x.shape or x.shape[3] not in HEAD_DIMS:
        dims = ", ".join(map(str, HEAD_DIMS))
        raise UserError(f"{name} must be (B, T, H, D) with no size 0 and D one of {dims}, not {tuple(x.shape)}")
    B, T, H, D = x.shape
    stride = x.stride(1) if T > 1 else x.stride(0) if B > 1 else H * D
    want = (T * stride, stride, D, 1)
    if any(size > 1 and got != need for size, got, need in zip(x.shape, x.stride(), want, strict=True)):
        raise UserError(f"{name} must have contiguous heads and evenly spaced tokens, not strides {x.stride()}")
    if stride % 8:
        raise UserError(f"{name}'s tokens must be a multiple of 8 elements apart, not {stride}")
    check_tensors(device, **{name: x[0, 0]})
    return stride


def check_starts(device: Device, positions: torch.Tensor, B: int, name: str, *, validate: bool = True) -> None:
    """UserError unless positions is (B) int32, none below 0 or so large that an end would not be int32.

    Without `validate` their values are not looked at.
    """
    check_tensor(positions, name)
    if positions.dtype != torch.int32 or tuple(positions.shape) != (B,):
        raise UserError(f"{name} must be int32 of shape ({B},), not {positions.dtype} {tuple(positions.shape)}")
    check_tensors(device, **{name: positions})
    if not validate:
        return
    if int(positions.min()) < 0:
        raise UserError(f"{name} must not be negative, the smallest is {int(positions.min())}")
    if int(positions.max()) >= _MOST_POSITIONS:
        raise UserError(f"{name} must be below {_MOST_POSITIONS}, the largest is {int(positions.max())}")


def check_rope(device: Device, rope: Rope, D: int, end: int) -> int:
    """What kernels call the order. UserError unless the table fits D and holds the positions below `end`."""
    if not isinstance(rope, Rope):
        raise UserError(f"rope must be a Rope, not {type(rope).__name__}")
    if rope.order not in tuple(ORDERS):
        raise UserError(f"no order '{rope.order}' of pairs; there are {', '.join(ORDERS)}")
    table = rope.table
    check_tensor(table, "rope table")
    if table.dtype != torch.float32 or table.ndim != 3 or tuple(table.shape[1:]) != (D // 2, 2):
        raise UserError(f"rope table must be float32 (positions, {D // 2}, 2), not {table.dtype} {tuple(table.shape)}")
    check_tensors(device, **{"rope table": table})
    if end > table.shape[0]:
        raise UserError(f"the rope table holds {table.shape[0]} positions, {end} are needed")
    return ORDERS[rope.order]


def check_window(window: int | None) -> int | None:
    """The window, 2^30 where it is larger and hides nothing. UserError unless it is None or a positive integer."""
    if window is None:
        return None
    if integer(window, "window") < 1:
        raise UserError(f"a window must be at least 1, not {window}")
    return min(integer(window, "window"), _MOST_POSITIONS)


def check_scale(scale: float | None, D: int) -> float:
    """D^-1/2 by default, as float32. UserError for what is no finite number."""
    value = single(D**-0.5 if scale is None else scale, "scale")
    if not math.isfinite(value):
        raise UserError(f"scale must be a finite float32 number, not {scale}")
    return value
