"""MXFP4, exact: quantise, dequantise, pack and lay out blocks of 32 E2M1 codes with one E8M0 scale.

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 (E2M1), 5.4.1 (E8M0) and 6.3 (conversion).
Everything works on the bits of the floats with integers, so no result depends on the rounding mode, on
log2 or on flush-to-zero. Policies, where the specification leaves a choice (docs/format.md):

-0          keeps its sign (code 8), and so does a negative value that rounds to zero
all-zero    scale byte 0
tiny block  scale byte 0, the elements rounded on the grid of 2^-127
huge block  elements saturate to +-6; bytes 254 and 255 are never produced
NaN, Inf    UserError
byte 0      decodes as 2^-127, byte 255 as NaN for all 32 elements, zeros included
range       decoding rounds the exact value once, to nearest, ties to even, as IEEE 754 does: past the largest
            finite value it is a signed Inf, under half the smallest subnormal a signed zero
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal, NamedTuple

import torch

from mxharness.errors import UserError

BLOCK = 32
"""Elements that share a scale."""
BLOCK_BYTES = 17
"""16 bytes of codes and a scale: 4.25 bits per element."""
CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each E2M1 code: sign bit, two exponent bits of bias 1, one mantissa bit; no Inf, no NaN."""
SCALE_BIAS = 127
"""Scale byte s is 2^(s - 127) for s = 0..254."""
SCALE_NAN = 255
"""The scale byte that makes its 32 elements NaN."""

SCALE_RULES = ("floor", "even", "rceil", "ceil")
TIE_RULES = ("even", "zero", "away")

# Added to the bits of amax before its exponent is cut out, less 2 (E2M1's largest exponent): what carries into
# the exponent is a mantissa of at least 1.75 (even), above 1.5 (rceil: 6 = 1.5 * 4), above 1 (ceil).
_CARRY = {"floor": 0, "even": 0x200000, "rceil": 0x3FFFFF, "ceil": 0x7FFFFF}
_INFINITY = 0x7F800000
# dtype: (mantissa bits, exponent bits, integer dtype of one value, integer dtype of two)
_FLOATS = {
    torch.float32: (23, 8, torch.int32, torch.int64),
    torch.bfloat16: (7, 8, torch.int16, torch.int32),
    torch.float16: (10, 5, torch.int16, torch.int32),
}


class Quantized(NamedTuple):
    """MXFP4 in the form every function here takes: linear codes, scales apart."""

    codes: torch.Tensor  # (..., K/2) uint8, element 2i in the low nibble, 2i + 1 in the high one
    scales: torch.Tensor  # (..., K/32) uint8


class Packed(NamedTuple):
    """MXFP4 in the bytes of some layout."""

    data: torch.Tensor  # (..., K/2) uint8, or (..., K/32 * 17) where the scale lies in the block
    scales: torch.Tensor | None  # (..., K/32) uint8, or None where the scale lies in the block


@dataclass(frozen=True)
class Layout:
    """Where the 16 bytes of codes and the scale of a block lie."""

    nibbles: Literal["linear-low", "linear-high", "split"]
    """Byte i holds elements 2i and 2i + 1, the first in its low or high nibble; or i (low) and i + 16 (high)."""
    scale: Literal["separate", "first", "last"]
    """In a tensor of its own, or as first or last byte of 17-byte blocks."""
    seen_in: str
    """Software that stores weights this way."""


LAYOUTS: dict[str, Layout] = {
    "linear": Layout("linear-low", "separate", "gpt-oss, transformers, torchao, compressed-tensors, Quark, MLX"),
    "gguf": Layout("split", "first", "ggml type 39, llama.cpp"),
    "scale_last": Layout("linear-low", "last", "17-byte structs with the scale behind the codes"),
    "high_first": Layout("linear-high", "separate", "torchao up to 0.13"),
}


