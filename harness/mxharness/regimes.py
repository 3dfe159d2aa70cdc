"""Named input distributions: what a kernel is fed, and which faults each shows.

Everything is drawn from numpy's PCG64 seeded by the case, so that the same case is the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from mxharness import mxfp4
from mxharness.op import Case

Floats = npt.NDArray[np.float64]
Generator = np.random.Generator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

EXACT = frozenset({"integers"})
"""Regimes in which every partial sum of a contraction is exact in float32, so that any order gives the same bits."""

EXACT_WIDTH = 2**24
"""Quanta within which their magnitudes sum up: a device must add integers exactly so far (facts.py)."""


DECLARED = {
    "positive": "no cancellation: truncation, which is biased, adds up",
    "offset": "a mean far from zero: a variance in one pass cancels",
    "infinite": "Inf alone decides the sign of a result",
    "nan": "NaN must reach every result that it belongs to, and no other",
    "overflow": "decoded weights past the largest number are Inf",
    "specials": "zeros of both signs, NaN, Inf, the largest number",
    "tiny": "subnormal numbers, which half holds as zeros",
    "denormal": "subnormal operands without an accumulator",
}
"""Regimes that are one-sided, or whose results are mostly NaN, Inf or zero, on purpose, and what for. A case of theirs
is judged, but it is no evidence for an operator (evidence.py)."""
DECLARED_OPTIONS = {
    "data=equal": "all tokens tie, so that nothing but their order decides",
    "nan_expert": "a NaN logit must be chosen, and reach every weight",
}
"""The same for options of a case."""


def declared(case: Case) -> str:
    """Why the case is degenerate on purpose; empty where it is not, and must not be."""
    if case.regime == "wide" and case.dtype == "fp16" and "fp32" not in case.options:
        return "results past half's range are Inf"
    if case.op == "kv_cache_read":  # rows are copied or decoded one by one: a special number spoils no other
        return ""
    found = (DECLARED_OPTIONS[option] for option in case.options if option in DECLARED_OPTIONS)
    return DECLARED.get(case.regime) or next(found, "")


def generator(case: Case, what: str = "") -> Generator:
    """The random stream of one case; `what` separates tensors that must not share numbers."""
    name = f"{case.op} {case.shape} {case.regime} {case.seed} {what}"  # not dtype and options: they meet the same data
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def _signs(rng: Generator, shape: tuple[int, ...]) -> Floats:
    return rng.choice([-1.0, 1.0], shape)


def _wide(rng: Generator, shape: tuple[int, ...], span: int) -> Floats:
    """Random mantissas and signs, exponents uniform in -span..span: a changed summation order shows."""
    return np.ldexp(_signs(rng, shape) * rng.uniform(1, 2, shape), rng.integers(-span, span + 1, shape))


def _outliers(rng: Generator, shape: tuple[int, ...]) -> Floats:
    """Normal with one channel in 64 a hundred times larger, as activations of language models have."""
    x = rng.standard_normal(shape)
    x[..., rng.integers(0, shape[-1], max(1, shape[-1] // 64))] *= 100
    return x


_ACTIVATIONS: dict[str, Callable[[Generator, tuple[int, ...]], Floats]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "codes": lambda rng, shape: rng.standard_normal(shape),
    "integers": lambda rng, shape: rng.integers(-4, 5, shape).astype(np.float64),
    "wide": lambda rng, shape: _wide(rng, shape, 10),
    "positive": lambda rng, shape: rng.uniform(0.5, 2, shape),
    "outliers": _outliers,
    "extreme": lambda rng, shape: rng.standard_normal(shape),
    "nan": lambda rng, shape: rng.standard_normal(shape),
    "overflow": lambda rng, shape: rng.standard_normal(shape),
    "infinite": lambda rng, shape: rng.uniform(0.5, 2, shape),
}


def activations(case: Case, shape: tuple[int, ...], what: str = "x") -> torch.Tensor:
    """Kernel inputs of case.dtype, rounded from float64; shape (.., K). what: the tensor's name, which seeds it."""
    x = _ACTIVATIONS[case.regime](generator(case, what), shape)
    return torch.from_numpy(x).to(torch.float32).to(DTYPES[case.dtype])


def bias(case: Case, N: int, what: str = "bias") -> torch.Tensor:
    """float32 (N), of the same kind as the case's activations."""
    values = _ACTIVATIONS[case.regime](generator(case, what), (N,))
    return torch.from_numpy(values).to(torch.float32)


def _exact_spread(K: int) -> int:
    """Largest spread of scale exponents for which K products of |x| <= 4, and a bias, stay below EXACT_WIDTH quanta."""
    return int(np.floor(np.log2((EXACT_WIDTH - 8) / (K * 4 * 6 / 0.5))))


