"""What a Hopper tensor core computes, bit for bit, and the accumulation order of this project's kernels, in Python.

The model (measured on the H100, see docs/tensor_core.md): one step takes 16 products and an accumulator, truncates all
17 toward zero to a multiple of 2^(E - 25), E the largest of their exponents, adds them exactly, and truncates the sum
toward zero to float32. Written for reading, in float64, where every intermediate is exact; it shares no code with the
host device's integers in kernels/host/tensor_core.h, so each checks the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

STEP = 16
SMALLEST_EXPONENT = {"bf16": -126, "fp16": -14, "fp32": -126}
"""Of a normal number; subnormals take it too."""
CHUNK = {"bf16": 128, "fp16": 32}
"""Canonical order: chunk sums from zero in steps of 16, then added in ascending order in float32."""
SCALED_OPERAND = {"bf16": True, "fp16": False}
"""bf16 operands hold code times scale; an fp16 operand is the bare code and the scale multiplies the chunk's sum."""


@dataclass(frozen=True)
class Unit:
    """A tensor core: products a step, fraction bits kept below the largest exponent."""

    step: int = STEP
    fraction_bits: int = 25


HOPPER = Unit()
_NOTHING = -100_000  # the exponent of zero: never the largest


def _exponent(x: Floats, smallest: int) -> npt.NDArray[np.int64]:
    finite = np.isfinite(x) & (x != 0)
    exponent = np.frexp(np.where(finite, x, 1.0))[1].astype(np.int64) - 1
    return np.where(finite, np.maximum(exponent, smallest), _NOTHING)


def _truncate_to_float32(x: Floats) -> Floats:
    """Toward zero to 24 significant bits, not below multiples of 2^-149; past the range Inf; zero is +0."""
    unit = np.maximum(_exponent(x, -10_000) - 23, -149)
    cut = np.ldexp(np.trunc(np.ldexp(x, -unit)), unit)
    return np.where(np.abs(cut) >= 2.0**128, np.copysign(np.inf, cut), cut) + 0.0


def mma(c: Floats, a: Floats, b: Floats, dtype: str, unit: Unit = HOPPER) -> Floats:
    """D = C + A B^T over a chain of steps.

    a (..., M, K) and b (..., N, K) hold values of `dtype` ("bf16" or "fp16"), c (..., M, N) float32 values; all given
    as float64. K a multiple of the unit's step. Returns (..., M, N) float32 values as float64.
    """
    smallest = SMALLEST_EXPONENT[dtype]
    exponent_a, exponent_b = _exponent(a, smallest), _exponent(b, smallest)
    d = c
    for k in range(0, a.shape[-1], unit.step):
        here = slice(k, k + unit.step)
        with np.errstate(invalid="ignore", over="ignore"):
            products = a[..., :, None, here] * b[..., None, :, here]
            exponents = exponent_a[..., :, None, here] + exponent_b[..., None, :, here]
            largest = np.maximum(exponents.max(-1), _exponent(d, -126))
            special = ~(np.isfinite(products).all(-1) & np.isfinite(d))
            shift = np.where(largest < _NOTHING // 2, 0, unit.fraction_bits - largest)
            terms = np.trunc(np.ldexp(np.where(special[..., None], 0.0, products), shift[..., None]))
            total = terms.sum(-1) + np.trunc(np.ldexp(np.where(special, 0.0, d), shift))
            d = np.where(special, products.sum(-1) + d, _truncate_to_float32(np.ldexp(total, -shift)))
    return d


def _round_to_float32(x: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return cast("Floats", x.astype(np.float32).astype(np.float64))


def gemm(x: Floats, codes: Floats, scales: Floats, dtype: str) -> Floats:
    """X (M, K) times weights codes * scales in the canonical order; the exact float32 bits, as float64 (M, N).

    codes (N, K) decoded E2M1 values, scales (N, K/32) powers of two or NaN; both float64.
    """
    M, K = x.shape
    N = codes.shape[0]
    total = np.zeros((M, N))
    with np.errstate(over="ignore", invalid="ignore"):
        weights = _round_to_float32(codes * np.repeat(scales, 32, axis=1))
    # Past float32's range a decoded weight is Inf; a bare code takes its place where it carries the scale later.
    operand = weights if SCALED_OPERAND[dtype] else np.where(np.isinf(weights), weights, codes)
    for k in range(0, K, CHUNK[dtype]):
        here = slice(k, k + CHUNK[dtype])
        part = mma(np.zeros((M, N)), x[:, here], operand[:, here], dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            if not SCALED_OPERAND[dtype]:
                part = _round_to_float32(part * scales[:, k // 32])
            total = _round_to_float32(total + part)
    return total
