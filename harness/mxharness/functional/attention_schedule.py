"""Which kernels compute attention, by the shape of the call and the device; all have the same bits.

few    tiles of 16 rows: decoding, and prefill so short that larger tiles would leave most of a GPU idle. Where there
       are too few tiles to fill it the keys of a tile are split over blocks, whose chunks a second kernel joins in
       ascending order.
many   tiles of 64 rows: prefill.
wide   tiles of 128 or 192 rows, with Hopper's warpgroup products: prefill over 16-bit caches with heads of 64 or 128.
A row is one query of one head; those of all heads that read the same keys, T H / Hkv, share tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from mxharness.device import Device
from mxharness.functional.common import ACTIVATIONS
from mxharness.functional.dispatch import WGMMA
from mxharness.functional.kv_cache import KVCache

CHUNK = 128
"""Keys whose weights are relative to one maximum."""
FEW_TILE, MANY_TILE, GROUP_TILE = 16, 64, 64
"""Rows that a block owns; of wide ones, each of their warpgroups."""
THREADS = 128
"""Of a block; of wide ones, of a warpgroup."""
WIDE_GROUPS = {64: 3, 128: 2}
"""Warpgroups of a block of wide ones that multiply, by the size of a head; one more brings what they do."""
WIDE_BLOCKS, MOST_TILES = 132, 256
"""Blocks that share the tiles of wide ones, one for each of an H100's multiprocessors; tiles that a block may take."""
MOST_CACHED, FEW_CACHED = 40 << 20, 24 << 20
"""Bytes of keys and values that an H100's second-level cache holds, and with room to spare."""
WIDE_TOKENS = {64: 192, 128: 129}
"""Queries of a sequence from which on wide tiles are faster however few they are, by the size of a head."""
ROOM = 132
"""So many tiles of few or many rows are better than wide ones, which would be too few; over one chunk twice as many."""
LONG = 256
"""Positions from which on up to a tile of many is better split: the keys are then what takes time."""
SPLIT_BLOCKS = {64: 264, 128: 132}
"""Blocks that keys of 16 bits are split into, by the largest size of a head, the same on every device."""
SPLIT_CODES = 528
"""The same for codes, which take longer to decode than to read."""
WHOLE_TILES = 112
"""Tiles whose blocks keep the memory busy: keys of 16 bits are not split from there on."""


@dataclass(frozen=True)
class Schedule:
    """How one call is computed."""

    kernel: str
    """"few", "many" or "wide"."""
    tiles: int
    """Of rows, for each KV head of each sequence."""
    splits: int = 1
    """Blocks that share the keys of a tile; 1: no second kernel."""
    slots: int = 0
    """Places for a row's chunks where keys are split."""


