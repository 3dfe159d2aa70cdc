"""Feed-forward layers with MXFP4 weights: projections by gemm.cu, what lies between by ffn.cu and norm.cu.

A projection's output is rounded to x's dtype, as engines in production do; the activation is computed from it in
float32 and rounded to x's dtype once. Every result's rows have the same bits alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mxharness.device import Device
from mxharness.errors import UserError
from mxharness.functional.common import (
    ACTIVATIONS,
    check_activations,
    check_tensors,
    check_vector,
    check_weight,
    device_of,
    single,
)
from mxharness.functional.gemm import gemm, gemm_bias
from mxharness.functional.norm import check_norm, check_residual, normalise
from mxharness.mxfp4 import Quantized

GELU = {"gelu": 0, "gelu_tanh": 1}
"""Activations of an ungated layer, and what ffn.cu calls them."""
NORMS = ("rms", "layer")
_SWIGLU = {torch.float32: "fp32", **ACTIVATIONS}
_THREADS, _SWIGLU_WIDTH = 256, 4


def ffn_forward(
    x: torch.Tensor, up: Quantized, down: Quantized, *, activation: str = "gelu", device: Device | None = None
) -> torch.Tensor:
    """Y (M, N) = f(x U^T) D^T for x (M, K) bf16 or fp16, U (I, K), D (N, I); y has x's dtype.

    activation: "gelu" (with erf) or "gelu_tanh". Raises UserError, before anything is launched, for another one and
    for shapes, dtypes or alignment that `gemm` does not take. Source: arXiv 1606.08415.
    """
    return forward_stages(x, up, down, None, None, activation, device)["y"]


def ffn_forward_bias(
    x: torch.Tensor,
    up: Quantized,
    up_bias: torch.Tensor,
    down: Quantized,
    down_bias: torch.Tensor,
    *,
    activation: str = "gelu",
    device: Device | None = None,
) -> torch.Tensor:
    """Y (M, N) = f(x U^T + b) D^T + c, b (I) and c (N) float32, each added before a projection's one rounding.

    Else as `ffn_forward`.
    """
    return forward_stages(x, up, down, up_bias, down_bias, activation, device)["y"]


def swiglu_ffn_forward(
    x: torch.Tensor, gate: Quantized, up: Quantized, down: Quantized, *, device: Device | None = None
) -> torch.Tensor:
    """Y (M, N) = (silu(x G^T) * (x U^T)) D^T for x (M, K) bf16 or fp16, G and U (I, K), D (N, I), as in Llama.

    The gated product is one rounding to x's dtype, which y has too. Raises as `ffn_forward`.
    Source: arXiv 2002.05202.
    """
    return swiglu_stages(x, gate, up, down, device)["y"]


def ffn_residual(
    x: torch.Tensor,
    up: Quantized,
    down: Quantized,
    norm_weight: torch.Tensor,
    *,
    gate: Quantized | None = None,
    residual: torch.Tensor | None = None,
    norm: str = "rms",
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "gelu",
    device: Device | None = None,
) -> torch.Tensor:
    """Y (M, K) = s + FFN(norm(s)): the second half of a pre-norm block, s = x, or x + residual rounded to x's dtype.

    x, residual (M, K) bf16 or fp16; U and G (I, K), D (K, I). norm is "rms" or "layer", with norm_weight and
    norm_bias (K, "layer" alone) as `rms_norm` and `layer_norm` take them. With `gate` the layer is that of
    `swiglu_ffn_forward` and activation must be "swiglu", else that of `ffn_forward`. The down projection stays float32
    until s is added to it; y is rounded once. Raises UserError, before anything is launched, for what these functions
    do not take.
    """
    return residual_stages(
        x, up, down, norm_weight, gate, residual, norm, norm_bias, eps, activation, device
    )["y"]  # fmt: skip


def swiglu(
    x: torch.Tensor,
    *,
    alpha: float = 1.702,
    limit: float = 7.0,
    interleaved: bool = True,
    device: Device | None = None,
) -> torch.Tensor:
    """Y (M, I) = g / (1 + exp(-alpha g)) * (u + 1), g = min(gate, limit), u = up held between -limit and limit.

    x (M, 2 I) float32, bf16 or fp16: gate and up alternate (gate first), or are its two halves; y has x's dtype.
    limit may be infinite. Raises UserError, before anything is launched, for other shapes and dtypes, a limit that is
    not positive and an alpha that is not a number. Source: openai/gpt-oss, gpt_oss/torch/model.py.
    """
    device = device_of(x, device, "x")
    if x.dtype not in _SWIGLU:
        raise UserError(f"x must be float32, bfloat16 or float16, not {x.dtype}")
    if x.ndim != 2 or 0 in x.shape or x.shape[1] % 2:
        raise UserError(f"x must be (M, 2 I) with at least one row and one pair of columns, not {tuple(x.shape)}")
    if not single(limit, "limit") > 0:
        raise UserError(f"limit must be positive, not {limit}")
    if not np.isfinite(single(alpha, "alpha")):
        raise UserError(f"alpha must be a number, not {alpha}")
    check_tensors(device, x=x)
    M, I = x.shape[0], x.shape[1] // 2  # noqa: E741  the intermediate size
    y = device.empty((M, I), x.dtype)
    _each(
        device,
        f"swiglu_{_SWIGLU[x.dtype]}",
        y,
        (x,),
        I,
        int(bool(interleaved)),
        single(alpha, "alpha"),
        single(limit, "limit"),
        width=_SWIGLU_WIDTH,
    )
    return y


def forward_stages(
    x: torch.Tensor,
    up: Quantized,
    down: Quantized,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    device: Device | None,
) -> dict[str, torch.Tensor]:
    """What `ffn_forward` and `ffn_forward_bias` compute, stage by stage: up, activated, y."""
    device = device_of(x, device, "x")
    check_activations(device, x)
    N, width = _check_layer(device, x.shape[1], (up,), down)
    _check_activation(activation, GELU)
    check_vector(device, up_bias, (width,), torch.float32, "up_bias")
    check_vector(device, down_bias, (N,), torch.float32, "down_bias")
    made = hidden_layer(device, x, None, up, up_bias, activation)
    made["y"] = _project(device, made["activated"], down, down_bias, x.dtype)
    return made


def swiglu_stages(
    x: torch.Tensor, gate: Quantized, up: Quantized, down: Quantized, device: Device | None
) -> dict[str, torch.Tensor]:
    """What `swiglu_ffn_forward` computes, stage by stage: gate, up, activated, y."""
    device = device_of(x, device, "x")
    check_activations(device, x)
    _check_layer(device, x.shape[1], (up, gate), down)
    made = hidden_layer(device, x, gate, up, None, "swiglu")
    made["y"] = _project(device, made["activated"], down, None, x.dtype)
    return made


def residual_stages(
    x: torch.Tensor,
    up: Quantized,
    down: Quantized,
    norm_weight: torch.Tensor,
    gate: Quantized | None,
    residual: torch.Tensor | None,
    norm: str,
    norm_bias: torch.Tensor | None,
    eps: float,
    activation: str,
    device: Device | None,
) -> dict[str, torch.Tensor]:
    """What `ffn_residual` computes, stage by stage: sum (with a residual), normed, (gate,) up, activated, down, y."""
    device = device_of(x, device, "x")
    check_activations(device, x)
    N, _ = _check_layer(device, x.shape[1], (up,) if gate is None else (up, gate), down)
    if x.shape[1] != N:
        raise UserError(f"down must give back x's {x.shape[1]} features to be added to it, not {N}")
    _check_activation(activation, GELU if gate is None else ("swiglu",))
    if norm not in NORMS:
        raise UserError(f"no norm '{norm}'; there are {', '.join(NORMS)}")
    if norm == "rms" and norm_bias is not None:
        raise UserError("RMSNorm has no bias; norm_bias is for norm='layer'")
    check_norm(device, x, norm_weight, norm_bias, eps)
    check_residual(device, x, residual)
    normed = normalise(norm, x, norm_weight, norm_bias, eps, residual, device)
    made = {"normed": normed.pop("y"), **normed}
    made |= hidden_layer(device, made["normed"], gate, up, None, activation)
    made["down"] = _project(device, made["activated"], down, None, torch.float32)
    made["y"] = device.empty(tuple(x.shape), x.dtype)
    _each(device, f"add_residual_{ACTIVATIONS[x.dtype]}", made["y"], (made.get("sum", x), made["down"]))
    return made


def _check_layer(device: Device, K: int, inner: Sequence[Quantized], down: Quantized) -> tuple[int, int]:
    """(N, I) of a layer whose inner weights, up first, are (I, K) and down (N, I). UserError where they do not fit."""
    N, width = check_weight(device, down, name="down")
    for name, weight in zip(("up", "gate"), inner, strict=False):
        shape = check_weight(device, weight, name=name)
        if shape != (width, K):
            raise UserError(f"{name} must be ({width}, {K}) to fit down ({N}, {width}) and x (M, {K}), not {shape}")
    return N, width


def _check_activation(activation: str, known: Sequence[str] | dict[str, int]) -> None:
    if activation not in tuple(known):
        fitting = "with a gate" if "swiglu" in known else "without a gate"
        raise UserError(f"no activation '{activation}' {fitting}; there are {', '.join(known)}")


def _project(
    device: Device, x: torch.Tensor, weight: Quantized, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    if bias is None:
        return gemm(x, weight, out_dtype=dtype, device=device)
    return gemm_bias(x, weight, bias, out_dtype=dtype, device=device)


def hidden_layer(
    device: Device,
    x: torch.Tensor,
    gate: Quantized | None,
    up: Quantized,
    up_bias: torch.Tensor | None,
    activation: str,
) -> dict[str, torch.Tensor]:
    """The hidden layer (M, I) of checked x (M, K): (gate,) up, activated."""
    made = {} if gate is None else {"gate": _project(device, x, gate, None, x.dtype)}
    made["up"] = _project(device, x, up, up_bias, x.dtype)
    made["activated"] = device.empty(tuple(made["up"].shape), x.dtype)
    suffix = ACTIVATIONS[x.dtype]
    if gate is None:
        _each(device, f"activate_{suffix}", made["activated"], (made["up"],), GELU[activation])
    else:
        _each(device, f"gated_{suffix}", made["activated"], (made["gate"], made["up"]))
    return made


def _each(
    device: Device, kernel: str, y: torch.Tensor, inputs: tuple[torch.Tensor, ...], *rest: float, width: int = 1
) -> None:
    """One thread for every `width` elements of y; the only place that knows ffn.cu's grid and argument order."""
    count = y.numel()
    grid, block = (-(-count // (_THREADS * width)),), (_THREADS,)
    device.launch("ffn.cu", kernel, grid, block, y, *inputs, np.int64(count), *rest)
