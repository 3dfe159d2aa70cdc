"""The KV cache: contiguous or in pages, in 16 bits or in MXFP4.

Rows lie along D: a contiguous cache is (B, Hkv, S, D), a paged one (P, Hkv, page, D) with a table (B, pages) int32 of
the page that holds a sequence's positions n page .. n page + page - 1. MXFP4 rows are codes (.., Dp/2) and scales
(.., Dp/32) uint8, Dp = D rounded up to 32, 4.25 bits an element where D is a multiple of 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mxharness.device import Device
from mxharness.errors import UserError
from mxharness.functional.common import ACTIVATIONS, check_tensor, check_tensors, device_of, integer
from mxharness.functional.rope import HEAD_DIMS, LANES, Rope, check_heads, check_rope, check_starts
from mxharness.mxfp4 import BLOCK

STORAGE = {"bf16": torch.bfloat16, "fp16": torch.float16, "mxfp4": torch.uint8}
"""What a cache can hold, and the dtype of its tensors."""


@dataclass(frozen=True)
class KVCache:
    """Keys and values of B sequences; `kv_cache` makes one, zeroed. The tensors are written in place."""

    k: torch.Tensor
    """(B, Hkv, S, D), or (P, Hkv, page, D), of the activations' dtype; MXFP4: codes, the last axis Dp/2 bytes."""
    v: torch.Tensor
    k_scales: torch.Tensor | None
    """(.., Dp/32) uint8 where the cache is MXFP4."""
    v_scales: torch.Tensor | None
    table: torch.Tensor | None
    """(B, pages) int32 where the cache is paged; entries of positions not yet in use may be anything."""
    batch: int
    length: int
    """Positions a sequence has room for."""
    head_dim: int
    dtype: torch.dtype
    """Of the activations: bfloat16 or float16."""

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return self.k.shape[1]

    @property
    def page(self) -> int:
        """Positions a page holds; those of a sequence where the cache is contiguous."""
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and their scales; the table is not counted."""
        return sum(x.nbytes for x in (self.k, self.v, self.k_scales, self.v_scales) if x is not None)

    @property
    def kernel(self) -> str:
        """What kernels call this storage."""
        return ("mxfp4_" if self.k_scales is not None else "") + ACTIVATIONS[self.dtype]

    @property
    def columns(self) -> int:
        """Of the table."""
        return 1 if self.table is None else self.table.shape[1]


def kv_cache(
    batch: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    dtype: str = "bf16",
    *,
    activations: torch.dtype | None = None,
    page: int | None = None,
    pages: int | None = None,
    table: torch.Tensor | None = None,
    device: Device | None = None,
) -> KVCache:
    """A zeroed cache for `batch` sequences of up to `length` positions; dtype "bf16", "fp16" or "mxfp4".

    activations: what an MXFP4 cache is read and written as (bfloat16 by default). page: positions a page holds, None
    for a contiguous cache. table (B, ceil(length / page)) int32 gives sequences their pages; by default they follow one
    another. pages: in all, by default as many as the table names. device: the host device by default.

    Raises UserError for sizes below 1, a head_dim or dtype that does not exist, and a table that does not fit.
    """
    device = device_of(torch.empty(0), device)
    batch, kv_heads, length = integer(batch, "batch"), integer(kv_heads, "kv_heads"), integer(length, "length")
    head_dim = integer(head_dim, "head_dim")
    page, pages = (None if n is None else integer(n, "a number of pages or their size") for n in (page, pages))
    if min(batch, kv_heads, length, *(n for n in (page, pages) if n is not None)) < 1 or head_dim not in HEAD_DIMS:
        raise UserError(
            f"a cache takes sizes of at least 1 and a head_dim of {', '.join(map(str, HEAD_DIMS))}, not batch {batch}, "
            f"kv_heads {kv_heads}, length {length}, head_dim {head_dim}, page {page}, pages {pages}"
        )
    if dtype not in tuple(STORAGE):
        raise UserError(f"no cache of dtype '{dtype}'; there are {', '.join(STORAGE)}")
    wide = activations or (torch.bfloat16 if dtype == "mxfp4" else STORAGE[dtype])
    if wide not in ACTIVATIONS or dtype not in ("mxfp4", ACTIVATIONS[wide]):
        raise UserError(f"a cache of dtype '{dtype}' cannot be for activations of {wide}")
    lead = (batch, kv_heads, length)
    if page is not None:
        columns = -(-length // page)
        if table is None:
            count = batch * columns
            table = torch.arange(count, dtype=torch.int32).reshape(batch, columns).to(device.torch_device)
        check_tensor(table, "the table")
        if table.dtype != torch.int32 or tuple(table.shape) != (batch, columns):
            raise UserError(f"the table must be int32 ({batch}, {columns}), not {table.dtype} {tuple(table.shape)}")
        check_tensors(device, table=table)
        lead = (max(int(table.max()) + 1, 1) if pages is None else pages, kv_heads, page)
    elif table is not None or pages is not None:
        raise UserError("a table and a number of pages need the size of a page")
    blocks = -(-head_dim // BLOCK)
    row = blocks * 16 if dtype == "mxfp4" else head_dim
    k, v = (device.empty((*lead, row), STORAGE[dtype]).zero_() for _ in range(2))
    scales = [device.empty((*lead, blocks), torch.uint8).zero_() if dtype == "mxfp4" else None for _ in range(2)]
    return KVCache(k, v, scales[0], scales[1], table, batch, length, head_dim, wide)


def kv_cache_append(
    cache: KVCache,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    *,
    rope: Rope | None = None,
    validate: bool = True,
    device: Device | None = None,
) -> None:
    """Store k and v (B, T, Hkv, D): token t of sequence b at position positions[b] + t; keys rotated first if `rope`.

    Keys are rotated in float32, rounded to their dtype and then stored or quantised (floor rule, ties to even); a block
    that holds NaN or Inf is stored as NaN. positions (B) int32. k and v may be views of a fused projection.

    Raises UserError, and writes nothing, for other shapes or dtypes than the cache's, positions or pages outside it,
    and for two sequences that would write the same page. Looking at positions and pages waits for a GPU;
    validate=False leaves it out (graph capture), and then the caller answers for them: the kernel writes where they
    say.
    """
    device = device_of(k, device, "k")
    check_layout(device, cache)
    strides = check_heads(device, k, "k"), check_heads(device, v, "v")
    want = (cache.batch, k.shape[1], cache.kv_heads, cache.head_dim)
    for name, x in (("k", k), ("v", v)):
        if tuple(x.shape) != want or x.dtype != cache.dtype:
            raise UserError(f"{name} must be {cache.dtype} {want} for this cache, not {x.dtype} {tuple(x.shape)}")
    B, T, H, D = want
    check_starts(device, positions, B, "positions", validate=validate)
    if validate:
        check_cache(device, cache, positions + T)
        _check_written(cache, positions, T)
    order = check_rope(device, rope, D, int(positions.max()) + T if validate else 0) if rope is not None else 0
    threads = B * T * H * -(-D // BLOCK) * LANES
    device.launch(
        "kv_cache.cu", f"kv_append_{cache.kernel}", (-(-threads // 128), 2), (128,),
        cache.k, cache.v, cache.k_scales, cache.v_scales, k, v, *strides, cache.table,
        rope.table if rope is not None else None, positions, B, T, H, D, order, cache.page, cache.columns,
    )  # fmt: skip


def kv_cache_read(
    cache: KVCache, length: int | None = None, *, device: Device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and v (B, Hkv, length, D) of the activations' dtype: positions 0 .. length - 1, all by default, decoded.

    Raises UserError for a length outside the cache and for pages that do not exist.
    """
    device = device_of(cache.k if isinstance(cache, KVCache) else torch.empty(0), device, "k")
    check_layout(device, cache)
    length = cache.length if length is None else integer(length, "length")
    if not 1 <= length <= cache.length:
        raise UserError(f"a length must be at least 1 and the cache has room for {cache.length}, not {length}")
    B, H, D = cache.batch, cache.kv_heads, cache.head_dim
    check_cache(device, cache, torch.full((B,), length, dtype=torch.int32, device=cache.k.device))
    both = []
    for x, scales in ((cache.k, cache.k_scales), (cache.v, cache.v_scales)):
        y = device.empty((B, H, length, D), cache.dtype)
        threads = B * length * H * -(-D // BLOCK) * LANES
        device.launch(
            "kv_cache.cu", f"kv_read_{cache.kernel}", (-(-threads // 128),), (128,),
            y, x, scales, cache.table, B, length, H, D, cache.page, cache.columns,
        )  # fmt: skip
        both.append(y)
    return both[0], both[1]


def check_cache(device: Device, cache: KVCache, ends: torch.Tensor) -> None:
    """UserError unless sequence b has room for ends[b] positions, in pages that exist."""
    check_layout(device, cache)
    if int(ends.max()) > cache.length:
        raise UserError(f"the cache has room for {cache.length} positions, {int(ends.max())} are needed")
    if cache.table is not None:
        used = torch.arange(cache.columns, device=ends.device) * cache.page < ends[:, None]
        pages = cache.table[used]
        if pages.numel() and (int(pages.min()) < 0 or int(pages.max()) >= cache.k.shape[0]):
            wrong = int(pages.min()) if int(pages.min()) < 0 else int(pages.max())
            raise UserError(f"the table names page {wrong}; the cache has the pages 0 to {cache.k.shape[0] - 1}")


def check_layout(device: Device, cache: KVCache) -> None:
    """UserError unless the tensors of a cache are those that `kv_cache` would make for its sizes."""
    if not isinstance(cache, KVCache):
        raise UserError(f"cache must be what kv_cache() gives, not {type(cache).__name__}")
    if not all(isinstance(size, int) for size in (cache.batch, cache.length, cache.head_dim)):
        raise UserError("a cache's batch, length and head_dim are integers; kv_cache() makes one that fits")
    check_tensors(
        device, k=cache.k, v=cache.v, table=cache.table, scales_of_k=cache.k_scales, scales_of_v=cache.v_scales
    )
    if cache.k is None or cache.k.ndim != 4:
        raise UserError("the cache's k must have 4 dimensions; kv_cache() makes one that fits")
    packed = cache.k_scales is not None
    blocks = -(-cache.head_dim // BLOCK)
    lead = tuple(cache.k.shape[:-1])
    wanted = [
        ("k", cache.k, (*lead, blocks * 16 if packed else cache.head_dim), torch.uint8 if packed else cache.dtype),
        ("v", cache.v, tuple(cache.k.shape), cache.k.dtype),
        ("scales of k", cache.k_scales, (*lead, blocks), torch.uint8),
        ("scales of v", cache.v_scales, (*lead, blocks), torch.uint8),
    ]
    for name, tensor, shape, dtype in wanted:
        if not packed and name.startswith("scales"):
            if tensor is not None:
                raise UserError(f"the cache has {name}, but its keys have none; kv_cache() makes one that fits")
            continue
        if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            found = "None" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise UserError(f"the cache's {name} must be {dtype} {shape}, not {found}; kv_cache() makes one that fits")
    table = cache.table
    if table is None:
        fits = (lead[0], lead[2]) == (cache.batch, cache.length)
    else:
        fits = table.dtype == torch.int32 and tuple(table.shape) == (cache.batch, -(-cache.length // cache.page))
    if not fits:
        raise UserError(
            f"a cache of {lead} rows with table {None if table is None else tuple(table.shape)} does not hold "
            f"{cache.batch} sequences of {cache.length} positions; kv_cache() makes one that fits"
        )


def _check_written(cache: KVCache, positions: torch.Tensor, T: int) -> None:
    """UserError where two places of the table that are about to be written are the same page."""
    if cache.table is None:
        return
    first = torch.arange(cache.columns, device=positions.device) * cache.page
    written = (first < positions[:, None] + T) & (first + cache.page > positions[:, None])
    pages = cache.table[written]
    if len(set(pages.tolist())) < pages.numel():
        raise UserError("two places of the table that would be written are the same page")
