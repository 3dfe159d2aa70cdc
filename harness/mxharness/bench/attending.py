"""Attention over a KV cache, and the cache itself, against torch's scaled_dot_product_attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from mxharness import functional, mxfp4
from mxharness.bench.work import DTYPES, Rival, Work, activations, generator
from mxharness.device import Device
from mxharness.functional.kv_cache import KVCache
from mxharness.timing import copies_for

SDPA = "torch SDPA"
_QUERIES, _HEADS = 4, 4
"""The last queries of so many heads are held against their float64 reference."""


def attention_prefill(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """T causal queries of one sequence over its own T keys."""
    H, Hkv, D = shape
    return _attention(device, (H, Hkv, D, rows), batch=1, queries=rows, dtype=dtype, packed=False)


def attention_prefill_batch(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """T causal queries of each of B sequences over their own T keys."""
    B, H, Hkv, D = shape
    return _attention(device, (H, Hkv, D, rows), batch=B, queries=rows, dtype=dtype, packed=False)


def attention_decode(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """One query of each of B sequences over S keys in 16 bits."""
    return _attention(device, shape, batch=rows, queries=1, dtype=dtype, packed=False)


def attention_decode_mxfp4(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """One query of each of B sequences over S keys in MXFP4; torch reads them in 16 bits."""
    return _attention(device, shape, batch=rows, queries=1, dtype=dtype, packed=True)


def kv_append(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """One token of each of B sequences into a cache in 16 bits."""
    return _append(device, shape, rows, dtype, packed=False)


def kv_append_mxfp4(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """One token of each of B sequences into an MXFP4 cache."""
    return _append(device, shape, rows, dtype, packed=True)


def _attention(device: Device, shape: tuple[int, ...], *, batch: int, queries: int, dtype: str, packed: bool) -> Work:
    (H, Hkv, D, S), kind = shape, DTYPES[dtype]
    caches = _filled(device, batch, (Hkv, S, D), dtype, packed=packed)
    one = caches[0].nbytes
    pairs = [_pair(cache, kind) for cache in caches[: copies_for(4 * batch * Hkv * S * D)]]
    qs = activations(device, len(caches), (batch, queries, H, D), kind)
    lengths = torch.full((batch,), S, dtype=torch.int32, device=device.torch_device)
    single = _first(caches[0])

    def call(i: int) -> torch.Tensor:
        return functional.attention(qs[i % len(qs)], caches[i % len(caches)], lengths, validate=False, device=device)

    def torch_call(i: int) -> torch.Tensor:
        k, v = pairs[i % len(pairs)]
        q = qs[i % len(pairs)].transpose(1, 2)
        y = scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=Hkv != H)
        return y.transpose(1, 2)

    return Work(
        call=call,
        copies=len(caches),
        nbytes=one + 4 * batch * queries * H * D,
        flops=int(4 * batch * H * D * (queries * (S - queries) + queries * (queries + 1) / 2)),
        golden=_golden(qs[0], pairs[0], H // Hkv),
        part=lambda y: y[0, -_QUERIES:, :_HEADS],
        row=lambda y: y[:1, -1:],
        alone=lambda: functional.attention(qs[0][:1, -1:].contiguous(), single, lengths[:1], device=device),
        rivals={SDPA: Rival(torch_call, len(pairs))},
        reference=SDPA,
    )


def _append(device: Device, shape: tuple[int, ...], batch: int, dtype: str, *, packed: bool) -> Work:
    (Hkv, D, S), kind = shape, DTYPES[dtype]
    cache = functional.kv_cache(batch, Hkv, S, D, "mxfp4" if packed else dtype, activations=kind, device=device)
    row = cache.nbytes // S
    copies = min(copies_for(row + 4 * batch * Hkv * D), S)
    ks, vs = (activations(device, copies, (batch, 1, Hkv, D), kind) for _ in range(2))
    at = [torch.full((batch,), i, dtype=torch.int32, device=device.torch_device) for i in range(copies)]

    def call(i: int) -> torch.Tensor:
        i %= copies
        functional.kv_cache_append(cache, ks[i], vs[i], at[i], validate=False, device=device)
        return cache.k[:, :, i]

    def alone() -> torch.Tensor:
        own = _first(cache)
        functional.kv_cache_append(own, ks[0][:1], vs[0][:1], at[0][:1], device=device)
        return own.k[:, :, 0]

    wanted = mxfp4.unpack(mxfp4.quantize(ks[0][:, 0])[0]) if packed else ks[0][:, 0]
    return Work(
        call=call,
        copies=copies,
        nbytes=row + 4 * batch * Hkv * D,
        flops=0,
        golden=wanted.double(),
        part=mxfp4.unpack if packed else lambda y: y,
        row=lambda y: y[:1],
        alone=alone,
    )


def _filled(device: Device, batch: int, sizes: tuple[int, int, int], dtype: str, *, packed: bool) -> list[KVCache]:
    """Caches of normal keys and values, as many as leave the L2 cache cold; packed: of all codes."""
    Hkv, S, D = sizes
    made: list[KVCache] = []
    numbers = generator(device.torch_device, 4)
    while not made or len(made) < copies_for(made[0].nbytes):
        kind = DTYPES[dtype]
        cache = functional.kv_cache(batch, Hkv, S, D, "mxfp4" if packed else dtype, activations=kind, device=device)
        for part, scales in ((cache.k, cache.k_scales), (cache.v, cache.v_scales)):
            if scales is None:
                part.normal_(generator=numbers)
            else:
                part.random_(0, 256, generator=numbers)
                scales.random_(124, 127, generator=numbers)
        made.append(cache)
    return made


def _pair(cache: KVCache, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, Hkv, S, D) as torch takes them."""
    if cache.k_scales is None or cache.v_scales is None:
        return cache.k, cache.v
    return mxfp4.dequantize(cache.k, cache.k_scales, kind), mxfp4.dequantize(cache.v, cache.v_scales, kind)


def _first(cache: KVCache) -> KVCache:
    """A copy of the first sequence's."""
    own: dict[str, Any] = {
        name: None if (part := getattr(cache, name)) is None else part[:1].clone()
        for name in ("k", "v", "k_scales", "v_scales")
    }
    return replace(cache, batch=1, **own)


def _golden(q: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor], group: int) -> torch.Tensor:
    """Float64 outputs (T, H, D) of the first sequence's last queries and first heads."""
    last = q[0, -_QUERIES:, :_HEADS].double()
    count, heads, D = last.shape
    found = []
    for h in range(heads):
        k, v = (part[0, h // group].double() for part in pair)
        z = last[:, h] @ k.T * D**-0.5
        S = len(k)
        seen = torch.arange(S, device=z.device) <= torch.arange(S - count, S, device=z.device)[:, None]
        found.append(z.masked_fill(~seen, -torch.inf).softmax(-1) @ v)
    return torch.stack(found, 1)
