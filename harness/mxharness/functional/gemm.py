"""GEMMs with MXFP4 weights, float32 accumulation in the declared order: a row's bits do not depend on the batch.

y = x W^T (+ bias). Which kernel runs is decided in dispatch.py; all have the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mxharness.device import Device
from mxharness.errors import UserError
from mxharness.functional.common import (
    ACTIVATIONS,
    check_activations,
    check_pair,
    check_tensor,
    check_tensors,
    check_vector,
    check_weight,
    device_of,
)
from mxharness.functional.dispatch import Problem, choose, named
from mxharness.functional.quantize import dequantize
from mxharness.mxfp4 import BLOCK, Quantized

_SAME, _FLOAT32, SWIGLU = range(3)
"""What y is: gemm.cuh's Form."""


def gemm(
    x: torch.Tensor,
    weight: Quantized,
    *,
    out_dtype: torch.dtype | None = None,
    path: str = "",
    device: Device | None = None,
) -> torch.Tensor:
    """Y (M, N) = x W^T for x (M, K) bf16 or fp16 and W: codes (N, K/2), scales (N, K/32) uint8.

    out_dtype is x's dtype (default) or float32. path: the kernel to take instead of the one that the shape would, as
    "wide_128x64" for gemm_wide_128x64; the bits are the same. Raises UserError, before anything is launched, for
    shapes, dtypes or alignment that the kernel does not take, or a path that the device has not; K must be a multiple
    of 32 (pad x with zeros).
    """
    return _single(x, weight, None, out_dtype, device, path)


def gemm_bias(
    x: torch.Tensor,
    weight: Quantized,
    bias: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    device: Device | None = None,
) -> torch.Tensor:
    """Y (M, N) = x W^T + bias, bias (N) float32, added to the float32 sum before the one rounding; else as `gemm`."""
    return _single(x, weight, bias, out_dtype, device)


def gemm_batch(
    x: torch.Tensor,
    weights: Quantized,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    device: Device | None = None,
) -> torch.Tensor:
    """Y (E, M, N) = x_e W_e^T (+ bias_e), E weight matrices in one launch.

    x is (E, M, K), or (M, K) for all matrices alike; codes (E, N, K/2), scales (E, N, K/32), bias (E, N) float32.
    Every y_e has the bits of `gemm`. Raises as `gemm`.
    """
    device = device_of(x, device, "x")
    E, N, K = check_weight(device, weights, ndim=3)
    if x.ndim not in (2, 3) or (x.ndim == 3 and x.shape[0] != E):
        raise UserError(f"x must be ({E}, M, {K}) or (M, {K}) to meet {E} matrices, not {tuple(x.shape)}")
    check_activations(device, x.flatten(0, -2), K)
    check_tensors(device, x=x)
    check_vector(device, bias, (E, N), torch.float32, "bias")
    M = x.shape[-2]
    y = device.empty((E, M, N), output_dtype(x, out_dtype))
    multiply(device, y, x, weights, bias, problems=E, M=M, x_step=M if x.ndim == 3 else 0, rows=M)
    return y


@dataclass
class PersistentWeight:
    """A weight held as the tensor core's own operand, made once by `persistent` and used by `gemm_persistent`.

    `release` gives the buffer back; after that it cannot be used.
    """

    shape: tuple[int, int]
    """(N, K)."""
    operand: torch.Tensor | None
    """(N, K) bf16: the decoded weights; fp16: the values of the bare codes, exact under every scale."""
    scales: torch.Tensor | None
    """(N, K/32) uint8 where the operand carries no scale; None for bf16."""

    @property
    def nbytes(self) -> int:
        """Bytes that the buffer occupies beyond the MXFP4 weight itself; 0 once released."""
        return 0 if self.operand is None else self.operand.nbytes

    def release(self) -> None:
        """Drop the buffer. Idempotent."""
        self.operand = self.scales = None


def persistent(
    weight: Quantized, dtype: torch.dtype = torch.bfloat16, *, device: Device | None = None
) -> PersistentWeight:
    """The weight, dequantised once for activations of `dtype` (bf16 or fp16): 16 bits an element, kept until released.

    Raises UserError for another dtype or weights that `gemm` refuses.
    """
    device = device_of(check_pair(weight)[0], device, "codes")
    N, K = check_weight(device, weight)
    if dtype not in ACTIVATIONS:
        raise UserError(f"a persistent weight is for bfloat16 or float16 activations, not {dtype}")
    if dtype == torch.bfloat16:
        return PersistentWeight((N, K), dequantize(weight, dtype, device=device), None)
    # half does not reach all scales: the scale stays outside, as in the packed kernel. Scales whose products pass
    # float32's range make Inf of an operand there, which the decoder of bare codes cannot know.
    if bool(((weight[1] == 253) | (weight[1] == 254)).any()):
        raise UserError("a persistent half-precision weight cannot have scale bytes 253 and 254; use bfloat16 or gemm")
    ones = torch.full_like(weight[1], 127)
    return PersistentWeight((N, K), dequantize(Quantized(weight[0], ones), dtype, device=device), weight[1])