def quantize(x: torch.Tensor, scale_rule: str = "floor", tie_rule: str = "even") -> Quantized:
    """`x` rounded to MXFP4, each row padded with zeros to whole blocks.

    x: (..., K) float32, bf16 or fp16, on any device. Returns codes (..., Kp/2) and scales (..., Kp/32), uint8, where
    Kp is K rounded up to a multiple of 32; no block straddles rows.

    scale_rule, for the block's largest magnitude amax (clamped to byte 0):
      floor  the largest 2^e with 4 * 2^e <= amax, as OCP MX 6.3; amax saturates above 6 * 2^e
      even   the largest 2^e with 3.5 * 2^e <= amax: the floor of amax rounded to E2M1's precision
      rceil  the smallest 2^e with 6 * 2^e >= amax; nothing saturates
      ceil   the smallest 2^e with 4 * 2^e >= amax
    tie_rule: halfway between two values take the even code, the smaller magnitude or the larger one.

    Raises UserError for another dtype or rule, for a scalar, and for NaN or Inf in x.
    """
    _known("scale rule", scale_rule, SCALE_RULES)
    _known("tie rule", tie_rule, TIE_RULES)
    bits = _float32_bits(x)
    blocks = -(-x.shape[-1] // BLOCK)
    if x.shape[-1] % BLOCK:
        bits = torch.nn.functional.pad(bits, (0, blocks * BLOCK - x.shape[-1]))
    magnitude = (bits & 0x7FFFFFFF).reshape(*x.shape[:-1], blocks, BLOCK)
    amax = magnitude.amax(-1)  # (..., Kp/32) int32; the bits of floats of one sign sort like their values
    if bool((amax >= _INFINITY).any()):
        raise UserError(_not_finite(magnitude.reshape(bits.shape)))

    scales = (((amax + _CARRY[scale_rule]) >> 23) - 2).clamp_(min=0)
    limits = _limits(tie_rule, x.device)[scales.long()]  # (..., Kp/32, 7) int32
    codes = (bits < 0).to(torch.uint8).mul_(8).reshape(magnitude.shape)
    for step in range(7):
        codes += magnitude > limits[..., step, None]
    return Quantized(pack(codes.reshape(bits.shape)), scales.to(torch.uint8))


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values (..., K) of codes (..., K/2) and scales (..., K/32), both uint8, in float32, bf16 or fp16.

    Each is the exact product rounded once to `dtype`, to nearest, ties to even. float32 and bf16 hold every value but
    |v| * 2^(s-127) >= 2^128 (s = 253 with |v| >= 4, s = 254 with |v| >= 2), which is a signed Inf; fp16 is
    Inf from 2^16 on and subnormal, then zero, under 2^-14. Signs of zeros survive. s = 255 gives the
    positive quiet NaN. Raises UserError for other dtypes and for shapes that do not belong together.
    """
    if dtype not in _FLOATS:
        raise UserError(f"cannot dequantise to {dtype}; there are {_dtypes()}")
    _check(codes, scales)
    index = scales.to(torch.int32).mul_(256).unsqueeze(-1) + codes.reshape(*scales.shape, BLOCK // 2)
    pairs = _pairs(dtype, codes.device).index_select(0, index.reshape(-1))
    return pairs.view(dtype).reshape(*codes.shape[:-1], codes.shape[-1] * 2)


def unpack(codes: torch.Tensor) -> torch.Tensor:
    """The 4-bit codes (..., K) uint8 of linear bytes (..., K/2) uint8. Raises UserError for another dtype."""
    _check_bytes("codes", codes)
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Linear bytes (..., K/2) uint8 of 4-bit codes (..., K) uint8, K even.

    Raises UserError for another dtype, an odd K, or a code past 15.
    """
    _check_bytes("codes", codes)
    if codes.shape[-1] % 2:
        raise UserError(f"cannot pack an odd number of codes: shape {_shape(codes)}")
    if codes.numel() and int(codes.max()) > 15:
        raise UserError(f"a 4-bit code is 0..15; the largest here is {int(codes.max())}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def to_layout(quantized: Quantized, layout: str) -> Packed:
    """The bytes of `layout`, a key of LAYOUTS, for (..., K/2) codes and (..., K/32) scales.

    Packed.data is (..., K/2) beside Packed.scales (..., K/32) where the layout keeps scales apart, else
    (..., K/32 * 17) beside None. Raises UserError for an unknown layout and for shapes that do not belong together.
    """
    form = _layout(layout)
    codes, scales = quantized
    _check(codes, scales)
    blocks = codes.reshape(*scales.shape, BLOCK // 2)  # (..., K/32, 16)
    if form.nibbles == "linear-high":
        blocks = _swap(blocks)
    elif form.nibbles == "split":
        each = unpack(blocks)
        blocks = each[..., :16] | (each[..., 16:] << 4)
    if form.scale == "separate":
        return Packed(blocks.reshape(codes.shape), scales)
    byte = scales.unsqueeze(-1)
    data = torch.cat((byte, blocks) if form.scale == "first" else (blocks, byte), -1)
    return Packed(data.flatten(-2), None)


def from_layout(packed: Packed, layout: str) -> Quantized:
    """The inverse of `to_layout`, exact for every byte pattern.

    Raises UserError for an unknown layout, scales missing or given where the layout has none, and wrong shapes.
    """
    form = _layout(layout)
    data, scales = packed
    if form.scale == "separate":
        if scales is None:
            raise UserError(f"layout '{layout}' keeps its scales apart and none were given")
        _check(data, scales)
        blocks = data.reshape(*scales.shape, BLOCK // 2)
    else:
        if scales is not None:
            raise UserError(f"layout '{layout}' keeps its scales in the blocks; give None for scales")
        _check_bytes("data", data)
        if data.shape[-1] % BLOCK_BYTES:
            raise UserError(
                f"layout '{layout}' has rows of 17-byte blocks; {data.shape[-1]} bytes are not whole blocks"
            )
        whole = data.reshape(*data.shape[:-1], data.shape[-1] // BLOCK_BYTES, BLOCK_BYTES)
        first = form.scale == "first"
        scales = whole[..., 0 if first else 16].contiguous()
        blocks = whole[..., 1:] if first else whole[..., :16]
    if form.nibbles == "linear-high":
        blocks = _swap(blocks)
    elif form.nibbles == "split":
        blocks = pack(torch.cat((blocks & 15, blocks >> 4), -1))
    return Quantized(blocks.reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK // 2).contiguous(), scales)


def nbytes(shape: Sequence[int]) -> int:
    """Bytes that a tensor of `shape` (..., K) takes in MXFP4, codes and scales, each row padded to whole blocks."""
    if not shape:
        raise UserError("a scalar has no blocks; MXFP4 needs a shape (..., K)")
    return prod(shape[:-1]) * -(-shape[-1] // BLOCK) * BLOCK_BYTES


def _float32_bits(x: torch.Tensor) -> torch.Tensor:
    """The bits (..., K) int32 of x as float32, exact for its three dtypes."""
    if x.dtype not in _FLOATS:
        raise UserError(f"cannot quantise {x.dtype}; there are {_dtypes()}")
    if x.ndim == 0:
        raise UserError("cannot quantise a scalar; MXFP4 needs a shape (..., K)")
    x = x.detach()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).to(torch.int32) << 16
    return x.to(torch.float32).view(torch.int32)


def _not_finite(magnitude: torch.Tensor) -> str:
    nan = magnitude > _INFINITY
    kind, hit = ("NaN", nan) if bool(nan.any()) else ("Inf", magnitude == _INFINITY)
    where = hit.nonzero()
    return f"cannot quantise {kind}: there are {len(where)} in x, the first at {where[0].tolist()}; MXFP4 holds neither"


def _encode(integer: int, exponent: int, mantissa_bits: int, exponent_bits: int) -> int:
    """The bits of integer * 2^exponent >= 0 in an IEEE format: to nearest, ties to even, Inf past the largest."""
    if integer == 0:
        return 0
    smallest = 2 - (1 << (exponent_bits - 1)) - mantissa_bits  # exponent of the smallest subnormal
    last = max(exponent + integer.bit_length() - 1 - mantissa_bits, smallest)  # of the last place
    if exponent >= last:
        significand = integer << (exponent - last)
    else:
        significand, rest = divmod(integer, 1 << (last - exponent))
        half = 1 << (last - exponent - 1)
        significand += rest > half or (rest == half and significand % 2 == 1)
    # The leading bit of a normal significand adds one to the exponent field; so does a carry from rounding.
    infinity = ((1 << exponent_bits) - 1) << mantissa_bits
    return min(((last - smallest) << mantissa_bits) + significand, infinity)


@lru_cache(maxsize=16)
def _limits(tie_rule: str, device: torch.device) -> torch.Tensor:
    """(254, 7) int32: for scale byte s, |x| is past rounding limit i if its float32 bits are greater than [s, i].

    Limit i lies halfway between codes i and i + 1. Where a tie goes up, the limit is one float less.
    """
    quarters = (1, 3, 5, 7, 10, 14, 20)
    up = {"even": (0, 1, 0, 1, 0, 1, 0), "zero": (0,) * 7, "away": (1,) * 7}[tie_rule]
    exponents = range(-2 - SCALE_BIAS, 254 - 2 - SCALE_BIAS)
    rows = [[_encode(q, e, 23, 8) - u for q, u in zip(quarters, up, strict=True)] for e in exponents]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@lru_cache(maxsize=16)
def _pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(256 * 256,) integers, each the bits of the two values of a byte of codes: entry s * 256 + byte."""
    mantissa_bits, exponent_bits, one, two = _FLOATS[dtype]
    sign = 1 << (mantissa_bits + exponent_bits)
    nan = sign - (1 << (mantissa_bits - 1))  # exponent and first mantissa bit set
    halves = [int(2 * value) for value in CODES[:8]]
    cells = []
    for s in range(SCALE_NAN):
        positive = [_encode(half, s - SCALE_BIAS - 1, mantissa_bits, exponent_bits) for half in halves]
        cells.append(positive + [bits - sign for bits in positive])  # as a two's complement integer
    cells.append([nan] * 16)
    table = torch.tensor(cells, dtype=one, device=device)  # (256, 16)
    byte = torch.arange(256, device=device)
    return torch.stack((table[:, byte & 15], table[:, byte >> 4]), -1).view(two).reshape(-1)


def _swap(data: torch.Tensor) -> torch.Tensor:
    return (data << 4) | (data >> 4)


def _known(what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise UserError(f"no {what} '{name}'; there are {', '.join(names)}")


def _layout(name: str) -> Layout:
    _known("layout", name, tuple(LAYOUTS))
    return LAYOUTS[name]


def _check_bytes(what: str, tensor: torch.Tensor) -> None:
    if tensor.dtype != torch.uint8:
        raise UserError(f"{what} must be torch.uint8, not {tensor.dtype}")
    if tensor.ndim == 0:
        raise UserError(f"{what} must have at least one dimension")


def _check(codes: torch.Tensor, scales: torch.Tensor) -> None:
    _check_bytes("codes", codes)
    _check_bytes("scales", scales)
    if codes.shape != (*scales.shape[:-1], scales.shape[-1] * 16):
        raise UserError(
            f"codes {_shape(codes)} and scales {_shape(scales)} do not belong together; "
            "codes are (..., K/2) and scales (..., K/32), 16 bytes of codes to a scale"
        )
    if codes.device != scales.device:
        raise UserError(f"codes are on {codes.device} and scales on {scales.device}; move one")


def _shape(tensor: torch.Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def _dtypes() -> str:
    return ", ".join(str(dtype) for dtype in _FLOATS)
