"""The format itself, bit for bit: every code under every scale, every policy, every wrong call."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import pytest
import torch
from mxharness import golden, mxfp4
from mxharness.errors import UserError
from mxharness.mxfp4 import LAYOUTS, Packed, Quantized

INTEGERS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.uint8: torch.uint8,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUIET_NAN = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}


def differences(got: torch.Tensor, want: torch.Tensor) -> str:
    """Empty where both have the same dtype, shape and bits; else what differs, and where first."""
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        return f"got {got.dtype} {tuple(got.shape)}, should be {want.dtype} {tuple(want.shape)}"
    bad = got.contiguous().view(INTEGERS[got.dtype]) != want.contiguous().view(INTEGERS[got.dtype])
    if not bad.any():
        return ""
    first = tuple(bad.nonzero()[0].tolist())
    return f"{int(bad.sum())} of {bad.numel()} differ; {first}: got {got[first].item()}, should be {want[first].item()}"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@lru_cache
def cells() -> tuple[Quantized, torch.Tensor]:
    """All 16 codes twice under all 256 scales, and their exact values (256, 32) float64."""
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    return Quantized(mxfp4.pack(codes), scales), golden.decode(codes, scales)


def test_codes_are_e2m1() -> None:
    """Sign, two exponent bits of bias 1, one mantissa bit, as OCP MX 1.0 section 5.3.3 writes it out."""
    for code, value in enumerate(mxfp4.CODES):
        exponent, mantissa = code >> 1 & 3, code & 1
        magnitude = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
        assert abs(value) == magnitude
        assert math.copysign(1, value) == (-1 if code & 8 else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_cell_decodes_exactly(dtype: torch.dtype) -> None:
    quantized, exact = cells()
    values = mxfp4.dequantize(*quantized, dtype)
    assert differences(values[:255], exact[:255].to(dtype)) == ""  # at most two significant bits: one rounding
    assert values[255].view(INTEGERS[dtype]).tolist() == [QUIET_NAN[dtype]] * 32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_cell_decodes_exactly_under_flush_to_zero(dtype: torch.dtype) -> None:
    """Subnormals read and written as zero by every float instruction; the table of values built in that mode."""
    quantized, exact = cells()
    want = exact[:255].to(dtype)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no flush-to-zero mode: decoding under it was not tested")
    try:
        mxfp4._pairs.cache_clear()
        values = mxfp4.dequantize(*quantized, dtype)
    finally:
        torch.set_flush_denormal(False)
    assert differences(values[:255], want) == ""


@pytest.mark.parametrize(
    ("dtype", "scale", "code", "bits"),
    [
        (torch.float32, 0, 1, 0x00200000),  # 2^-128, subnormal
        (torch.bfloat16, 0, 1, 0x0020),
        (torch.float32, 1, 1, 0x00400000),
        (torch.float32, 127, 7, 0x40C00000),  # 6
        (torch.float32, 127, 8, -(2**31)),  # -0
        (torch.float32, 253, 5, 0x7F400000),  # 3 * 2^126
        (torch.float32, 253, 6, 0x7F800000),  # 4 * 2^126: Inf
        (torch.float32, 254, 3, 0x7F400000),  # 1.5 * 2^127
        (torch.float32, 254, 12, -(2**31) + 0x7F800000),  # -2 * 2^127: -Inf
        (torch.float32, 254, 0, 0),
        (torch.bfloat16, 254, 4, 0x7F80),
        (torch.float16, 140, 7, 0x7A00),  # 6 * 2^13 = 49152
        (torch.float16, 141, 6, 0x7C00),  # 4 * 2^14 = 65536: Inf
        (torch.float16, 141, 5, 0x7A00),  # 3 * 2^14
        (torch.float16, 254, 8, -(2**15)),  # -0, not NaN
        (torch.float16, 103, 2, 0x0001),  # 2^-24, the smallest subnormal
        (torch.float16, 102, 2, 0x0000),  # 2^-25: a tie, to even
        (torch.float16, 102, 3, 0x0001),  # 1.5 * 2^-25: up
        (torch.float16, 102, 10, -(2**15)),  # -2^-25: -0
        (torch.float16, 103, 3, 0x0002),  # 1.5 * 2^-24: a tie, to even
    ],
)
def test_cells_written_out(dtype: torch.dtype, scale: int, code: int, bits: int) -> None:
    codes = torch.full((1, 16), code * 17, dtype=torch.uint8)
    values = mxfp4.dequantize(codes, torch.tensor([[scale]], dtype=torch.uint8), dtype)
    assert values.view(INTEGERS[dtype]).tolist() == [[bits] * 32]


@pytest.mark.parametrize(
    ("scale_rule", "byte", "code"),
    # amax = 2^127 * (2 - 2^-23), the largest float32: 7.99.. * 2^125, and 3.99.. * 2^126 one scale up
    [("floor", 252, 7), ("even", 253, 6), ("rceil", 253, 6), ("ceil", 253, 6)],
)
def test_the_largest_float_saturates_and_stays_finite(scale_rule: str, byte: int, code: int) -> None:
    x = torch.full((1, 32), torch.finfo(torch.float32).max)
    quantized = mxfp4.quantize(x, scale_rule)
    assert quantized.scales.tolist() == [[byte]]
    assert quantized.codes.tolist() == [[code * 17] * 16]


def test_an_all_zero_block_has_byte_0_and_keeps_its_signs() -> None:
    x = torch.zeros(1, 64)
    x[0, 32:] = -0.0
    quantized = mxfp4.quantize(x)
    assert quantized.scales.tolist() == [[0, 0]]
    assert quantized.codes.tolist() == [[0x00] * 16 + [0x88] * 16]


def test_a_negative_value_that_rounds_to_zero_keeps_its_sign() -> None:
    x = torch.tensor([[4.0, -0.1, 0.1, -0.0] + [0.0] * 28])
    assert mxfp4.unpack(mxfp4.quantize(x).codes)[0, :4].tolist() == [6, 8, 0, 8]


@pytest.mark.parametrize("columns", [1, 31, 33, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_padded_one_by_one(columns: int, dtype: torch.dtype) -> None:
    """No block straddles two rows: each row gives the bytes that it gives alone, behind zeros."""
    x = (torch.randn(2, 3, columns, generator=generator()) * 2.0 ** torch.arange(3)[:, None]).to(dtype)
    quantized = mxfp4.quantize(x)
    blocks = math.ceil(columns / 32)
    assert quantized.codes.shape == (2, 3, blocks * 16)
    assert quantized.scales.shape == (2, 3, blocks)
    for i, j in itertools.product(range(2), range(3)):
        row = mxfp4.quantize(torch.cat((x[i, j], torch.zeros(blocks * 32 - columns, dtype=dtype))))
        assert differences(quantized.codes[i, j], row.codes) == ""
        assert differences(quantized.scales[i, j], row.scales) == ""
    assert not mxfp4.unpack(quantized.codes)[..., columns:].any()


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (32,), (2, 0, 5)])
def test_empty_and_one_dimensional_tensors(shape: tuple[int, ...]) -> None:
    quantized = mxfp4.quantize(torch.ones(shape))
    values = mxfp4.dequantize(*quantized)
    assert values.shape == (*shape[:-1], math.ceil(shape[-1] / 32) * 32)
    for layout in LAYOUTS:
        back = mxfp4.from_layout(mxfp4.to_layout(quantized, layout), layout)
        assert differences(back.codes, quantized.codes) == ""
        assert differences(back.scales, quantized.scales) == ""


def test_strided_input_is_read_by_value() -> None:
    x = torch.randn(64, 96, generator=generator())
    assert differences(mxfp4.quantize(x.T).codes, mxfp4.quantize(x.T.contiguous()).codes) == ""
    codes, scales = mxfp4.quantize(x)
    assert differences(mxfp4.dequantize(codes[::2], scales[::2]), mxfp4.dequantize(codes, scales)[::2]) == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: decoding CUDA tensors was not tested")
def test_cuda_tensors_decode_to_the_same_bits() -> None:
    codes, scales = cells()[0]
    for dtype in DTYPES:
        values = mxfp4.dequantize(codes.cuda(), scales.cuda(), dtype).cpu()
        assert differences(values, mxfp4.dequantize(codes, scales, dtype)) == ""


def bad(shape: tuple[int, ...], at: tuple[int, ...], value: float) -> torch.Tensor:
    x = torch.zeros(shape)
    x[at] = value
    return x


BYTES = torch.zeros(2, 32, dtype=torch.uint8)
SCALES = torch.zeros(2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mxfp4.quantize(bad((2, 40), (1, 35), math.nan)), r"quantise NaN: there are 1 in x, .* at \[1, 35\]"),
        (lambda: mxfp4.quantize(bad((2, 40), (0,), -math.inf)), r"quantise Inf: there are 40 in x, .* at \[0, 0\]"),
        (lambda: mxfp4.quantize(bad((40,), (39,), -math.nan).half()), r"NaN: there are 1 in x, the first at \[39\]"),
        (lambda: mxfp4.quantize(torch.zeros(32, dtype=torch.float64)), "float64; there are torch.float32, torch.bf"),
        (lambda: mxfp4.quantize(torch.tensor(1.0)), "cannot quantise a scalar"),
        (lambda: mxfp4.quantize(torch.zeros(32), "round"), "no scale rule 'round'; there are floor, even, rceil, ceil"),
        (lambda: mxfp4.quantize(torch.zeros(32), "floor", "up"), "no tie rule 'up'; there are even, zero, away"),
        (
            lambda: mxfp4.dequantize(BYTES, SCALES, torch.float64),
            "dequantise to torch.float64; there are torch.float32",
        ),
        (lambda: mxfp4.dequantize(BYTES.int(), SCALES), "codes must be torch.uint8, not torch.int32"),
        (lambda: mxfp4.dequantize(BYTES, SCALES.float()), "scales must be torch.uint8, not torch.float32"),
        (lambda: mxfp4.dequantize(BYTES, SCALES[:, :1]), r"codes \(2, 32\) and scales \(2, 1\) do not belong together"),
        (lambda: mxfp4.dequantize(BYTES[:, :31], SCALES), "do not belong together"),
        (lambda: mxfp4.dequantize(BYTES[0, 0], SCALES), "codes must have at least one dimension"),
        (lambda: mxfp4.pack(BYTES[:, :31]), r"odd number of codes: shape \(2, 31\)"),
        (lambda: mxfp4.pack(BYTES + 16), "a 4-bit code is 0..15; the largest here is 16"),
        (lambda: mxfp4.unpack(BYTES.float()), "codes must be torch.uint8"),
        (lambda: mxfp4.to_layout(Quantized(BYTES, SCALES), "mlx"), "no layout 'mlx'; there are linear, gguf, scale_l"),
        (lambda: mxfp4.to_layout(Quantized(BYTES, SCALES[:1]), "gguf"), "do not belong together"),
        (lambda: mxfp4.from_layout(Packed(BYTES, SCALES), "x"), "no layout 'x'; there are linear"),
        (lambda: mxfp4.from_layout(Packed(BYTES, None), "linear"), "'linear' keeps its scales apart and none were"),
        (lambda: mxfp4.from_layout(Packed(BYTES, SCALES), "gguf"), "'gguf' keeps its scales in the blocks"),
        (lambda: mxfp4.from_layout(Packed(BYTES, None), "gguf"), "17-byte blocks; 32 bytes are not whole blocks"),
        (lambda: mxfp4.nbytes(()), "a scalar has no blocks"),
    ],
)
def test_a_wrong_call_is_one_clear_sentence(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(UserError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
