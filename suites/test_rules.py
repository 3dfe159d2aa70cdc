"""Quantisation, bit for bit against the reference: every scale rule, every tie rule, data that shows their faults."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mxharness import golden, mxfp4
from mxharness.mxfp4 import SCALE_RULES, TIE_RULES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def from_bits(low: int, high: int, shape: tuple[int, ...] = (64, 128)) -> torch.Tensor:
    """Float32 values of random sign whose magnitude bits are uniform in [low, high)."""
    bits = torch.randint(low, high, shape, generator=generator(low), dtype=torch.int32)
    return bits.view(torch.float32).copysign(torch.randn(shape, generator=generator(high)))


def tie_laden(ulps: int) -> torch.Tensor:
    """Multiples of 1/4 up to 8, where every tie lies, at every scale of float32; some moved by `ulps`."""
    quarters = torch.randint(-32, 33, (275, 32), generator=generator()).double() / 4
    x = (quarters * 2.0 ** torch.arange(-150, 125, dtype=torch.float64)[:, None]).float()
    moved = torch.rand(x.shape, generator=generator(1)) < 0.5
    return torch.where(moved & (x != 0), (x.view(torch.int32) + ulps).view(torch.float32), x)


def around_thresholds() -> torch.Tensor:
    """Blocks whose amax lies within 3 ulps of 1, 1.5 or 1.75 times every power of two, subnormal ones included."""
    mantissas = torch.tensor([0, 0x400000, 0x600000])
    bits = (torch.arange(255) << 23)[:, None, None] + mantissas[:, None] + torch.arange(-3, 4)
    amax = bits.flatten()[3:].clamp(max=0x7F7FFFFF).to(torch.int32).view(torch.float32)  # the first three are under 0
    x = (torch.rand(len(amax), 32, generator=generator()) * 2 - 1) * amax[:, None]
    x[:, 7] = amax
    return x


def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    """Each finite value of a 16-bit float once, shuffled."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = values[values.isfinite()]
    return values[torch.randperm(len(values), generator=generator())].reshape(-1, 64)


REGIMES: dict[str, Callable[[], torch.Tensor]] = {
    "normal": lambda: torch.randn(64, 256, generator=generator()),
    "every-magnitude": lambda: from_bits(0, 0x7F800000),
    "ties": lambda: tie_laden(0),
    "above-ties": lambda: tie_laden(1),
    "under-ties": lambda: tie_laden(-1),
    "amax-around-thresholds": around_thresholds,
    "subnormal": lambda: from_bits(0, 0x00800000),
    "scale-byte-0": lambda: from_bits(0, 0x01800000),
    "smallest-subnormals": lambda: from_bits(0, 9),
    "huge": lambda: from_bits(0x7E800000, 0x7F800000),
    "zeros": lambda: torch.zeros(4, 64).copysign(torch.randn(4, 64, generator=generator())),
    "padded": lambda: torch.randn(64, 45, generator=generator()),
    "bf16": lambda: every_pattern(torch.bfloat16),
    "fp16": lambda: every_pattern(torch.float16),
}


def mismatch(x: torch.Tensor, scale_rule: str, tie_rule: str) -> str:
    """Empty where mxfp4.quantize gives the reference's bytes; else which differ, and where first."""
    codes, scales = golden.quantize(x.cpu().double(), scale_rule, tie_rule)
    got = mxfp4.quantize(x, scale_rule, tie_rule)
    for name, ours, want in (("scale", got.scales, scales), ("code", mxfp4.unpack(got.codes), codes)):
        if ours.shape != want.shape:
            return f"{name}s have shape {tuple(ours.shape)}, should be {tuple(want.shape)}"
        bad = (ours.cpu() != want).nonzero().tolist()
        if bad:
            first = tuple(bad[0])
            return f"{len(bad)} {name}s differ; {first}: got {ours[first].item()}, should be {want[first].item()}"
    return ""


@pytest.mark.parametrize("tie_rule", TIE_RULES)
@pytest.mark.parametrize("scale_rule", SCALE_RULES)
@pytest.mark.parametrize("regime", REGIMES)
def test_quantize_matches_the_reference(regime: str, scale_rule: str, tie_rule: str) -> None:
    assert mismatch(REGIMES[regime](), scale_rule, tie_rule) == ""


@pytest.mark.parametrize("regime", ["subnormal", "scale-byte-0", "smallest-subnormals", "bf16", "fp16"])
def test_quantize_under_flush_to_zero(regime: str) -> None:
    """Subnormals read and written as zero by every float instruction; the table of limits built in that mode."""
    x = REGIMES[regime]()
    codes, scales = golden.quantize(x.double(), "floor", "even")
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no flush-to-zero mode: quantising under it was not tested")
    try:
        mxfp4._limits.cache_clear()
        quantized = mxfp4.quantize(x)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(quantized.scales, scales)
    assert torch.equal(mxfp4.unpack(quantized.codes), codes)


