"""The bits of attention's core in numpy: the order that kernels/attention.cu declares, without the kernel's schedule.

Here are no blocks, warps or lanes: for every row of queries the keys are taken in chunks of 128 at absolute positions.
q k^T, p v and the sums of p are chains of the modelled tensor core (tensor_core.py), 2^x is elementary_bits.exp2, and
every other operation is one of float32. Values that are NaN or Inf stay out of the chain over a chunk and are added,
times their weight, in ascending order to the rows that see them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mxharness import tensor_core
from mxharness.float32 import Array, Wide, fma
from mxharness.functional import ACTIVATIONS
from mxharness.ops import elementary_bits
from mxharness.ops.attention_reference import CHUNK, Rule

Seen = npt.NDArray[np.bool_]
ZERO, INFINITY = np.float32(0), np.float32(np.inf)
LOG2_E, WHOLE, GRID = np.float32(1.44269504), 2.0**23, np.float32(3072)
FACTOR = {torch.bfloat16: np.float32(1), torch.float16: np.float32(0.951235235)}
"""Of a weight; it cancels when the sum of the weights divides."""


class State(NamedTuple):
    """Of rows (.., R) after some keys."""

    top: Array
    """(.., R): m, the base: a whole number, of which power of 2 the sum and the output are multiples."""
    total: Array
    """(.., R): l, the sum of the weights."""
    output: Array
    """(.., R, D): O, the values times their weights."""


def core_bits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule, dtype: torch.dtype) -> torch.Tensor:
    """Y (B, T, H, D) for q (B, T, H, D), k and v (B, Hkv, S, D), all of values of dtype, which y has too."""
    (B, T, H, D), (Hkv, S) = q.shape, k.shape[1:3]
    G, padding = H // Hkv, -S % CHUNK
    rows = q.double().reshape(B, T, Hkv, G, D).permute(0, 2, 1, 3, 4).reshape(B, Hkv, T * G, D).numpy()
    seen = rule.visible(T, S).repeat_interleave(G, 2).expand(-1, Hkv, -1, -1)  # (B, Hkv, T G, S)
    visible = np.pad(seen.numpy(), ((0, 0), (0, 0), (0, 0), (0, padding)))
    keys, values = k.double().numpy(), torch.nn.functional.pad(v.double(), (0, 0, 0, padding)).numpy()
    with np.errstate(all="ignore"):
        state = _start(rule, T, G, (B, Hkv, T * G, D), dtype)
        for first in range(0, S, CHUNK):
            here = slice(first, first + CHUNK)
            touched = np.logical_or.reduce(visible[..., here], -1)
            if touched.any():
                chunk = _chunk(rows, keys[..., here, :], values[..., here, :], visible[..., here], rule.scale, dtype)
                state = _chosen(touched, _joined(state, chunk), state)
        inverse = np.where(visible.any(-1) | (state.total != 0), np.float32(1) / state.total, ZERO)
        y = state.output * inverse[..., None]
    heads = torch.from_numpy(y).reshape(B, Hkv, T, G, D).permute(0, 2, 1, 3, 4)
    return heads.reshape(B, T, H, D).to(dtype)


def _start(rule: Rule, T: int, G: int, sizes: tuple[int, ...], dtype: torch.dtype) -> State:
    """(-inf, 0, 0) for rows (B, Hkv, T G, D); with a sink its base and weight."""
    lead, output = sizes[:3], np.zeros(sizes, np.float32)
    if rule.sinks is None:
        return State(np.full(lead, -INFINITY), np.zeros(lead, np.float32), output)
    sinks = rule.sinks.float().reshape(1, -1, 1, G).expand(sizes[0], -1, T, -1).reshape(lead).numpy()
    top = np.ceil(sinks * LOG2_E)
    return State(top, elementary_bits.exp2(_raised(sinks, LOG2_E, top)) * FACTOR[dtype], output)


def _chunk(rows: Wide, keys: Wide, values: Wide, visible: Seen, scale: float, dtype: torch.dtype) -> State:
    """Of up to CHUNK keys (.., D) alone; values (.., CHUNK, D), rows (.., R, D), visible (.., R, CHUNK)."""
    name, count = ACTIVATIONS[dtype], keys.shape[-2]
    products = tensor_core.mma(np.zeros((*visible.shape[:-1], count)), rows, keys, name).astype(np.float32)
    s = np.full(visible.shape, -INFINITY)
    s[..., :count] = np.where(visible[..., :count], -products if scale < 0 else products, -INFINITY)
    factor = max(np.abs(np.float32(scale)) * LOG2_E, np.float32(2.0**-149))
    top = np.ceil(s.max(-1) * factor)
    p = np.where(visible, _weight(_raised(s, factor, top[..., None]), dtype), ZERO)
    weights = torch.from_numpy(p).to(dtype).double().numpy()
    special = ~np.isfinite(values)
    columns = np.where(special, 0.0, values).swapaxes(-1, -2)
    output = tensor_core.mma(np.zeros(rows.shape), weights, columns, name).astype(np.float32)
    one = np.ones((*columns.shape[:-2], 1, columns.shape[-1]))
    total = tensor_core.mma(np.zeros((*rows.shape[:-1], 1)), weights, one, name).astype(np.float32)[..., 0]
    p, narrow = weights.astype(np.float32), values.astype(np.float32)
    for n in np.flatnonzero(special.any((0, 1, 3))):
        added = output + p[..., n, None] * narrow[..., n, None, :]
        output = np.where(special[..., n, None, :] & visible[..., n, None], added, output)
    return State(top, total, output)


def _raised(s: Array, factor: np.float32, top: Array) -> Array:
    """S factor - top, rounded once, to a multiple of 2^-12 where that matters.

    Where top is so large that the product is a whole number, the product is rounded first.
    """
    base = np.broadcast_to(_base(top), s.shape)
    whole = s * factor - base + GRID
    return np.where(np.abs(base) >= WHOLE, whole, fma(s, factor, GRID - base)) - GRID


def _weight(z: Array, dtype: torch.dtype) -> Array:
    """2^z, 0 where that is subnormal, times the factor of dtype."""
    return _power(z) * FACTOR[dtype]


def _power(z: Array) -> Array:
    """2^z, 0 where that is subnormal."""
    return np.where(z < -126, ZERO, elementary_bits.exp2(np.maximum(z, np.float32(-127))))


def _joined(before: State, chunk: State) -> State:
    """Both scaled to the larger base, one of them by 1, and added."""
    top = np.maximum(before.top, chunk.top)
    kept, joined = (_power(part.top - _base(top)) for part in (before, chunk))
    total = fma(chunk.total, joined, before.total * kept)
    return State(top, total, fma(chunk.output, joined[..., None], before.output * kept[..., None]))


def _chosen(touched: Seen, new: State, old: State) -> State:
    """The old state for rows that see nothing of a chunk."""
    top, total = (np.where(touched, *pair) for pair in zip(new[:2], old[:2], strict=True))
    return State(top, total, np.where(touched[..., None], new.output, old.output))


def _base(m: Array) -> Array:
    """What exponentials are taken relative to: 0 in place of -inf, so that a row of weights 0 is not NaN."""
    return np.where(np.isneginf(m), ZERO, m)