def weights(case: Case, shape: tuple[int, int], what: str = "w") -> mxfp4.Quantized:
    """MXFP4 weights (N, K): real ones quantised from a normal distribution, or codes and scales drawn directly."""
    N, K = shape
    rng = generator(case, what)
    blocks = (N, K // mxfp4.BLOCK)
    if case.regime in ("normal", "outliers"):
        return mxfp4.quantize(torch.from_numpy(rng.standard_normal(shape) * 0.05).to(torch.float32))
    if case.regime == "integers":
        return integer_weights(case, shape, what, _exact_spread(K))
    codes = rng.integers(0, 16, shape, dtype=np.uint8)
    match case.regime:
        case "wide":
            scales = rng.integers(107, 148, blocks)
        case "positive":
            codes &= 7
            scales = rng.integers(124, 130, blocks)
        case "extreme":  # a row keeps near one scale, so that its sums neither vanish nor overflow
            ends = np.array([0, 1, 2, 12, 60, 127, 190, 230, 240])
            scales = np.clip(ends[rng.integers(0, len(ends), (N, 1))] + rng.integers(-1, 2, blocks), 0, 254)
        case "nan":
            scales = rng.integers(120, 132, blocks)
            scales[rng.random(blocks) < 1 / max(4, blocks[1])] = mxfp4.SCALE_NAN
        case "infinite":  # in every second row one decoded weight is Inf, and it alone decides the result's sign
            scales = rng.integers(120, 132, blocks)
            for n in range(0, N, 2):
                block, k, byte = rng.integers(0, blocks[1]), rng.integers(0, mxfp4.BLOCK), rng.integers(253, 255)
                row = codes[n, block * mxfp4.BLOCK : (block + 1) * mxfp4.BLOCK]
                row &= 8  # zeros of both signs
                row[k] |= 4 if byte == 254 else 7
                scales[n, block] = byte
        case "overflow":  # decoded weights reach 2^128, which is Inf in float32 and bfloat16
            scales = rng.integers(120, 132, blocks)
            scales[rng.random(blocks) < 1 / max(4, blocks[1])] = 254
        case _:
            scales = rng.integers(110, 140, blocks)
    return mxfp4.Quantized(mxfp4.pack(torch.from_numpy(codes)), torch.from_numpy(scales.astype(np.uint8)))


def integer_weights(case: Case, shape: tuple[int, int], what: str, spread: int, shift: int = 0) -> mxfp4.Quantized:
    """MXFP4 weights (N, K): every code under scales of 2^shift to 2^(shift + spread).

    All are integer multiples of 2^(shift - 1), so that a sum over integers is exact as long as it is not too long.
    """
    rng = generator(case, what)
    codes = rng.integers(0, 16, shape, dtype=np.uint8)
    scales = 127 + shift + rng.integers(0, spread + 1, (shape[0], shape[1] // mxfp4.BLOCK))
    return mxfp4.Quantized(mxfp4.pack(torch.from_numpy(codes)), torch.from_numpy(scales.astype(np.uint8)))


def _every_cell(shape: tuple[int, int]) -> mxfp4.Quantized:
    """Row r has scale byte r mod 256 and all 16 codes, in an order that differs by block."""
    R, K = shape
    k = np.arange(K)
    codes = ((k * 5 + k // mxfp4.BLOCK) % 16).astype(np.uint8)  # 5 is odd: each block holds every code twice
    scales = (np.arange(R)[:, None] + 37 * np.arange(K // mxfp4.BLOCK)) % 256
    packed = mxfp4.pack(torch.from_numpy(np.broadcast_to(codes, shape).copy()))
    return mxfp4.Quantized(packed, torch.from_numpy(scales.astype(np.uint8)))


def blocks(case: Case, shape: tuple[int, int]) -> mxfp4.Quantized:
    """MXFP4 data (R, K) for a decoder: "cells" holds every code under every scale byte in 256 rows."""
    if case.regime == "cells":
        return _every_cell(shape)
    rng = generator(case, "w")
    codes = rng.integers(0, 16, shape, dtype=np.uint8)
    scales = rng.integers(0, 256, (shape[0], shape[1] // mxfp4.BLOCK), dtype=np.uint8)
    return mxfp4.Quantized(mxfp4.pack(torch.from_numpy(codes)), torch.from_numpy(scales))


def _ties(rng: Generator, shape: tuple[int, ...]) -> Floats:
    """Midpoints between codes and neighbours one ulp away, under scales of one block."""
    points = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.5, 6.0, 7.0, 0.0])
    x = points[rng.integers(0, len(points), shape)] * _signs(rng, shape)
    x = x.astype(np.float32)
    nudge = rng.integers(0, 3, shape)
    x = np.where(
        nudge == 1, np.nextafter(x, np.float32(np.inf)), np.where(nudge == 2, np.nextafter(x, np.float32(-np.inf)), x)
    )
    return np.ldexp(x.astype(np.float64), int(rng.integers(-8, 9)))


def _edges(rng: Generator, shape: tuple[int, ...]) -> Floats:
    """Block maxima a few ulps around 2^k, 1.5 * 2^k and 1.75 * 2^k, where scale rules and log2 differ."""
    x = rng.uniform(-1, 1, shape)
    for row in np.ndindex(shape[:-1]):
        for first in range(0, shape[-1], mxfp4.BLOCK):
            top = np.float32(np.ldexp(rng.choice([1.0, 1.5, 1.75]), int(rng.integers(-10, 11))))
            nudge = rng.integers(-1, 2) if rng.random() < 0.5 else rng.integers(-40, 41)  # in units in the last place
            top = np.uint32(top.view(np.uint32) + np.int64(nudge)).view(np.float32)
            here = x[(*row, slice(first, first + mxfp4.BLOCK))]
            here *= float(top) * 0.99
            here[rng.integers(0, len(here))] = float(top) * rng.choice([-1.0, 1.0])
    return x


def _tiny(rng: Generator, shape: tuple[int, ...]) -> Floats:
    """Down to subnormals: blocks whose scale byte is 0, and half the smallest code."""
    return np.ldexp(_signs(rng, shape) * rng.uniform(1, 2, shape), rng.integers(-149, -118, shape))


def _specials(rng: Generator, shape: tuple[int, ...]) -> Floats:
    """Blocks of zeros of both signs, with NaN, with Inf, with the largest float32."""
    x = rng.standard_normal(shape)
    for row in np.ndindex(shape[:-1]):
        for first in range(0, shape[-1], mxfp4.BLOCK):
            here = x[(*row, slice(first, first + mxfp4.BLOCK))]
            at = rng.integers(0, len(here))
            match rng.integers(0, 6):
                case 0:
                    here[:] = 0.0
                case 1:
                    here[:] = -0.0
                case 2:
                    here[at] = np.nan
                case 3:
                    here[at] = rng.choice([-np.inf, np.inf])
                case 4:
                    here[at] = np.finfo(np.float32).max
                case _:
                    pass
    return x


_TENSORS: dict[str, Callable[[Generator, tuple[int, ...]], Floats]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "integers": lambda rng, shape: rng.integers(-4, 5, shape).astype(np.float64),
    "ties": _ties,
    "edges": _edges,
    "tiny": _tiny,
    "specials": _specials,
    "wide": lambda rng, shape: _wide(rng, shape, 40),
}


def tensor(case: Case, shape: tuple[int, ...]) -> torch.Tensor:
    """Data (R, K) of case.dtype for a quantiser."""
    with np.errstate(over="ignore"):
        x = torch.from_numpy(_TENSORS[case.regime](generator(case, "x"), shape))
    return x.to(torch.float32).to(DTYPES[case.dtype])


def operands(case: Case, P: int, K: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Operands of the tensor core: a (P, 16, K) and b (P, 8, K) of case.dtype, c (P, 16, 8) float32."""
    rng = generator(case)
    a, b, c = (rng.standard_normal(shape) for shape in ((P, 16, K), (P, 8, K), (P, 16, 8)))
    half = case.dtype == "fp16"

    def sprinkle(x: Floats, values: tuple[float, ...], share: float) -> Floats:
        return np.where(rng.random(x.shape) < share, rng.choice(values, x.shape), x)

    def spread(x: Floats, low: int, high: int) -> Floats:
        return np.ldexp(x, rng.integers(low, high, x.shape))

    match case.regime:
        case "wide":
            span = 10 if half else 30
            a, b, c = spread(a, -span, span), spread(b, -span, span), spread(c, -2 * span, 2 * span)
        case "positive":
            a, b, c = np.abs(a), np.abs(b), np.abs(c)
        case "subnormal":
            if half:
                a, b, c = spread(a, -24, -8), spread(b, -24, -8), spread(c, -44, -24)
            else:
                a, b, c = spread(a, -133, -60), spread(b, -90, -10), spread(c, -149, -110)
        case "denormal":  # the subnormal operand's stored exponent sets the unit that everything is truncated to
            low, high = (-24, -14) if half else (-133, -127)
            a, b, c = spread(a, low, high), spread(b, 0, 10) if half else spread(b, 20, 60), c * 0
        case "specials":
            a, b, c = (sprinkle(sprinkle(x, (np.inf, -np.inf, np.nan), 0.02), (0.0, -0.0), 0.05) for x in (a, b, c))
        case "integers":  # sums of up to 2^23 beside products of a few
            a, b, c = (rng.integers(-top, top + 1, x.shape).astype(float) for top, x in ((8, a), (8, b), (2**23, c)))
        case "overflow":
            if half:
                a, b, c = spread(a, 10, 14), spread(b, 10, 14), spread(c, 118, 127)
            else:
                a, b, c = spread(a, 50, 65), spread(b, 50, 64), spread(c, 110, 127)
        case _:
            pass
    dtype = DTYPES[case.dtype]
    finite = (np.where(np.isinf(x), x, np.clip(x, -3.4e38, 3.4e38)) for x in (a, b, c))
    to_float = [torch.from_numpy(x).to(torch.float32) for x in finite]
    return to_float[0].to(dtype), to_float[1].to(dtype), to_float[2]
