"""What a tensor core computes, bit for bit, and the accumulation order of this project's kernels, in Python.

Hopper's model (measured on the H100, see docs/tensor_core.md): one step takes 16 products and an accumulator, truncates
all 17 toward zero to a multiple of 2^(E - 25), E the largest of their exponents, adds them exactly, and truncates the
sum toward zero to float32. Other GPUs are other Units of one family. Written for reading, in float64, where every
intermediate is exact; it shares no code with the host device's integers in kernels/host/tensor_core.h, so each checks
the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from mxharness.float32 import odd, sum_of_two

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
    """The arithmetic of a tensor core; the defaults are Hopper's.

    A step aligns its products, and the accumulator where that joins them, to a multiple of 2^(E - fraction_bits), E the
    largest of their exponents, adds them exactly and rounds the sum to float32.
    """

    step: int = STEP
    """Products added at once."""
    fraction_bits: int | None = 25
    """Kept below the largest exponent; None keeps every bit."""
    alignment: Literal["truncate", "floor", "nearest"] = "truncate"
    """What becomes of a term's bits below that: toward zero, toward minus infinity, to nearest even."""
    rounding: Literal["truncate", "nearest"] = "truncate"
    """Of the sum to float32: toward zero or to nearest even."""
    accumulator: Literal["joins", "after"] = "joins"
    """Whether it is aligned and added with the products, or added to their rounded sum and rounded once more."""
    exponents: Literal["stored", "normalised"] = "stored"
    """A product's exponent: its factors' as stored, added, or that of its own leading bit."""
    subnormals: Literal["kept", "flushed"] = "kept"
    """Operands, accumulators and results."""

    def __str__(self) -> str:
        bits = "every fraction bit" if self.fraction_bits is None else f"{self.fraction_bits} fraction bits"
        how = {"truncate": "truncation", "floor": "rounding down", "nearest": "rounding to nearest"}
        parts = [f"steps of {self.step}", bits]
        if self.fraction_bits is None or self.alignment == self.rounding:
            parts.append(how[self.rounding])
        else:
            parts += [f"{how[self.alignment]} of the terms", f"{how[self.rounding]} of the sum"]
        parts += ["the accumulator added afterwards"] if self.accumulator == "after" else []
        parts += ["normalised exponents"] if self.exponents == "normalised" else []
        parts += ["subnormals flushed"] if self.subnormals == "flushed" else []
        return ", ".join(parts)


HOPPER = Unit()
Units = Mapping[str, Unit]
"""The unit of each dtype, "bf16" and "fp16"."""
_UNITS: ContextVar[Units] = ContextVar("units", default=MappingProxyType({"bf16": HOPPER, "fp16": HOPPER}))
_NOTHING = -100_000  # the exponent of zero: never the largest
_ALIGN = {"truncate": np.trunc, "floor": np.floor, "nearest": np.rint}


@contextmanager
def predicting(units: Units) -> Iterator[None]:
    """Predict the bits of a device with these units for as long as the context lasts."""
    token = _UNITS.set(units)
    try:
        yield
    finally:
        _UNITS.reset(token)


def unit_roundoff(unit: Unit) -> float:
    """The u, a power of two from 2^-24, with which gamma_K bounds a chain of K products on this unit.

    Each of a step's terms loses at most 2^(E - fraction_bits), half of it to nearest, and the sum 2^-23 of itself or
    2^-24; what a step adds is at least 2^E.
    """
    terms = unit.step + (unit.accumulator == "joins")
    aligned = 0.0 if unit.fraction_bits is None else terms * 2.0**-unit.fraction_bits
    summed = (2.0**-23 if unit.rounding == "truncate" else 2.0**-24) * (1 if unit.accumulator == "joins" else 2)
    product = (aligned * (0.5 if unit.alignment == "nearest" else 1) + summed) / unit.step
    return max(2.0**-24, 2.0 ** math.ceil(math.log2(product)))