@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70),
    scale_rule=st.sampled_from(SCALE_RULES),
    tie_rule=st.sampled_from(TIE_RULES),
)
def test_any_row_matches_the_reference(values: list[float], scale_rule: str, tie_rule: str) -> None:
    assert mismatch(torch.tensor([values], dtype=torch.float32), scale_rule, tie_rule) == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: quantising CUDA tensors was not tested")
def test_cuda_tensors_quantize_to_the_same_bytes() -> None:
    for regime, scale_rule in itertools.product(REGIMES, SCALE_RULES):
        assert mismatch(REGIMES[regime]().cuda(), scale_rule, "even") == "", regime


# Codes of amax under which a rule gives the scale back, and the scale bytes that a dtype holds exactly.
CANONICAL = {"floor": (6, 7), "even": (6, 7), "rceil": (6, 7), "ceil": (5, 6)}
EXACT_SCALES = {torch.float32: (0, 252), torch.bfloat16: (0, 252), torch.float16: (104, 140)}


@given(
    scale_rule=st.sampled_from(SCALE_RULES),
    tie_rule=st.sampled_from(TIE_RULES),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_canonical_blocks_survive_decoding_and_quantising(
    scale_rule: str, tie_rule: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    largest = data.draw(st.sampled_from(CANONICAL[scale_rule]))
    code = st.builds(lambda magnitude, sign: magnitude + sign, st.integers(0, largest), st.sampled_from((0, 8)))
    codes = data.draw(st.lists(code, min_size=32, max_size=32))
    codes[data.draw(st.integers(0, 31))] = largest
    scales = torch.tensor([data.draw(st.integers(*EXACT_SCALES[dtype]))], dtype=torch.uint8)
    packed = mxfp4.pack(torch.tensor(codes, dtype=torch.uint8))
    again = mxfp4.quantize(mxfp4.dequantize(packed, scales, dtype), scale_rule, tie_rule)
    assert torch.equal(again.scales, scales)
    assert torch.equal(again.codes, packed)


@lru_cache
def normal_blocks() -> torch.Tensor:
    return torch.randn(1 << 16, 32, generator=generator())


@pytest.mark.parametrize("deviation", [1.0, 0.02])
@pytest.mark.parametrize(("scale_rule", "end"), [("floor", 2.0), ("even", 1.75), ("rceil", 1.5)])
def test_share_of_clipped_blocks_is_the_exact_probability(scale_rule: str, end: float, deviation: float) -> None:
    """A rule clips amax = m * 2^k where m lies in (1.5, end); P(amax <= t) = erf(t / (deviation sqrt 2))^32.

    Within four standard errors. For deviation 0.02 the probabilities are 42.3, 28.1 and 0 %; for 1, 29.6, 12.7 and 0 %.
    """
    x = normal_blocks() * deviation
    largest = 6.0 * 2.0 ** (mxfp4.quantize(x, scale_rule).scales.double() - 127)
    share = float((x.abs().amax(-1, keepdim=True) > largest).double().mean())
    inside = [math.erf(m * 2.0**k / deviation / math.sqrt(2)) ** 32 for k in range(-20, 20) for m in (1.5, end)]
    exact = sum(inside[1::2]) - sum(inside[0::2])
    assert abs(share - exact) <= 4 * math.sqrt(exact * (1 - exact) / len(x))


@pytest.mark.parametrize(
    ("deviation", "scale_rule", "relative_rms"),
    [
        (0.02, "floor", 0.1140),
        (0.02, "even", 0.1121),
        (0.02, "rceil", 0.1185),
        (0.02, "ceil", 0.1370),
        (1.0, "floor", 10 ** (-18.8 / 20)),  # SQNR 18.8 dB
    ],
)
def test_error_on_normal_data_is_the_published_one(deviation: float, scale_rule: str, relative_rms: float) -> None:
    """Within four standard errors of this sample and one unit of the last digit published."""
    x = normal_blocks() * deviation
    error = (mxfp4.dequantize(*mxfp4.quantize(x, scale_rule)).double() - x).square().sum(-1)  # per block
    power = x.double().square().sum(-1)
    ratio = float(error.sum() / power.sum())
    standard_error = float((error - ratio * power).square().sum().sqrt() / power.sum())  # of a ratio of sums
    rms = math.sqrt(ratio)
    digit = 0.0001 if deviation < 1 else rms * 0.05 * math.log(10) / 20  # half of 0.1 dB
    assert abs(rms - relative_rms) <= 4 * standard_error / (2 * rms) + digit
