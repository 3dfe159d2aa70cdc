"""The format against other implementations, run as they are installed.

Each peer is compared bit for bit where it is right, and where it is known to differ the difference itself is
asserted, cell by cell, so that neither side can change unseen. A peer that is not installed is a skip that
names the comparison that did not happen; `pip install "mxharness[peers]"` installs them all.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from mxharness import golden, mxfp4
from mxharness.mxfp4 import Packed, Quantized

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
DTYPES = tuple(INTEGERS)
CODE = torch.arange(16)
SCALE = torch.arange(256)[:, None]


def peer(package: str, module: str, comparison: str) -> ModuleType:
    """`module` of `package`; without the package the test is skipped, saying what was not compared."""
    pytest.importorskip(package, reason=f"{package} is not installed; not compared: {comparison}")
    found: ModuleType = pytest.importorskip(module, reason=f"{package} has no {module}; not compared: {comparison}")
    return found


def cells() -> Quantized:
    """The 16 codes, twice, under each of the 256 scales."""
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).repeat(256, 1)
    return Quantized(mxfp4.pack(codes), torch.arange(256, dtype=torch.uint8)[:, None])


def wrong_cells(values: torch.Tensor) -> torch.Tensor:
    """(256, 16) bool: where a peer's values (256, 32) have other bits than ours; any NaN is as good as another."""
    ours = mxfp4.dequantize(*cells(), values.dtype)
    assert values.shape == ours.shape
    bits = INTEGERS[values.dtype]
    differ = (values.view(bits) != ours.view(bits)) & ~(values.isnan() & ours.isnan())
    assert torch.equal(differ[:, :16], differ[:, 16:])
    return differ[:, :16]


