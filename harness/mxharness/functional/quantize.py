"""To MXFP4 and back, by the kernels of quantize.cu and dequant.cu."""

from __future__ import annotations

import numpy as np
import torch

from mxharness.device import Device
from mxharness.errors import UserError
from mxharness.functional.common import check_pair, check_tensors, check_weight, device_of, integer
from mxharness.mxfp4 import BLOCK, Quantized

_SCALE_RULES = {"floor": 0, "even": 1, "rceil": 2, "ceil": 3}
_TIE_RULES = {"even": 0, "zero": 1, "away": 2}
_THREADS = 256
"""Of a block, which quantises as many blocks."""
_TILE = 2048
"""Elements that a block dequantises, with the threads that follow."""
_TILE_THREADS = {"cuda": 256, "cpu": 64}
_SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def quantize(
    x: torch.Tensor, scale_rule: str = "floor", tie_rule: str = "even", *, device: Device | None = None
) -> Quantized:
    """Codes (R, Kp/2) and scales (R, Kp/32), uint8, of x (R, K) float32, bf16 or fp16; Kp is K rounded up to 32.

    The rules are those of `mxfp4.quantize`; a block that holds NaN or Inf becomes scale byte 255, codes 0.
    Raises UserError for another rank, dtype or rule, and for a tensor that is empty, strided or misaligned.
    Source: OCP MX 1.0, section 6.3.
    """
    device = device_of(x, device, "x")
    if x.ndim != 2 or 0 in x.shape:
        raise UserError(f"quantize takes a matrix with at least one row and column, not shape {tuple(x.shape)}")
    if x.dtype not in _SUFFIX:
        raise UserError(f"quantize takes float32, bfloat16 or float16, not {x.dtype}")
    if scale_rule not in tuple(_SCALE_RULES) or tie_rule not in tuple(_TIE_RULES):
        raise UserError(
            f"no rule ({scale_rule}, {tie_rule}); scale rules are {', '.join(_SCALE_RULES)}, "
            f"tie rules {', '.join(_TIE_RULES)}"
        )
    check_tensors(device, x=x)
    R, K = x.shape
    blocks = -(-K // BLOCK)
    codes = device.empty((R, blocks * 16), torch.uint8)
    scales = device.empty((R, blocks), torch.uint8)
    device.launch(
        "quantize.cu", f"quantize_{_SUFFIX[x.dtype]}", (-(-R * blocks // _THREADS),), (_THREADS,),
        codes, scales, x, np.int64(R), K, _SCALE_RULES[scale_rule], _TIE_RULES[tie_rule],
    )  # fmt: skip
    return Quantized(codes, scales)


def dequantize(
    weight: Quantized, dtype: torch.dtype = torch.float32, K: int | None = None, *, device: Device | None = None
) -> torch.Tensor:
    """Y (R, K) float32, bf16 or fp16 of codes (R, Kp/2) and scales (R, Kp/32) uint8: exact, rounded once to `dtype`.

    K defaults to Kp and may cut the last block short. Raises UserError for shapes that do not belong together, other
    dtypes, or misaligned tensors. Source: OCP MX 1.0, sections 5.3.3 and 5.4.1.
    """
    device = device_of(check_pair(weight)[0], device, "codes")
    R, padded = check_weight(device, weight)
    if dtype not in _SUFFIX:
        raise UserError(f"dequantize gives float32, bfloat16 or float16, not {dtype}")
    K = padded if K is None else integer(K, "K")
    if not padded - BLOCK < K <= padded:
        raise UserError(f"K = {K} does not fit codes of {padded} columns; it must be in {padded - 31}..{padded}")
    y = device.empty((R, K), dtype)
    codes, scales = weight
    grid = (-(-R * -(-K // BLOCK) * BLOCK // _TILE),)
    threads = _TILE_THREADS[device.torch_device.type]
    device.launch("dequant.cu", f"dequant_{_SUFFIX[dtype]}", grid, (threads,), y, codes, scales, np.int64(R), K)
    return y
