"""Tensors of more than 2^31 elements, of which only the rows that are used take memory: nothing wraps around."""

from __future__ import annotations

import pytest
import torch
from mxharness import functional, mxfp4
from mxharness.device.guard import allocate
from mxharness.functional.kv_cache import KVCache

FAR = 2**31


def sparse(shape, dtype=torch.uint8):
    """Zeros that take no memory before they are written."""
    count = torch.Size(shape).numel() * dtype.itemsize
    guarded = allocate(count)
    return guarded.whole[guarded.start : guarded.start + count].view(dtype).view(shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_embedding_rows_past_2_31_bytes(dtype):
    K, V = 2880, 2**21 + 5
    near = mxfp4.quantize(torch.randn(7, K))
    far = mxfp4.Quantized(sparse((V, K // 2)), sparse((V, K // 32)))
    assert far.codes.numel() > FAR
    for part, whole in zip(near, far, strict=True):
        whole[-7:] = part
    ids = torch.arange(7, dtype=torch.int32)
    found = functional.embedding_lookup(ids + V - 7, far, dtype=dtype)
    assert torch.equal(found, functional.embedding_lookup(ids, near, dtype=dtype))
    assert found.any()


def test_dense_embedding_rows_past_2_31_elements():
    K, V = 2880, 2**20
    near = torch.randn(7, K).to(torch.bfloat16)
    far = sparse((V, K), torch.bfloat16)
    assert far.numel() > FAR
    far[-7:] = near
    cache = functional.EmbeddingCache((V, K), far)
    assert torch.equal(functional.embedding_lookup_cached(torch.arange(V - 7, V), cache), near)


@pytest.mark.parametrize("dtype", ["bf16", "mxfp4"])
def test_pages_of_a_cache_past_2_31_elements(dtype):
    heads, page, D = 2, 16, 128
    pages = FAR // (heads * page * D) * (4 if dtype == "mxfp4" else 1) + 9
    table = torch.tensor([[1, 0, 2]], dtype=torch.int32)
    near = functional.kv_cache(1, heads, 40, D, dtype, page=page, table=table)
    k = None if near.k_scales is None else sparse((pages, heads, page, D // 32))
    v = None if near.v_scales is None else sparse((pages, heads, page, D // 32))
    row, storage = near.k.shape[-1], near.k.dtype
    places = [sparse((pages, heads, page, row), storage) for _ in range(2)]
    assert places[0].numel() > FAR
    far = KVCache(*places, k, v, table + pages - 3, 1, 40, D, near.dtype)
    new = [torch.randn(1, 40, heads, D).to(near.dtype) for _ in range(2)]
    start = torch.zeros(1, dtype=torch.int32)
    for cache in (near, far):
        functional.kv_cache_append(cache, *new, start)
    assert far.k[-3:].any()
    read = [functional.kv_cache_read(cache) for cache in (near, far)]
    assert all(torch.equal(one, other) for one, other in zip(*read, strict=True))
    q = torch.randn(1, 3, 4, D).to(near.dtype)
    lengths = torch.tensor([40], dtype=torch.int32)
    one, other = (functional.attention(q, cache, lengths) for cache in (near, far))
    assert torch.equal(one, other)
    assert one.any()