def data(name: str) -> torch.Tensor:
    """Inputs (256, 256) on which scale rules, tie rules and logarithms show their faults."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(256, 256, generator=generator)
    power = 2.0 ** torch.randint(-100, 100, (256, 1), generator=generator)
    if name == "ties":  # multiples of 1/4, among them every tie
        return torch.randint(-32, 33, (256, 256), generator=generator) / 4 * power
    if name == "edges":  # amax up to 60 ulps around 1, 1.5 and 1.75 times a power of two
        mantissa = torch.tensor([1.0, 1.5, 1.75])[torch.randint(0, 3, (256, 8, 1), generator=generator)]
        ulps = torch.randint(-60, 61, (256, 8, 1), generator=generator, dtype=torch.int32)
        amax = ((mantissa * power[:, None]).view(torch.int32) + ulps).view(torch.float32)
        x = normal.reshape(256, 8, 32).div(8).clamp(-1, 1) * amax
        x[..., 5:6] = amax
        return x.reshape(256, 256)
    if name in ("subnormal", "huge"):
        low, high = {"subnormal": (0, 1 << 23), "huge": (0x7E000000, 0x7F800000)}[name]
        bits = torch.randint(low, high, (256, 256), generator=generator, dtype=torch.int32)
        return bits.view(torch.float32).copysign(normal)
    return {"normal": normal, "bf16": normal.bfloat16(), "zeros": torch.zeros(256, 256).copysign(normal)}[name]


# ml_dtypes -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # numpy, where Inf is the answer
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # numpy, for the NaN of byte 255
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ml_dtypes_decodes_every_cell_the_same(dtype: torch.dtype) -> None:
    ml_dtypes = peer("ml_dtypes", "ml_dtypes", "decoding of all 4096 cells to three dtypes")
    codes, scales = cells()
    elements = mxfp4.unpack(codes).numpy().view(ml_dtypes.float4_e2m1fn).astype(numpy.float64)
    exact = elements * scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(numpy.float64)
    if dtype == torch.bfloat16:
        values = torch.from_numpy(exact.astype(ml_dtypes.bfloat16).view(numpy.int16)).view(torch.bfloat16)
    else:
        values = torch.from_numpy(exact.astype(numpy.float32 if dtype == torch.float32 else numpy.float16))
    assert wrong_cells(values).sum() == 0


@pytest.mark.parametrize("name", ["normal", "ties", "edges"])
def test_ml_dtypes_rounds_elements_the_same(name: str) -> None:
    """Under the floor rule, each element over its scale, rounded by ml_dtypes: nearest even, saturated here."""
    ml_dtypes = peer("ml_dtypes", "ml_dtypes", "rounding of elements to E2M1")
    x = data(name)
    codes, scales = mxfp4.quantize(x)
    scaled = x.double() / (2.0 ** (scales.double() - 127)).repeat_interleave(32, -1)
    theirs = scaled.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).view(numpy.uint8)
    assert torch.equal(torch.from_numpy(theirs), mxfp4.unpack(codes))


# torchao -------------------------------------------------------------------------------------------------------


def torchao(comparison: str) -> ModuleType:
    return peer("torchao", "torchao.prototype.mx_formats.mx_tensor", comparison)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchao_decodes_every_cell_the_same_but_for_fp16(dtype: torch.dtype) -> None:
    """In fp16 torchao casts the scale first: Inf from byte 143 on, so zeros become NaN; 0 or inexact up to byte 102."""
    mx_tensor = torchao("decoding of all 4096 cells to three dtypes")
    codes, scales = cells()
    values = mx_tensor.to_dtype(codes, scales.view(torch.float8_e8m0fnu), torch.float4_e2m1fn_x2, 32, dtype)
    wrong = wrong_cells(values)
    if dtype != torch.float16:
        assert wrong.sum() == 0
        return
    zeros = (CODE % 8 == 0) & (SCALE >= 143) & (SCALE < 255)  # 0 * Inf
    lost = (SCALE == 143) & (CODE % 8 == 1)  # 0.5 * 2^16 is finite
    lost |= (SCALE == 102) & (CODE % 8 >= 3) | (SCALE == 101) & (CODE % 8 >= 5) | (SCALE == 100) & (CODE % 8 == 7)
    assert torch.equal(wrong, zeros | lost)
    assert wrong.sum() == 244
    assert values[:, :16][zeros].isnan().all()


@pytest.mark.parametrize("rule", mxfp4.SCALE_RULES)
@pytest.mark.parametrize("name", ["normal", "bf16", "ties", "edges", "subnormal", "huge", "zeros"])
def test_torchao_quantises_the_same(name: str, rule: str) -> None:
    """Codes, their packing and scales under each rule, ties to even. Two deviations are torchao's own.

    Where a scale byte is 0, torchao divides by 2^-126 (1 under rceil) and decodes with 2^-127. Under rceil it takes
    ceil(log2(amax / 6)) in float32, one too low for an amax some ulps above 6 * 2^e.
    """
    mx_tensor = torchao("quantisation under its four scale rules")
    x = data(name)
    mode = mx_tensor.ScaleCalculationMode(rule)
    scales, codes = mx_tensor.to_mx(x, torch.float4_e2m1fn_x2, 32, mode)
    ours = mxfp4.quantize(x, rule)
    same_scale = scales.view(torch.uint8) == ours.scales
    same_codes = (codes == ours.codes).reshape(256, 8, 16).all(-1)
    if name == "edges" and rule == "rceil":
        lost = ~same_scale
        theirs = scales.view(torch.uint8)[lost]
        ratio = x.double().abs().reshape(256, 8, 32).amax(-1)[lost] / (6 * 2.0 ** (theirs.double() - 127))
        assert lost.any()
        assert torch.equal(ours.scales[lost], theirs + 1)
        assert bool(((ratio > 1) & (ratio < 1 + 2.0**-17)).all())
        assert same_codes[same_scale].all()
    elif name == "subnormal":
        assert same_scale.all()
        assert (ours.scales == 0).all()
        assert not same_codes.all()
    else:
        assert same_scale.all()
        assert same_codes.all()


# gguf-py -------------------------------------------------------------------------------------------------------


def gguf(comparison: str) -> ModuleType:
    return peer("gguf", "gguf", comparison)


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in multiply:RuntimeWarning"
)  # gguf-py, where Inf is the answer
def test_gguf_decodes_every_cell_the_same_but_for_minus_zero_and_byte_255() -> None:
    """gguf-py's code table has no -0, and byte 255 is 2^128 to it: only 0.5 stays finite."""
    module = gguf("decoding of all 4096 cells in GGUF's block layout")
    data_bytes, _ = mxfp4.to_layout(cells(), "gguf")
    values = torch.from_numpy(module.quants.dequantize(data_bytes.numpy(), module.GGMLQuantizationType.MXFP4))
    assert torch.equal(wrong_cells(values), ((CODE == 8) | (SCALE == 255)).expand(256, 16))
    assert values[:, 8].view(torch.int32).eq(0).all()  # +0
    assert not values[255].isnan().any()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # gguf-py, at 2^127 and above
