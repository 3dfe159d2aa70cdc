"""The bits of attention's core in numpy: the order that kernels/attention.cu declares, without the kernel's schedule.

Here are no blocks, warps or lanes: for every row of queries the keys are taken in chunks of 64 at absolute positions.
q k^T and p v are chains of the modelled tensor core (tensor_core.py), e^x is elementary_bits.exp, and every other
operation is one of float32. Values that are NaN or Inf stay out of the chain over a chunk and are added, times their
weight, in ascending order to the rows that see them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mxharness import tensor_core
from mxharness.float32 import Array, Wide
from mxharness.functional import ACTIVATIONS
from mxharness.ops import elementary_bits
from mxharness.ops.attention_reference import CHUNK, Rule

Seen = npt.NDArray[np.bool_]
ZERO, INFINITY = np.float32(0), np.float32(np.inf)


class State(NamedTuple):
    """Of rows (.., R) after some keys."""

    top: Array
    """(.., R): m, the largest score."""
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
        state = _start(rule, B, T, G, (B, Hkv, T * G, D))
        for first in range(0, S, CHUNK):
            here = slice(first, first + CHUNK)
            touched = np.logical_or.reduce(visible[..., here], -1)
            if touched.any():
                chunk = _chunk(rows, keys[..., here, :], values[..., here, :], visible[..., here], rule.scale, dtype)
                state = _chosen(touched, _joined(state, chunk), state)
        y = state.output / state.total[..., None]
    if rule.sinks is None:
        y = np.where(visible.any(-1, keepdims=True), y, ZERO)
    heads = torch.from_numpy(y).reshape(B, Hkv, T, G, D).permute(0, 2, 1, 3, 4)
    return heads.reshape(B, T, H, D).to(dtype)


def _start(rule: Rule, B: int, T: int, G: int, sizes: tuple[int, ...]) -> State:
    """(-inf, 0, 0) for rows (B, Hkv, T G, D); with a sink (sink, 1, 0)."""
    lead, output = sizes[:3], np.zeros(sizes, np.float32)
    if rule.sinks is None:
        return State(np.full(lead, -INFINITY), np.zeros(lead, np.float32), output)
    sinks = rule.sinks.float().reshape(1, -1, 1, G).expand(B, -1, T, -1).reshape(lead)
    return State(sinks.numpy(), np.ones(lead, np.float32), output)


def _chunk(rows: Wide, keys: Wide, values: Wide, visible: Seen, scale: float, dtype: torch.dtype) -> State:
    """Of up to 64 keys (.., D) alone; values (.., 64, D), rows (.., R, D), visible (.., R, 64)."""
    name, count = ACTIVATIONS[dtype], keys.shape[-2]
    products = tensor_core.mma(np.zeros((*visible.shape[:-1], count)), rows, keys, name).astype(np.float32)
    s = np.full(visible.shape, -INFINITY)
    s[..., :count] = np.where(visible[..., :count], products * np.float32(scale), -INFINITY)
    top = s.max(-1)
    p = np.where(visible, elementary_bits.exp(s - _base(top)[..., None]), ZERO)
    weights = torch.from_numpy(p).to(dtype).double().numpy()
    special = ~np.isfinite(values)
    columns = np.where(special, 0.0, values).swapaxes(-1, -2)
    output = tensor_core.mma(np.zeros(rows.shape), weights, columns, name).astype(np.float32)
    p, narrow = weights.astype(np.float32), values.astype(np.float32)
    for n in np.flatnonzero(special.any((0, 1, 3))):
        added = output + p[..., n, None] * narrow[..., n, None, :]
        output = np.where(special[..., n, None, :] & visible[..., n, None], added, output)
    return State(top, _sum(p), output)


def _sum(p: Array) -> Array:
    """Over 64 keys 16 w + 8 j + 2 t + i: over i, then j, then t in pairs at distance 2 and 1, then w ascending."""
    each = p.reshape(*p.shape[:-1], 4, 2, 4, 2)
    pairs: Array = each[..., 0] + each[..., 1]
    quarters: Array = pairs[..., 0, :] + pairs[..., 1, :]
    halves: Array = quarters[..., :2] + quarters[..., 2:]
    sixteen: Array = halves[..., 0] + halves[..., 1]
    total: Array = ((sixteen[..., 0] + sixteen[..., 1]) + sixteen[..., 2]) + sixteen[..., 3]
    return total


def _joined(before: State, chunk: State) -> State:
    """Both scaled to the larger maximum and added."""
    top = np.maximum(before.top, chunk.top)
    kept, joined = (elementary_bits.exp(part.top - _base(top)) for part in (before, chunk))
    total = before.total * kept + chunk.total * joined
    return State(top, total, before.output * kept[..., None] + chunk.output * joined[..., None])


def _chosen(touched: Seen, new: State, old: State) -> State:
    """The old state for rows that see nothing of a chunk."""
    top, total = (np.where(touched, *pair) for pair in zip(new[:2], old[:2], strict=True))
    return State(top, total, np.where(touched[..., None], new.output, old.output))


def _base(m: Array) -> Array:
    """What exponentials are taken relative to: 0 in place of -inf, so that a row of weights 0 is not NaN."""
    return np.where(np.isneginf(m), ZERO, m)