def gemm_persistent(
    x: torch.Tensor,
    weight: PersistentWeight,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    path: str = "",
    device: Device | None = None,
) -> torch.Tensor:
    """Y (M, N) = x W^T (+ bias) from a weight dequantised beforehand; the bits of `gemm` and `gemm_bias`.

    path as in `gemm`: "small", "narrow", "tile", on Hopper also "wide_256x128" and other ones. Raises UserError for a
    weight that was released or made for another dtype, else as `gemm`.
    """
    device = device_of(x, device, "x")
    if not isinstance(weight, PersistentWeight):
        raise UserError(f"weight must be what persistent() gives, not {type(weight).__name__}")
    if weight.operand is None:
        raise UserError("this persistent weight was released; make another with persistent()")
    check_tensor(weight.operand, "a persistent weight's operand")
    if tuple(weight.operand.shape) != weight.shape:
        raise UserError(f"this persistent weight is {weight.shape}, its operand {tuple(weight.operand.shape)}")
    if x.dtype != weight.operand.dtype:
        raise UserError(f"this persistent weight was made for {weight.operand.dtype} activations, not {x.dtype}")
    return dense(x, weight.operand, bias, scales=weight.scales, out_dtype=out_dtype, path=path, device=device)


def dense(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scales: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    path: str = "",
    device: Device | None = None,
) -> torch.Tensor:
    """Y (M, N) = x w^T (+ bias) for an unquantised w (N, K) of x's dtype, in the same order of sums; K % 32 == 0.

    scales (N, K/32) uint8, if given, multiply each block of 32 products (fp16) or are part of w already (bf16: None).
    path as in `gemm_persistent`. Raises as `gemm`.
    """
    device = device_of(x, device, "x")
    check_tensor(w, "w")
    if w.ndim != 2 or w.dtype != x.dtype or w.shape[1] % BLOCK or 0 in w.shape:
        raise UserError(f"w must be (N, K) of x's {x.dtype}, K a multiple of {BLOCK}, not {tuple(w.shape)} {w.dtype}")
    N, K = w.shape
    check_activations(device, x, K)
    check_tensors(device, w=w)
    check_vector(device, scales, (N, K // BLOCK), torch.uint8, "scales")
    if scales is not None and w.dtype == torch.bfloat16:
        raise UserError("scales are for fp16; a bf16 w holds its scales already")
    check_vector(device, bias, (N,), torch.float32, "bias")
    y = device.empty((x.shape[0], N), output_dtype(x, out_dtype))
    M = x.shape[0]
    multiply(device, y, x, (w, scales), bias, problems=1, M=M, x_step=M, rows=M, path=path)
    return y


def output_dtype(x: torch.Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """What a GEMM of x gives: x's own dtype for None, else that or float32. UserError otherwise."""
    if out_dtype not in (None, x.dtype, torch.float32):
        raise UserError(f"a product of {x.dtype} activations is {x.dtype} or torch.float32, not {out_dtype}")
    return out_dtype or x.dtype


def _single(
    x: torch.Tensor,
    weight: Quantized,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    device: Device | None,
    path: str = "",
) -> torch.Tensor:
    device = device_of(x, device, "x")
    N, K = check_weight(device, weight)
    check_activations(device, x, K)
    check_vector(device, bias, (N,), torch.float32, "bias")
    M = x.shape[0]
    y = device.empty((M, N), output_dtype(x, out_dtype))
    multiply(device, y, x, weight, bias, problems=1, M=M, x_step=M, rows=M, path=path)
    return y


def multiply(
    device: Device,
    y: torch.Tensor,
    x: torch.Tensor,
    weight: tuple[torch.Tensor, torch.Tensor | None],
    bias: torch.Tensor | None,
    *,
    problems: int,
    M: int,
    x_step: int,
    rows: int,
    offsets: torch.Tensor | None = None,
    entries: torch.Tensor | None = None,
    fan: int = 1,
    path: str = "",
    gated: tuple[float, float] | None = None,
) -> None:
    """Launch a GEMM's kernel on checked tensors; the only place that knows their argument order.

    weight: codes (.., N, K/2) uint8 and scales, or a dense operand (.., N, K) and scales or None. rows: of the largest
    problem, or, with offsets (problems + 1) and entries int32, of all problems together: entry e reads x's row
    e / fan and writes y's row e. path: of dispatch.named, if it is not to be chosen. gated: alpha and limit,
    where y (.., N / 2) is to be the SwiGLU of neighbouring features, rounded to y's dtype before; N must be a multiple
    of 8, y aligned and the kernel one of dispatch.GATED.
    """
    w, scales = weight
    K, form = x.shape[-1], _FLOAT32 if y.dtype == torch.float32 else _SAME if gated is None else SWIGLU
    N = y.shape[-1] * (2 if gated else 1)
    kind = "gemm" if w.dtype == torch.uint8 else "dense"
    problem = Problem(kind, ACTIVATIONS[x.dtype], N, rows, problems, routed=offsets is not None, K=K)
    plan = named(path, problem, device.device_class) if path else choose(problem, device.device_class)
    device.launch(
        plan.source, plan.kernel, problem.blocks(plan), (plan.threads,),
        y, x, w, scales, bias, offsets, *plan.maps(x, w, rows), entries,
        problems, M, x_step, fan, N, K, form, *(gated or (0.0, 0.0)),
    )  # fmt: skip