@pytest.mark.parametrize("name", ["normal", "ties", "edges", "huge", "zeros"])
def test_gguf_quantises_the_same(name: str) -> None:
    """The floor rule with ties toward zero, in 17-byte blocks, scale first, split nibbles.

    Two deviations are gguf-py's: zeros have no sign, and floor(log2(amax)) in float32 is one too high for an amax some
    ulps under 2^k.
    """
    module = gguf("quantisation in GGUF's block layout")
    x = data(name)
    theirs = torch.from_numpy(module.quants.quantize(x.numpy(), module.GGMLQuantizationType.MXFP4))
    ours = mxfp4.quantize(x, "floor", "zero")
    codes = mxfp4.unpack(ours.codes)
    unsigned = Quantized(mxfp4.pack(torch.where(codes == 8, 0, codes).to(torch.uint8)), ours.scales)
    packed, _ = mxfp4.to_layout(unsigned, "gguf")
    same = (theirs == packed).reshape(256, 8, 17).all(-1)
    if name != "edges":
        assert same.all()
        return
    mantissa, _ = x.abs().reshape(256, 8, 32).amax(-1).frexp()  # 0.5 <= mantissa < 1
    assert (~same).any()
    assert (mantissa[~same] >= 1 - 44 * 2.0**-24).all()
    back = mxfp4.from_layout(Packed(theirs, None), "gguf").scales
    assert torch.equal(back[~same], ours.scales[~same] + 1)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the deviation below
def test_gguf_wraps_the_scale_of_a_tiny_block() -> None:
    """A negative exponent cast to uint8: 1e-40 comes back as 1e37 or so. Ours is byte 0."""
    module = gguf("quantisation of subnormal data")
    x = torch.full((1, 32), 1e-40)
    theirs = torch.from_numpy(module.quants.quantize(x.numpy(), module.GGMLQuantizationType.MXFP4))
    assert theirs[0, 0] > 240
    assert mxfp4.quantize(x).scales.tolist() == [[0]]


# compressed-tensors --------------------------------------------------------------------------------------------


def compressed_tensors(comparison: str) -> tuple[ModuleType, Any]:
    """The package's compressors and its MXFP4 scheme."""
    compressors = peer("compressed_tensors", "compressed_tensors.compressors", comparison)
    quantization = peer("compressed_tensors", "compressed_tensors.quantization", comparison)
    return compressors, quantization.preset_name_to_scheme("MXFP4A16", ["Linear"])


def test_compressed_tensors_decodes_every_cell_the_same_but_for_byte_255() -> None:
    """To bf16, the dtype it unpacks to; byte 255 is 2^128 to it: Inf, and NaN for zeros."""
    compressors, scheme = compressed_tensors("decoding of all 4096 cells to bf16")
    codes, scales = cells()
    state = {"weight_packed": codes, "weight_scale": scales}
    values = compressors.MXFP4PackedCompressor.decompress(state, scheme)["weight"]
    assert values.dtype == torch.bfloat16
    assert torch.equal(wrong_cells(values), ((SCALE == 255) & (CODE % 8 != 0)).expand(256, 16))
    assert values[255].isinf().sum() == 28


@pytest.mark.parametrize("name", ["normal", "bf16", "ties", "edges", "subnormal", "huge", "zeros"])
def test_compressed_tensors_quantises_the_same(name: str) -> None:
    """The even rule with ties to even, linear packing, low nibble first. Two deviations are compressed-tensors' own.

    A -0 loses its sign, though a negative value that rounds to zero keeps it; and amax of 1.75 * 2^127 or more rounds
    to Inf.
    """
    compressors, scheme = compressed_tensors("quantisation under the even rule")
    utils = peer("compressed_tensors", "compressed_tensors.quantization.utils", "quantisation under the even rule")
    x = data(name)
    blocks = x.reshape(256, 8, 32)
    scale, _ = utils.calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
    state = compressors.MXFP4PackedCompressor.compress({"weight": x, "weight_scale": scale}, scheme)
    ours = mxfp4.quantize(x, "even")
    codes = torch.where((x == 0) & x.signbit(), 0, mxfp4.unpack(ours.codes)).reshape(256, 8, 32)
    same = (state["weight_scale"] == ours.scales) & (
        mxfp4.unpack(state["weight_packed"]).reshape(256, 8, 32) == codes
    ).all(-1)
    assert torch.equal(same, blocks.abs().amax(-1) < 1.75 * 2.0**127)


# torch ---------------------------------------------------------------------------------------------------------


def test_torch_reads_scale_bytes_the_same() -> None:
    """torch.float8_e8m0fnu against the reference: every byte, 255 as NaN."""
    scales = torch.arange(256, dtype=torch.uint8)
    values = scales.view(torch.float8_e8m0fnu).to(torch.float32)
    want = golden.decode(torch.full((256, 32), 2, dtype=torch.uint8), scales[:, None])[:, 0].float()  # code 2 is 1
    assert torch.equal(values[:255].view(torch.int32), want[:255].view(torch.int32))
    assert values[255].isnan()
