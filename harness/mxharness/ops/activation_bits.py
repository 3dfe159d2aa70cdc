"""The bits of kernels/activation.cuh and kernels/norm.cu in numpy: every operation in float32, rounded once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mxharness.float32 import Array, fma
from mxharness.functional.norm import threads
from mxharness.ops.elementary_bits import erf, rsqrt, sigmoid, tanh

_F = np.float32
_WARP = 32


def gelu(x: Array) -> Array:
    """X / 2 times 1 + erf(x / sqrt(2))."""
    return (_F(0.5) * x) * (_F(1) + erf(x * _F(0.707106781)))


def gelu_tanh(x: Array) -> Array:
    """X / 2 times 1 + tanh; the cubic as x times 1 + 0.044715 x x, fused."""
    cubic = x * fma(_F(0.044715) * x, x, _F(1))
    return (_F(0.5) * x) * (_F(1) + tanh(_F(0.797884561) * cubic))


def swiglu(gate: Array, up: Array) -> Array:
    """The gate times its sigmoid, times up."""
    return (gate * sigmoid(gate)) * up


def swiglu_limited(gate: Array, up: Array, alpha: float, limit: float) -> Array:
    """Up + 1 times the gate times a sigmoid, both held within the limit; NaN stays."""
    end = _F(limit)
    g: Array = np.minimum(gate, end)
    u: Array = np.maximum(np.minimum(up, end), -end)
    return (u + _F(1)) * (g * sigmoid(_F(alpha) * g))


def activated(function: Callable[..., Array], dtype: torch.dtype, *arguments: torch.Tensor) -> torch.Tensor:
    """The output of `dtype`, from arguments of 16 or 32 bits."""
    with np.errstate(all="ignore"):
        return torch.from_numpy(function(*(argument.float().numpy() for argument in arguments))).to(dtype)


def normed(kind: str, s: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Y (M, K) of s (M, K), of its dtype; kind is "rms" or "layer", weight and bias (K)."""
    rows, w = s.float().numpy(), weight.float().numpy()
    with np.errstate(all="ignore"):
        if kind == "layer":
            rows = rows - _mean(rows)
        scaled = (rows * rsqrt(_mean(rows * rows) + _F(eps))) * w
        y = scaled if bias is None else scaled + bias.float().numpy()
    return torch.from_numpy(y).to(s.dtype)


def _mean(terms: Array) -> Array:
    """Of rows (M, K), (M, 1): thread t adds the elements t, t + B, ..; warps by butterfly, then one after another."""
    M, K = terms.shape
    B = threads(K)
    total = np.zeros((M, B), np.float32)
    for first in range(0, K, B):
        here = terms[:, first : first + B]
        total[:, : here.shape[1]] += here
    lanes = total.reshape(M, B // _WARP, _WARP)
    for distance in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[:, :, np.arange(_WARP) ^ distance]
    value = lanes[:, 0, 0]
    for warp in range(1, B // _WARP):
        value = value + lanes[:, warp, 0]
    return (value / _F(K))[:, None]
