"""What is made of the products: LM head, FFN and MoE, each with torch's way on decoded weights."""

from __future__ import annotations

import torch
from torch.nn.functional import linear, silu

from mxharness import functional
from mxharness.bench import peers
from mxharness.bench.elementwise import gated
from mxharness.bench.products import CUBLAS
from mxharness.bench.work import (
    DTYPES,
    SOME_COLUMNS,
    SOME_ROWS,
    Rival,
    Work,
    activations,
    corner,
    decoded,
    exact,
    first_row,
    packed_bytes,
    weights,
)
from mxharness.device import Device
from mxharness.mxfp4 import Quantized
from mxharness.timing import copies_for

TOP_K = 50
CHOSEN = 4
"""Experts of a token, as gpt-oss has them."""


def lm_head_greedy(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """Ids (M) of the largest logits; the floor has no logits to write."""
    return _head(device, shape, rows, dtype, greedy=True)


def lm_head_topk(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """Logits (M, V) float32, all but the 50 largest of a row -Inf."""
    return _head(device, shape, rows, dtype, greedy=False)


def _head(device: Device, shape: tuple[int, ...], rows: int, dtype: str, *, greedy: bool) -> Work:
    (V, K), kind = shape, DTYPES[dtype]
    count = copies_for(packed_bytes(V, K))
    stored, dense = weights(device, (V, K), count), decoded(device, (V, K), count, kind)
    xs = activations(device, max(count, len(dense)), (rows, K), kind)
    logits = _logits(xs[0][:SOME_ROWS], stored[0])

    def call(i: int, taken: int | None = None) -> torch.Tensor:
        x, weight = xs[i % count][:taken], stored[i % count]
        if greedy:
            return functional.lm_head_greedy(x, weight, device=device)
        return functional.lm_head_forward_topk(x, weight, TOP_K, device=device)

    def torch_call(i: int) -> torch.Tensor:
        z = linear(xs[i % len(dense)], dense[i % len(dense)])
        if greedy:
            return z.argmax(-1)
        kept = z.topk(TOP_K)
        return torch.full_like(z, -torch.inf, dtype=torch.float32).scatter_(-1, kept.indices, kept.values.float())

    def part(y: torch.Tensor) -> torch.Tensor:
        """The float64 logits of what was chosen, or what is left of the logits."""
        some = y[:SOME_ROWS]
        return logits.gather(1, some[:, None]) if greedy else some.where(some.isfinite(), 0)

    kept = logits.where(logits >= logits.topk(TOP_K).values[:, -1:], 0)
    return Work(
        call=call,
        copies=count,
        nbytes=packed_bytes(V, K) + 2 * rows * K + (8 * rows if greedy else 4 * rows * V),
        flops=2 * rows * V * K,
        golden=logits.amax(1, keepdim=True) if greedy else kept,
        part=part,
        row=first_row,
        alone=lambda: call(0, 1),
        rivals={f"{CUBLAS} + {'argmax' if greedy else 'topk'}": Rival(torch_call, len(dense))},
        reference=f"{CUBLAS} + {'argmax' if greedy else 'topk'}",
    )


def _logits(x: torch.Tensor, weight: Quantized) -> torch.Tensor:
    """X W^T in float64, in pieces that need little memory."""
    edges = range(0, len(weight.codes), 1 << 14)
    pieces = [Quantized(*(part[i : i + (1 << 14)] for part in weight)) for i in edges]
    return torch.cat([x.double() @ exact(piece).T for piece in pieces], 1)


def swiglu_ffn(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """(silu(x G^T) * (x U^T)) D^T for x (M, H), G and U (I, H), D (H, I)."""
    (inner, H), kind = shape, DTYPES[dtype]
    copies = copies_for(2 * packed_bytes(inner, H) + packed_bytes(H, inner))
    wide, narrow = weights(device, (inner, H), 2 * copies), weights(device, (H, inner), copies)
    tall, flat = decoded(device, (inner, H), 2 * copies, kind), decoded(device, (H, inner), copies, kind)
    torch_copies = max(1, min(len(tall) // 2, len(flat)))
    xs = activations(device, max(copies, torch_copies), (rows, H), kind)

    def call(i: int, taken: int | None = None) -> torch.Tensor:
        i %= copies
        x = xs[i][:taken]
        return functional.swiglu_ffn_forward(x, wide[2 * i], wide[2 * i + 1], narrow[i], device=device)

    def torch_call(i: int) -> torch.Tensor:
        i %= torch_copies
        gate, up = linear(xs[i], tall[2 * i]), linear(xs[i], tall[2 * i + 1])
        return linear(silu(gate) * up, flat[i])

    x = xs[0][:SOME_ROWS].double()
    h = silu(x @ exact(wide[0]).T) * (x @ exact(wide[1]).T)
    return Work(
        call=call,
        copies=copies,
        nbytes=2 * packed_bytes(inner, H) + packed_bytes(H, inner) + 4 * rows * H,
        flops=6 * rows * inner * H,
        golden=(h @ exact(narrow[0]).T)[:, :SOME_COLUMNS],
        part=corner,
        row=first_row,
        alone=lambda: call(0, 1),
        rivals={CUBLAS: Rival(torch_call, torch_copies)},
        reference=CUBLAS,
    )


def moe(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """`moe_forward` with E experts of gpt-oss's kind, 4 a token; each call has other tokens, and so other experts."""
    (E, H, inner), kind = shape, DTYPES[dtype]
    up, down = weights(device, (E, 2 * inner, H), 1)[0], weights(device, (E, H, inner), 1)[0]
    one = packed_bytes(2 * inner, H) + packed_bytes(H, inner)
    router, router_bias = activations(device, 1, (E, H), kind)[0], activations(device, 1, (E,), torch.float32)[0]
    up_bias, down_bias = (activations(device, 1, (E, size), torch.float32)[0] for size in (2 * inner, H))
    copies = max(2, copies_for(min(rows * CHOSEN, E) * one))
    xs = activations(device, copies, (rows, H), kind)
    routed = [functional.moe_router(x, router, router_bias, CHOSEN, device=device)[1] for x in xs]
    met = sum(len(set(ids.flatten().tolist())) for ids in routed) / copies

    def call(i: int, taken: int | None = None) -> torch.Tensor:
        return functional.moe_forward(
            xs[i % copies][:taken], router, router_bias, up, up_bias, down, down_bias, k=CHOSEN, device=device
        )

    rivals, absent = peers.moe_rival(xs, peers.MoeLayer(router, router_bias, up, up_bias, down, down_bias), CHOSEN)
    if hasattr(torch.nn.functional, "grouped_mm") and device.torch_device.type == "cuda":
        dense = decoded(device, (E, 2 * inner, H), 1, kind)[0], decoded(device, (E, H, inner), 1, kind)[0]
        rivals[GROUPED] = Rival(
            lambda i: _torch_moe(xs[i % copies], router, router_bias, dense[0], up_bias, dense[1], down_bias),
            copies,
        )
    else:
        absent[GROUPED] = "this torch has no grouped_mm for this device"
    return Work(
        call=call,
        copies=copies,
        nbytes=int(met * one) + 4 * rows * H + 2 * E * H,
        flops=2 * rows * (CHOSEN * 3 * inner * H + E * H),
        golden=_moe_golden(xs[0][:4], router, router_bias, up, up_bias, down, down_bias)[:, :SOME_COLUMNS],
        part=lambda y: y[:4, :SOME_COLUMNS],
        row=first_row,
        alone=lambda: call(0, 1),
        rivals=rivals,
        absent=absent,
        reference=GROUPED if GROUPED in rivals else "",
    )


GROUPED = "torch grouped_mm"
"""The same in bfloat16 or half: sorting by expert, torch's grouped products on decoded weights, the sum."""


def _torch_moe(
    x: torch.Tensor,
    router: torch.Tensor,
    router_bias: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor,
) -> torch.Tensor:
    """The layer by torch on decoded weights, without a word from the GPU to the CPU."""
    T, H = x.shape
    chosen = (x @ router.T + router_bias.to(x.dtype)).topk(CHOSEN)
    weight, experts = chosen.values.softmax(-1), chosen.indices.flatten()
    order = experts.argsort()
    sorted_experts = experts[order]
    edges = torch.arange(1, len(router) + 1, device=x.device)
    ends = torch.searchsorted(sorted_experts, edges).to(torch.int32)
    y = torch.nn.functional.grouped_mm(x[order // CHOSEN], up.mT, offs=ends)
    h = gated(y + up_bias.to(x.dtype)[sorted_experts])
    y = torch.nn.functional.grouped_mm(h, down.mT, offs=ends) + down_bias.to(x.dtype)[sorted_experts]
    y = y * weight.flatten()[order, None]
    return torch.zeros(T, H, dtype=x.dtype, device=x.device).index_add_(0, order // CHOSEN, y)


def _moe_golden(
    x: torch.Tensor,
    router: torch.Tensor,
    router_bias: torch.Tensor,
    up: Quantized,
    up_bias: torch.Tensor,
    down: Quantized,
    down_bias: torch.Tensor,
) -> torch.Tensor:
    """Float64, token by token."""
    rows = []
    for token in x.double():
        chosen = (router.double() @ token + router_bias.double()).topk(CHOSEN)
        y = torch.zeros_like(token)
        for weight, e in zip(chosen.values.softmax(-1), chosen.indices.tolist(), strict=True):
            h = gated(exact(Quantized(up.codes[e], up.scales[e])) @ token + up_bias[e].double())
            y += weight * (exact(Quantized(down.codes[e], down.scales[e])) @ h + down_bias[e].double())
        rows.append(y)
    return torch.stack(rows)
