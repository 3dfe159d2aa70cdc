"""What the place of an element means: tables of integers that the operators name and pattern.py draws rules from.

The alphabet of names: row, feature, K, lane, tile, head, KV head, dimension, sequence, position, expert, slot, token.
"""

from __future__ import annotations

import torch

from mxharness.mxfp4 import BLOCK
from mxharness.op import Tensors
from mxharness.pattern import Places, along


def lane(rows: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """The lane of a warp that holds a result of m16n8k16: weights are its 16 rows, tokens its 8 columns (mma.cuh)."""
    return 4 * (features % 8) + rows % 8 // 2


def product(y: torch.Tensor, *names: str) -> Places:
    """Of a contraction's result (.., N), `names` for the axes before N: with its feature and its lane."""
    rows = torch.arange(y.shape[-2]).unsqueeze(-1) if y.ndim > 1 else torch.zeros(1, dtype=torch.long)
    return {**along(y.shape, *names, "feature"), "lane": lane(rows, torch.arange(y.shape[-1]))}


def decoded(y: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, *names: str) -> Places:
    """Of decoded values (.., K), names for the axes before K; of codes 0 to 15 (.., Kp), scales (.., Kp / 32)."""
    K = y.shape[-1]
    k = torch.arange(K).expand(*([1] * (y.ndim - 1)), -1)
    return {
        **along(y.shape, *names, "k"),
        "scale index": k // BLOCK,
        "place in its block": k % BLOCK,
        "code": codes.long()[..., :K],
        "magnitude code": codes.long()[..., :K] % 8,
        "scale byte": scales.long().repeat_interleave(BLOCK, -1)[..., :K],
    }


def vocabulary(tensors: Tensors, V: int) -> dict[str, Places]:
    """Of logits and probabilities (M, V): row and token, which is their feature; of ids (M): row."""
    wide = {name: x for name, x in tensors.items() if x.shape[-1:] == (V,) and x.ndim == 2 and x.is_floating_point()}
    ids = {name: x for name, x in tensors.items() if x.ndim == 1}
    return {name: product(x, "row") for name, x in wide.items()} | {
        name: along(x.shape, "row") for name, x in ids.items()
    }


def heads(y: torch.Tensor, Hkv: int, first: torch.Tensor) -> Places:
    """Of rows (B, T, H, D): head, KV head, place among the heads that share one, dimension, position from first (B)."""
    _, T, H, _ = y.shape
    group = max(H // Hkv, 1)
    head = torch.arange(H).reshape(1, 1, -1, 1)
    position = (first.long()[:, None] + torch.arange(T))[:, :, None, None]
    shared = {"KV head": head // group, "head of its group": head % group} if group > 1 else {}
    return {**shared, **along(y.shape, "sequence", "token", "head", "dimension"), "position": position}


def cache(y: torch.Tensor, last: str, page: int | None, starts: torch.Tensor | None = None, T: int = 0) -> Places:
    """Of a cache (B, Hkv, S, ..): position, page, place in the page, and which of the T tokens from `starts` it is."""
    position = torch.arange(y.shape[2]).reshape(1, 1, -1, 1)
    found = dict(along(y.shape, "sequence", "KV head", "position", last))
    if page:
        found |= {"page": position // page, "place in its page": position % page}
    if starts is not None:
        token = position - starts.long().reshape(-1, 1, 1, 1)
        found["token"] = torch.where((token >= 0) & (token < T), token, -1)
    return found
