"""Attention with MXFP4 projections over a KV cache, prefill and decode by the same kernels and with the same bits.

Shapes: B sequences, T tokens each, H heads of queries, Hkv of keys and values, D = head_dim one of 32, 64, 80, 96, 128.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mxharness.device import Device
from mxharness.errors import UserError
from mxharness.functional.attention_schedule import launch, schedule
from mxharness.functional.common import (
    check_activations,
    check_pair,
    check_tensor,
    check_vector,
    check_weight,
    device_of,
    integer,
)
from mxharness.functional.gemm import gemm, gemm_bias
from mxharness.functional.kv_cache import KVCache, check_cache, check_layout, kv_cache_append
from mxharness.functional.rope import Rope, apply_rope, check_heads, check_rope, check_scale, check_starts, check_window
from mxharness.mxfp4 import Quantized


class QKV(NamedTuple):
    """One of each for queries, keys and values."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Projections(NamedTuple):
    """The three weights of attention's inputs, each (N, K)."""

    q: Quantized
    k: Quantized
    v: Quantized


def qkv_projection(
    x: torch.Tensor,
    q: Quantized,
    k: Quantized,
    v: Quantized,
    *,
    bias: QKV | None = None,
    device: Device | None = None,
) -> QKV:
    """(x Wq^T, x Wk^T, x Wv^T) (+ bias) for x (M, K) bf16 or fp16; each (M, N) of x's dtype, with the bits of `gemm`.

    bias: three float32 vectors (N). Raises as `gemm`.
    """
    device = device_of(x, device, "x")
    _check_three(bias)
    for i, weight in enumerate((q, k, v)):  # all of them, before the first is multiplied
        _check_linear(device, x, weight, None if bias is None else bias[i], "qkv"[i])
    if bias is None:
        return QKV(*(gemm(x, weight, device=device) for weight in (q, k, v)))
    return QKV(*(gemm_bias(x, w, b, device=device) for w, b in zip((q, k, v), bias, strict=True)))


def _check_three(bias: QKV | None) -> None:
    """UserError unless there is no bias or one each for queries, keys and values."""
    if bias is not None and not (isinstance(bias, tuple) and len(bias) == 3):
        raise UserError(f"bias must be QKV(q, k, v), not {type(bias).__name__}")


def _check_linear(device: Device, x: torch.Tensor, weight: Quantized, bias: torch.Tensor | None, name: str) -> None:
    """UserError unless x (M, K) can be multiplied by the weight and the bias added."""
    N, K = check_weight(device, weight, name=name)
    check_activations(device, x, K)
    check_vector(device, bias, (N,), torch.float32, f"{name} bias")


def fused_qkv_projection(
    x: torch.Tensor,
    weight: Quantized,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    bias: torch.Tensor | None = None,
    device: Device | None = None,
) -> QKV:
    """`qkv_projection` from one weight (N, K): H D rows of queries, then Hkv D of keys, then Hkv D of values.

    Returns views (M, H D), (M, Hkv D), (M, Hkv D) of one (M, N) buffer. bias (N) float32. Raises UserError where N is
    not (H + 2 Hkv) D, else as `gemm`.
    """
    heads, kv_heads = integer(heads, "heads"), integer(kv_heads, "kv_heads")
    head_dim = integer(head_dim, "head_dim")
    weight = check_pair(weight)
    N = (heads + 2 * kv_heads) * head_dim
    if min(heads, kv_heads, head_dim) < 1 or weight.codes.ndim != 2 or weight.codes.shape[0] != N:
        raise UserError(
            f"a fused weight for {heads} + 2 * {kv_heads} heads of {head_dim} has {N} rows, "
            f"not {weight.codes.shape[0] if weight.codes.ndim else 0}"
        )
    whole = gemm(x, weight, device=device) if bias is None else gemm_bias(x, weight, bias, device=device)
    after_q, after_k = heads * head_dim, (heads + kv_heads) * head_dim
    return QKV(whole[:, :after_q], whole[:, after_q:after_k], whole[:, after_k:])


def attention_output_projection(
    x: torch.Tensor, weight: Quantized, *, bias: torch.Tensor | None = None, device: Device | None = None
) -> torch.Tensor:
    """Y (.., N) = x W^T (+ bias) for the heads' outputs x (.., H, D) and W (N, H D); bias (N) float32.

    Raises as `gemm`.
    """
    check_tensor(x, "x")
    if x.ndim < 3 or 0 in x.shape:
        raise UserError(f"x must be (.., H, D) with no size 0, not {tuple(x.shape)}")
    flat = x.reshape(-1, x.shape[-2] * x.shape[-1])
    y = gemm(flat, weight, device=device) if bias is None else gemm_bias(flat, weight, bias, device=device)
    return y.reshape(*x.shape[:-2], -1)