def _exponent(x: Floats, smallest: int) -> npt.NDArray[np.int64]:
    finite = np.isfinite(x) & (x != 0)
    exponent = np.frexp(np.where(finite, x, 1.0))[1].astype(np.int64) - 1
    return np.where(finite, np.maximum(exponent, smallest), _NOTHING)


def _truncate_to_float32(x: Floats) -> Floats:
    """Toward zero to 24 significant bits, not below multiples of 2^-149; past the range Inf; zero is +0."""
    unit = np.maximum(_exponent(x, -10_000) - 23, -149)
    cut = np.ldexp(np.trunc(np.ldexp(x, -unit)), unit)
    return np.where(np.abs(cut) >= 2.0**128, np.copysign(np.inf, cut), cut) + 0.0


def _round_to_float32(x: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return cast("Floats", x.astype(np.float32).astype(np.float64))


def _flushed(x: Floats, smallest: int) -> Floats:
    return np.where(np.abs(x) < 2.0**smallest, 0.0, x)


def _sum_of_all(terms: Floats) -> Floats:
    """Over the last axis."""
    rows = terms.reshape(-1, terms.shape[-1]).tolist()
    nearest = [math.fsum(row) for row in rows]
    rest = [math.fsum((*row, -total)) for row, total in zip(rows, nearest, strict=True)]
    return odd(np.array(nearest), np.array(rest)).reshape(terms.shape[:-1])


def mma(c: Floats, a: Floats, b: Floats, dtype: str, unit: Unit | None = None) -> Floats:
    """D = C + A B^T over a chain of steps.

    a (..., M, K) and b (..., N, K) hold values of `dtype` ("bf16" or "fp16"), c (..., M, N) float32 values; all given
    as float64. K a multiple of the unit's step. Returns (..., M, N) float32 values as float64. unit: by default what
    `predicting` says, Hopper's outside of it.
    """
    unit = unit or _UNITS.get()[dtype]
    smallest = SMALLEST_EXPONENT[dtype]
    flush = unit.subnormals == "flushed"
    if flush:
        a, b, c = _flushed(a, smallest), _flushed(b, smallest), _flushed(c, -126)
    exponent_a, exponent_b = _exponent(a, smallest), _exponent(b, smallest)
    d = c
    holds = unit.fraction_bits is None or unit.fraction_bits >= 23  # a step of zeros leaves an accumulator as it is
    for k in range(0, a.shape[-1], unit.step):
        here = slice(k, k + unit.step)
        if holds and not a[..., here].any() and np.isfinite(b[..., here]).all():
            d = d + 0.0
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            products = a[..., :, None, here] * b[..., None, :, here]
            exponents = exponent_a[..., :, None, here] + exponent_b[..., None, :, here]
            special = ~(np.isfinite(products).all(-1) & np.isfinite(d))
            terms, added = np.where(special[..., None], 0.0, products), np.where(special, 0.0, d)
            d = np.where(special, products.sum(-1) + d, _step(terms, exponents, added, unit))
        d = _flushed(d, -126) if flush else d
    return d


def _step(products: Floats, exponents: npt.NDArray[np.int64], d: Floats, unit: Unit) -> Floats:
    """One step on finite numbers; exponents are the products' as stored."""
    joins = unit.accumulator == "joins"
    to_float32 = _truncate_to_float32 if unit.rounding == "truncate" else _round_to_float32
    if unit.fraction_bits is None:
        total = _sum_of_all(np.concatenate([products, d[..., None]], -1) if joins else products)
    else:
        normalised = unit.exponents == "normalised"
        largest = (_exponent(products, -10_000) if normalised else exponents).max(-1)
        if joins:
            largest = np.maximum(largest, _exponent(d, -10_000 if normalised else -126))
        shift = np.where(largest < _NOTHING // 2, 0, unit.fraction_bits - largest)
        align = _ALIGN[unit.alignment]
        total = align(np.ldexp(products, shift[..., None])).sum(-1)
        if joins:
            total = total + align(np.ldexp(d, shift))
        total = np.ldexp(total, -shift)
    rounded = to_float32(total) + 0.0
    return rounded if joins else to_float32(sum_of_two(rounded, d)) + 0.0


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