def schedule(q: torch.Tensor, cache: KVCache, window: int | None, device_class: str) -> Schedule:
    """Of queries q (B, T, H, D) over the cache. What lies in the cache does not matter, only how much may."""
    B, T, H, D = q.shape
    rows, positions = T * (H // cache.kv_heads), cache.page * cache.columns
    kernel = kernel_of(q, cache, device_class)
    if kernel != "few":
        return Schedule(kernel, -(-rows // (MANY_TILE if kernel == "many" else WIDE_GROUPS[D] * GROUP_TILE)))
    tiles, chunks = -(-rows // FEW_TILE), -(-positions // CHUNK)
    if window is not None:
        chunks = min(chunks, (window + T) // CHUNK + 2)  # begun and ended anywhere
    everywhere = B * cache.kv_heads * tiles
    if cache.k_scales is not None:
        blocks = SPLIT_CODES
    else:
        blocks = SPLIT_BLOCKS[64 if D <= 64 else 128] if everywhere < WHOLE_TILES else 0
    splits = min(chunks, blocks // everywhere)
    return Schedule("few", tiles, splits, chunks) if chunks > 2 and splits > 1 else Schedule("few", tiles)


def kernel_of(q: torch.Tensor, cache: KVCache, device_class: str) -> str:
    """Few, many or wide, for queries q (B, T, H, D): by rows and sizes, then by how many tiles the whole call has."""
    B, T, H, D = q.shape
    rows, positions = T * (H // cache.kv_heads), cache.page * cache.columns
    if device_class not in WGMMA or cache.k_scales is not None or D not in WIDE_GROUPS:
        return "many" if rows > MANY_TILE or (rows > FEW_TILE and positions <= LONG) else "few"
    if rows <= FEW_TILE:
        return "few"
    if WIDE_TOKENS[D] <= T:
        return "wide"
    few, many = (B * cache.kv_heads * -(-rows // tile) for tile in (FEW_TILE, MANY_TILE))
    room = ROOM if positions > CHUNK else 2 * ROOM
    if few <= (2 * ROOM if D == 64 else room):
        return "few"
    return "many" if D == 64 and (rows <= MANY_TILE or many <= room) else "wide"


def wide_blocks(tiles: int) -> int:
    """How many blocks share so many tiles of the wide kernels."""
    return min(tiles, max(WIDE_BLOCKS, -(-tiles // MOST_TILES)))


@lru_cache(maxsize=256)
def heads_at_once(heads: int, tiles: int, bytes_each: int) -> int:
    """How many KV heads of so many tiles, of so many bytes of keys and values, the wide kernels go through together.

    All, if an H100's second-level cache holds them; else as many as it holds with room to spare or fewer, so that the
    block with most to do has least, a tile's keys taken to be as many as its place among its head's.
    """
    if heads * bytes_each <= MOST_CACHED:
        return heads
    blocks, most = wide_blocks(tiles * heads), max(1, FEW_CACHED // bytes_each)

    def longest(together: int) -> int:
        sizes = [np.repeat(np.arange(tiles, 0, -1), min(together, heads - n)) for n in range(0, heads, together)]
        rounds = np.resize(np.concatenate([*sizes, np.zeros(2 * blocks, int)]), (-(-tiles * heads // blocks), blocks))
        rounds[1::2] = rounds[1::2, ::-1].copy()
        return int(rounds.sum(0).max())

    return min(range(-(-most // 2), most + 1), key=lambda together: (longest(together), -together))


def table(device_class: str) -> list[tuple[str, str, str]]:
    """For people: caches, rows of a KV head, tiles of a call or queries of a sequence, and kernels, on such a device.

    Of what has ROOM tiles there may be twice as many over one chunk of keys. Without warpgroup products it hangs on the
    cache's length, too, between a tile of few and one of many.
    """
    few, many = f"1 to {MANY_TILE} rows", f"{FEW_TILE + 1} rows and more"
    if device_class not in WGMMA:
        return [("all", few, "attention_few"), ("all", many, "attention_many")]
    small, large = "16 bit, heads of 64", "16 bit, heads of 128"
    return [
        (small, f"from {WIDE_TOKENS[64]} queries on", "attention_wide"),
        (small, f"else up to {FEW_TILE} rows or {2 * ROOM} tiles of {FEW_TILE}", "attention_few"),
        (small, f"else up to {MANY_TILE} rows or {ROOM} tiles of {MANY_TILE}", "attention_many"),
        (small, "else", "attention_wide"),
        (large, f"from {WIDE_TOKENS[128]} queries on", "attention_wide"),
        (large, f"else up to {FEW_TILE} rows or {ROOM} tiles of {FEW_TILE}", "attention_few"),
        (large, "else", "attention_wide"),
        ("others", few, "attention_few"),
        ("others", many, "attention_many"),
    ]


def launch(
    device: Device,
    how: Schedule,
    y: torch.Tensor,
    q: torch.Tensor,
    q_stride: int,
    cache: KVCache,
    lengths: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    *,
    causal: bool,
    window: int | None,
) -> None:
    """Enqueue the kernels that write y; everything has been checked. q_stride: elements from a token to the next."""
    B, T, H, D = q.shape
    arguments = (
        y, q, cache.k, cache.v, cache.k_scales, cache.v_scales, cache.table, lengths, sinks, T, H, cache.kv_heads, D,
        q_stride, cache.page, cache.columns, scale, int(bool(causal)), window or 0,
    )  # fmt: skip
    name, grid = f"{how.kernel}{64 if D <= 64 else 128}_{cache.kernel}", (how.tiles * how.splits, cache.kv_heads, B)
    if how.kernel == "wide":
        threads = THREADS * (WIDE_GROUPS[D] + 1)
        blocks = wide_blocks(how.tiles * cache.kv_heads * B)
        together = heads_at_once(cache.kv_heads * B, how.tiles, 4 * T * D)
        device.launch("attention_wide.cu", f"attention_{name}", (blocks,), (threads,), *arguments, B, together)
        return
    if how.kernel == "many":
        device.launch("attention_many.cu", f"attention_{name}", grid, (THREADS,), *arguments)
        return
    rows = B * T * H
    parts = device.empty((rows * how.slots * (D + 2),), torch.float32) if how.splits > 1 else None
    split = (parts, rows, how.slots, how.splits)
    device.launch("attention.cu", f"attention_{name}", grid, (THREADS,), *arguments, *split)
    if parts is not None:
        kernel = f"attention_join_{ACTIVATIONS[q.dtype]}"
        device.launch("attention.cu", kernel, (rows,), (-(-D // 32) * 32,), *arguments, *split)
