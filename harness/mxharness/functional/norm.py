"""RMSNorm and LayerNorm, alone or with the residual added first: float32 statistics, one rounding to x's dtype."""

from __future__ import annotations

import math
from typing import overload

import torch

from mxharness.device import Device
from mxharness.errors import UserError
from mxharness.functional.common import ACTIVATIONS, check_activations, check_tensor, check_vector, device_of, single


def threads(K: int) -> int:
    """So many threads sum a row of K elements, each every so many-th of them."""
    return 32 if K <= 256 else 256


@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = ..., *, residual: None = None, device: Device | None = ...
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = ..., *, residual: torch.Tensor, device: Device | None = ...
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    device: Device | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Y (M, K) = s / sqrt(mean(s^2) + eps) weight for s = x (M, K) bf16 or fp16, weight (K) float32 or x's dtype.

    With residual (M, K) of x's dtype, s = x + residual rounded to that dtype, and the result is (y, s): s is the new
    residual. Sums of squares must stay below 2^128. Raises UserError, before anything is launched, for other shapes
    and dtypes, strided or misaligned tensors, and eps that is not a positive number.
    Source: arXiv 1910.07467; one rounding at the end as in openai/gpt-oss.
    """
    made = normalise("rms", x, weight, None, eps, residual, device)
    return made["y"] if residual is None else (made["y"], made["sum"])


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = ...,
    eps: float = ...,
    *,
    residual: None = None,
    device: Device | None = ...,
) -> torch.Tensor: ...
@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = ...,
    eps: float = ...,
    *,
    residual: torch.Tensor,
    device: Device | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    device: Device | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Y (M, K) = (s - mean(s)) / sqrt(var(s) + eps) weight + bias, the variance over K taken around the mean.

    s, residual and errors as for `rms_norm`; bias (K) has the dtype of weight, or is None. Source: arXiv 1607.06450.
    """
    made = normalise("layer", x, weight, bias, eps, residual, device)
    return made["y"] if residual is None else (made["y"], made["sum"])


def check_norm(device: Device, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> None:
    """UserError unless weight, bias and eps are what a norm of x (M, K) takes."""
    check_tensor(weight, "the norm's weight")
    wanted = torch.float32 if weight.dtype == torch.float32 else x.dtype
    check_vector(device, weight, (x.shape[1],), wanted, "the norm's weight")
    check_vector(device, bias, (x.shape[1],), wanted, "the norm's bias")
    if not 0 < single(eps, "eps") < math.inf:
        raise UserError(f"eps must be a positive number, not {eps}")


def check_residual(device: Device, x: torch.Tensor, residual: torch.Tensor | None) -> None:
    """UserError unless residual is None or has x's shape and dtype."""
    check_vector(device, residual, tuple(x.shape), x.dtype, "residual")


def normalise(
    kind: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    device: Device | None,
) -> dict[str, torch.Tensor]:
    """Y and, with a residual, sum; kind is "rms" or "layer". The only place that knows the grid of norm.cu."""
    device = device_of(x, device, "x")
    check_activations(device, x)
    check_norm(device, x, weight, bias, eps)
    check_residual(device, x, residual)
    M, K = x.shape
    made = {} if residual is None else {"sum": device.empty((M, K), x.dtype)}
    made["y"] = device.empty((M, K), x.dtype)
    length = "short_" if threads(K) == 32 else ""
    vectors = (weight,) if kind == "rms" else (weight, bias)
    device.launch(
        "norm.cu", f"{kind}_norm_{length}{ACTIVATIONS[x.dtype]}", (M,), (threads(K),),
        made["y"], made.get("sum"), x, residual, *vectors, K, int(weight.dtype == torch.float32), single(eps, "eps"),
    )  # fmt: skip
    return made
