"""Mixture of experts as gpt-oss has it: a router, top-k and then softmax, MXFP4 experts with SwiGLU, a weighted sum.

A token's bits do not depend on the batch. Source: openai/gpt-oss, gpt_oss/torch/model.py (MLPBlock); the same in
transformers, models/gpt_oss/modeling_gpt_oss.py.
"""

from __future__ import annotations

import numpy as np
import torch

from mxharness.device import Device
from mxharness.errors import UserError
from mxharness.functional.common import (
    ACTIVATIONS,
    check_activations,
    check_tensor,
    check_tensors,
    check_vector,
    check_weight,
    device_of,
    integer,
    single,
)
from mxharness.functional.dispatch import GATED, Problem, choose
from mxharness.functional.ffn import swiglu
from mxharness.functional.gemm import dense, multiply
from mxharness.mxfp4 import BLOCK, Quantized

MAX_EXPERTS, MAX_CHOSEN = 256, 8
"""Largest E and largest k."""
_ROUTE_WARPS, _GROUP_THREADS, _COMBINE_THREADS, _COMBINE_WIDTH = 4, 256, 256, 4


def moe_router(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int = 4, *, device: Device | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (T, E) float32 = x weight^T + bias, ids (T, k) int32 of the k largest, and their weights (T, k) float32.

    x (T, H) bf16 or fp16, H a multiple of 32; weight (E, H) of x's dtype, E <= 256; bias (E) float32; k <= E and
    k <= 8. ids are in descending order of their logits, equals by the lowest id; weights are the softmax over these
    k logits alone. NaN is larger than every number: a NaN logit is chosen and all weights of its token are NaN.
    Raises UserError, before anything is launched, for shapes, dtypes or alignment that the kernels do not take.
    """
    device = device_of(x, device, "x")
    k = integer(k, "k")
    _check_router(device, x, weight, bias, k)
    return _route(device, x, weight, bias, k)


def moe_forward(
    x: torch.Tensor,
    router_weight: torch.Tensor,
    router_bias: torch.Tensor,
    gate_up: Quantized,
    gate_up_bias: torch.Tensor,
    down: Quantized,
    down_bias: torch.Tensor,
    *,
    k: int = 4,
    alpha: float = 1.702,
    limit: float = 7.0,
    device: Device | None = None,
) -> torch.Tensor:
    """Y (T, H) = sum over the k experts e that `moe_router` gives a token: weight_e (h_e down_e^T + down_bias_e).

    h_e = swiglu(x gate_up_e^T + gate_up_bias_e), rows of gate_up interleaved: even rows are the gate, odd rows go up.
    x (T, H) bf16 or fp16; router_weight (E, H) of x's dtype, router_bias (E) float32; gate_up: codes (E, 2I, H/2) and
    scales (E, 2I, H/32), down: codes (E, H, I/2) and scales (E, H, I/32), uint8; gate_up_bias (E, 2I) and down_bias
    (E, H) float32. H and I are multiples of 32, E <= 256, k <= E and k <= 8.

    gate_up's product and h are kept in x's dtype, as transformers and gpt-oss do. Where they round once more only
    because each is an operator of its own (down's product, its weighting, the sum), this stays in float32: y is
    rounded once. Raises UserError, before anything is launched, for what the kernels do not take.
    """
    return moe_stages(
        x, router_weight, router_bias, gate_up, gate_up_bias, down, down_bias, k=k, alpha=alpha, limit=limit,
        device=device, fused=True,
    )["y"]  # fmt: skip


def moe_stages(
    x: torch.Tensor,
    router_weight: torch.Tensor,
    router_bias: torch.Tensor,
    gate_up: Quantized,
    gate_up_bias: torch.Tensor,
    down: Quantized,
    down_bias: torch.Tensor,
    *,
    k: int = 4,
    alpha: float = 1.702,
    limit: float = 7.0,
    device: Device | None = None,
    fused: bool = False,
) -> dict[str, torch.Tensor]:
    """What `moe_forward` computes on its way to y (T, H), stage by stage.

    logits (T, E) float32, ids (T, k) int32, weights (T, k) float32, gate_up (T, k, 2I) and h (T, k, I) of x's dtype,
    down (T, k, H) float32. Slot s of a token belongs to expert ids[t, s]. fused: gate_up is left out where its kernel
    makes h of it; all else has the same bits.
    """
    device = device_of(x, device, "x")
    k = integer(k, "k")
    _check_router(device, x, router_weight, router_bias, k)
    _check_experts(device, x, router_weight.shape[0], gate_up, gate_up_bias, down, down_bias)
    if not single(limit, "limit") > 0:
        raise UserError(f"limit must be positive, not {limit}")
    if not np.isfinite(single(alpha, "alpha")):
        raise UserError(f"alpha must be a number, not {alpha}")
    T, H = x.shape
    E, I2 = gate_up_bias.shape
    logits, ids, weights = _route(device, x, router_weight, router_bias, k)
    routed = group(device, ids, E)

    made = {"logits": logits, "ids": ids, "weights": weights}
    problem = Problem("gemm", ACTIVATIONS[x.dtype], I2, T * k, E, routed=True, K=H)
    if fused and choose(problem, device.device_class).source in GATED:
        h = device.empty((T, k, I2 // 2), x.dtype)
        _multiply_routed(
            device, h, x, gate_up, gate_up_bias, *routed, fan=k, gated=(single(alpha, "alpha"), single(limit, "limit"))
        )
    else:
        made["gate_up"] = device.empty((T, k, I2), x.dtype)
        _multiply_routed(device, made["gate_up"], x, gate_up, gate_up_bias, *routed, fan=k)
        h = swiglu(made["gate_up"].view(T * k, I2), alpha=alpha, limit=limit, interleaved=True, device=device)
        h = h.view(T, k, I2 // 2)
    returned = device.empty((T, k, H), torch.float32)
    _multiply_routed(device, returned, h, down, down_bias, *routed, fan=1)

    y = device.empty((T, H), x.dtype)
    grid = (T, -(-H // (_COMBINE_THREADS * _COMBINE_WIDTH)))
    kernel = f"moe_combine_{ACTIVATIONS[x.dtype]}"
    device.launch("moe.cu", kernel, grid, (_COMBINE_THREADS,), y, returned, weights, k, H)
    return {**made, "h": h, "down": returned, "y": y}


def group(device: Device, ids: torch.Tensor, E: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets (E + 1) and entries (T k), int32: expert e has the entries[offsets[e] .. offsets[e + 1]), ascending.

    ids (T, k) int32 below E, as `moe_router` gives them; entry t k + s is token t's slot s.
    """
    offsets, entries = device.empty((E + 1,), torch.int32), device.empty((ids.numel(),), torch.int32)
    device.launch("moe.cu", "moe_group", (E,), (_GROUP_THREADS,), offsets, entries, ids, ids.numel())
    return offsets, entries


def _route(
    device: Device, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = dense(x, weight, bias, out_dtype=torch.float32, device=device)
    T, E = logits.shape
    ids, weights = device.empty((T, k), torch.int32), device.empty((T, k), torch.float32)
    grid = (-(-T // _ROUTE_WARPS),)
    device.launch("moe.cu", "moe_route", grid, (_ROUTE_WARPS * 32,), ids, weights, logits, T, E, k)
    return logits, ids, weights


def _multiply_routed(
    device: Device,
    y: torch.Tensor,
    x: torch.Tensor,
    weight: Quantized,
    bias: torch.Tensor,
    offsets: torch.Tensor,
    entries: torch.Tensor,
    *,
    fan: int,
    gated: tuple[float, float] | None = None,
) -> None:
    """Every entry's row of x, entry / fan, times its expert's weight, to the entry's row of y; gated: of `multiply`."""
    multiply(
        device, y, x, weight, bias, problems=bias.shape[0], M=0, x_step=0, rows=len(entries), offsets=offsets,
        entries=entries, fan=fan, gated=gated,
    )  # fmt: skip


def _check_router(device: Device, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int) -> None:
    check_activations(device, x)
    H = x.shape[1]
    if H % BLOCK:
        raise UserError(f"x must be (T, H) with H a multiple of {BLOCK}, not {tuple(x.shape)}")
    check_tensor(weight, "the router's weight")
    if weight.dtype != x.dtype or weight.ndim != 2 or weight.shape[1] != H or not 0 < weight.shape[0] <= MAX_EXPERTS:
        raise UserError(
            f"the router's weight must be (E, {H}) of x's {x.dtype} with E from 1 to {MAX_EXPERTS}, "
            f"not {tuple(weight.shape)} {weight.dtype}"
        )
    check_tensors(device, **{"the router's weight": weight})
    check_vector(device, bias, (weight.shape[0],), torch.float32, "the router's bias")
    if not 0 < k <= min(weight.shape[0], MAX_CHOSEN):
        raise UserError(
            f"k must be from 1 to {min(weight.shape[0], MAX_CHOSEN)} for {weight.shape[0]} experts, not {k}"
        )


def _check_experts(
    device: Device,
    x: torch.Tensor,
    E: int,
    gate_up: Quantized,
    gate_up_bias: torch.Tensor,
    down: Quantized,
    down_bias: torch.Tensor,
) -> None:
    H = x.shape[1]
    wide = check_weight(device, gate_up, name="gate_up", ndim=3)
    narrow = check_weight(device, down, name="down", ndim=3)
    I = narrow[2]  # noqa: E741  the shape alphabet's name for the experts' width
    if wide != (E, 2 * I, H) or narrow[:2] != (E, H):
        raise UserError(
            f"gate_up must be (E, 2I, H) and down (E, H, I) with E = {E} as the router and H = {H} as x, "
            f"not {wide} and {narrow}"
        )
    check_tensor(gate_up_bias, "gate_up_bias")
    check_tensor(down_bias, "down_bias")
    check_vector(device, gate_up_bias, (E, 2 * I), torch.float32, "gate_up_bias")
    check_vector(device, down_bias, (E, H), torch.float32, "down_bias")