def attention(
    q: torch.Tensor,
    cache: KVCache,
    lengths: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    validate: bool = True,
    device: Device | None = None,
) -> torch.Tensor:
    """Y (B, T, H, D) = softmax(scale q K^T) V over the cache's keys, H = G Hkv; head h reads KV head h / G.

    lengths (B) int32: how many keys of each sequence count; its T queries are the last T of these positions. A query
    at position i sees the keys up to i (causal; else all that count), and of them those after i - window where a
    window is given. sinks (H) float32: a logit of each head that takes weight and has no value. scale: D^-1/2, rounded
    to float32. A query that sees no key gives zeros. The bits depend on nothing but the query and the keys it sees by
    position: not on T, the batch or pages.

    Raises UserError for shapes, dtypes or layouts that do not belong together, lengths below T (causal) or past the
    cache, pages that do not exist, a window below 1 or without causal. Looking at lengths and pages waits for a GPU;
    validate=False leaves it out (graph capture), and then the caller answers for them: the kernel reads where they say.
    """
    device = device_of(q, device, "q")
    check_layout(device, cache)
    stride = check_heads(device, q, "q")
    B, T, H, D = q.shape
    if (B, D, q.dtype) != (cache.batch, cache.head_dim, cache.dtype) or H % cache.kv_heads:
        raise UserError(
            f"q must be {cache.dtype} ({cache.batch}, T, a multiple of {cache.kv_heads}, {cache.head_dim}) for this "
            f"cache, not {q.dtype} {tuple(q.shape)}"
        )
    window = check_window(window)
    scale = check_scale(scale, D)
    if window is not None and not causal:
        raise UserError(f"a window must be at least 1 and causal, not {window} with causal={causal}")
    check_starts(device, lengths, B, "lengths", validate=validate)
    if validate and causal and int(lengths.min()) < T:
        raise UserError(f"{T} causal queries need lengths of at least {T}, the smallest is {int(lengths.min())}")
    if validate:
        check_cache(device, cache, lengths)
    check_vector(device, sinks, (H,), torch.float32, "sinks")
    y = device.empty((B, T, H, D), q.dtype)
    how = schedule(q, cache, window, device.device_class)
    launch(device, how, y, q, stride, cache, lengths, sinks, scale, causal=causal, window=window)
    return y


def multi_head_attention(
    x: torch.Tensor,
    qkv: Quantized | Projections,
    output: Quantized,
    cache: KVCache,
    positions: torch.Tensor,
    *,
    bias: QKV | torch.Tensor | None = None,
    output_bias: torch.Tensor | None = None,
    rope: Rope | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    validate: bool = True,
    device: Device | None = None,
) -> torch.Tensor:
    """Y (B, T, N): project x (B, T, K), rotate, append to the cache, attend causally, project; H = Hkv.

    Token t of sequence b has position positions[b] + t; the cache must hold the positions before. qkv: one fused
    weight ((H + 2 Hkv) D, K) with bias ((H + 2 Hkv) D) or None, or three weights with three biases or None. output:
    (N, H D). Keys and values are written into the cache in place. Queries, keys, values and the heads' outputs are
    rounded to x's dtype. Raises UserError as `attention` and `kv_cache_append`, before the cache is written; validate
    as there.
    """
    if (heads := _heads(qkv, cache)) != cache.kv_heads:
        wanted = "multi_head_attention takes as many heads of queries as of keys"
        raise UserError(f"{wanted}, not {heads} and {cache.kv_heads}; grouped_query_attention takes more")
    return grouped_query_attention(
        x, qkv, output, cache, positions, bias=bias, output_bias=output_bias, rope=rope, scale=scale, window=window,
        sinks=sinks, validate=validate, device=device,
    )  # fmt: skip


def grouped_query_attention(
    x: torch.Tensor,
    qkv: Quantized | Projections,
    output: Quantized,
    cache: KVCache,
    positions: torch.Tensor,
    *,
    bias: QKV | torch.Tensor | None = None,
    output_bias: torch.Tensor | None = None,
    rope: Rope | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    validate: bool = True,
    device: Device | None = None,
) -> torch.Tensor:
    """`multi_head_attention` with H = G Hkv heads of queries: head h attends to KV head h / G."""
    return stages(
        x, qkv, output, cache, positions, bias=bias, output_bias=output_bias, rope=rope, scale=scale, window=window,
        sinks=sinks, validate=validate, device=device,
    )["y"]  # fmt: skip


def _heads(qkv: Quantized | Projections, cache: KVCache) -> int:
    """H, from the weights; UserError where they do not fit the cache."""
    if not isinstance(cache, KVCache):
        raise UserError(f"cache must be what kv_cache() gives, not {type(cache).__name__}")
    check_layout(device_of(cache.k, None, "the cache's k"), cache)
    D, Hkv = cache.head_dim, cache.kv_heads
    if isinstance(qkv, Projections):
        qkv = Projections(*(check_pair(weight, name) for weight, name in zip(qkv, "qkv", strict=True)))
    else:
        qkv = check_pair(qkv, "qkv")
    for weight in qkv if isinstance(qkv, Projections) else (qkv,):
        if weight.codes.ndim != 2:
            raise UserError(f"codes must be (N, K/2), not {tuple(weight.codes.shape)}")
    if isinstance(qkv, Projections):
        rows = [weight.codes.shape[0] for weight in qkv]
        wrong = rows[1] != Hkv * D or rows[2] != Hkv * D
        query_rows = rows[0]
    else:
        query_rows = qkv.codes.shape[0] - 2 * Hkv * D
        wrong = False
    if wrong or query_rows < 1 or query_rows % (Hkv * D):
        shapes = [tuple(w.codes.shape) for w in qkv] if isinstance(qkv, Projections) else tuple(qkv.codes.shape)
        raise UserError(f"codes {shapes} do not project to a multiple of {Hkv} heads of {D} and twice {Hkv} of {D}")
    return query_rows // D


def stages(
    x: torch.Tensor,
    qkv: Quantized | Projections,
    output: Quantized,
    cache: KVCache,
    positions: torch.Tensor,
    *,
    bias: QKV | torch.Tensor | None,
    output_bias: torch.Tensor | None,
    rope: Rope | None,
    scale: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
    validate: bool = True,
    device: Device | None,
) -> dict[str, torch.Tensor]:
    """Every intermediate of grouped_query_attention: q, k, v, rotated, heads, y; the cache is written in place."""
    device = device_of(x, device, "x")
    heads, D = _heads(qkv, cache), cache.head_dim
    qkv = qkv if isinstance(qkv, Projections) else check_pair(qkv)
    if x.ndim != 3 or 0 in x.shape or x.shape[0] != cache.batch or x.dtype != cache.dtype:
        raise UserError(f"x must be {cache.dtype} ({cache.batch}, T, K) for this cache, not {x.dtype} {tuple(x.shape)}")
    B, T, K = x.shape
    # What later stages would refuse, before anything is launched.
    check_starts(device, positions, B, "positions", validate=validate)
    lengths = positions + T
    if validate:
        check_cache(device, cache, lengths)
    if rope is not None:
        check_rope(device, rope, D, int(lengths.max()) if validate else 0)
    check_vector(device, sinks, (heads,), torch.float32, "sinks")
    window, scale = check_window(window), check_scale(scale, D)
    N, columns = check_weight(device, output, name="output")
    if columns != heads * D:
        raise UserError(f"output codes must be (N, {heads * D // 2}), not {tuple(output.codes.shape)}")
    check_vector(device, output_bias, (N,), torch.float32, "output_bias")
    flat = x.reshape(-1, K)
    if isinstance(qkv, Projections):
        if isinstance(bias, torch.Tensor):
            raise UserError("three weights take three biases, not one")
        projected = qkv_projection(flat, *qkv, bias=bias, device=device)
    else:
        if isinstance(bias, tuple):
            raise UserError("a fused weight takes one bias, not three")
        projected = fused_qkv_projection(flat, qkv, heads, cache.kv_heads, D, bias=bias, device=device)
    q, k, v = (y.reshape(B, T, -1, D) for y in projected)
    kv_cache_append(cache, k, v, positions, rope=rope, validate=validate, device=device)
    rotated = q if rope is None else apply_rope(q, rope, positions, validate=validate, device=device)
    core = attention(rotated, cache, lengths, scale=scale, window=window, sinks=sinks, validate=validate, device=device)
    y = attention_output_projection(core, output, bias=output_bias, device=device)
    return {"q": q, "k": k, "v": v, "rotated": rotated, "heads": core, "y": y}
