"""Predicted bits of what is no plain contraction: float32 arithmetic, the elementary functions, attention's core.

The predictions share no code with the kernels, so each checks the other. Here the predictions alone meet an H100's
digests, and models that differ in one rounding or in one order do not.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from mxharness import baseline, paths, tensor_core
from mxharness.execution import Execution
from mxharness.float32 import fma
from mxharness.judge import digest, judge
from mxharness.judge.compare import INTEGERS
from mxharness.ops import attention_bits, elementary_bits, find
from mxharness.tensor_core import Unit

# ---------------------------------------------------------------------------------------------- one rounding


def nearest(value: Fraction) -> float:
    """The float32 nearest to an exact number, ties to the even one: by its definition."""
    size = abs(value)
    exponent = max(size.numerator.bit_length() - size.denominator.bit_length() - 1, -126)
    exponent += exponent > -126 and size >= Fraction(2) ** (exponent + 1)
    unit = Fraction(2) ** (exponent - 23)
    rounded = round(size / unit) * unit
    return float("inf") if rounded >= Fraction(2) ** 128 else float(rounded)


def triples() -> np.ndarray:
    """Factors and addends (3, n): any, products that the addend nearly cancels, sums next to a tie, subnormal ones."""
    rng = np.random.default_rng(0)
    any_bits = rng.integers(0, 2**32, (3, 500), dtype=np.uint32).view(np.float32)
    a, b = rng.uniform(1, 2, (2, 500)).astype(np.float32)
    cancelled = np.stack((a, b, -(a * b)))
    # Products half-way between two neighbours, of which the lower and the upper one is even.
    ties = np.array([(1 + 2.0**-12, 1 + 2.0**-12), (1 + 2.0**-12, 1 + 3 * 2.0**-12)], np.float32).repeat(250, 0).T
    tiny = np.ldexp(rng.uniform(-1, 1, 500), rng.integers(-149, -60, 500)).astype(np.float32)
    ties = np.concatenate((ties, tiny[None]))
    halves = np.stack((np.ldexp(a, -70), np.ldexp(b, -70), np.ldexp(rng.integers(-9, 9, 500), -149).astype(np.float32)))
    found = np.concatenate((any_bits, cancelled, ties, halves.astype(np.float32)), 1)
    return found[:, np.isfinite(found).all(0)]


def test_a_fused_multiply_add_is_rounded_once():
    a, b, c = triples()
    with np.errstate(all="ignore"):
        got = fma(a, b, c)
        twice = (a.astype(np.float64) * b + c).astype(np.float32)
    exact = [
        Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    assert np.abs(got).tolist() == [nearest(value) for value in exact]
    assert all((value < 0) == (y < 0) for value, y in zip(exact, got.tolist(), strict=True) if y)
    assert (twice != got).sum() > 100, "the numbers must tell one rounding from two"


def test_of_no_numbers_a_fused_multiply_add_is_what_ieee_says():
    inf, nan = np.inf, np.nan
    a, b, c = (
        np.array(x, np.float32) for x in ((inf, inf, 0, nan, 2, -0.0), (1, 1, inf, 1, 3, 1), (1, -inf, 1, 1, inf, 0))
    )
    with np.errstate(all="ignore"):
        assert str(fma(a, b, c).tolist()) == "[inf, nan, nan, nan, inf, 0.0]"


@pytest.mark.parametrize("bits", [22, 25, 30, None])
@pytest.mark.parametrize("accumulator", ["joins", "after"])
@pytest.mark.parametrize("rounding", ["truncate", "nearest"])
def test_a_step_of_zeros_is_what_the_unit_makes_of_it(bits, accumulator, rounding):
    """Steps without products are not computed; beside a row that has some they are."""
    unit = Unit(fraction_bits=bits, accumulator=accumulator, rounding=rounding)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((rows, 64)).astype(np.float16).astype(np.float64) for rows in (3, 5))
    c = rng.standard_normal((3, 5)).astype(np.float32).astype(np.float64)
    c[0, 0], c[1, 1] = -0.0, -(2.0**-149)
    for empty in ((16, 32), (48, 64), (0, 64)):
        a[:2, slice(*empty)] = 0.0
        alone, beside = tensor_core.mma(c[:2], a[:2], b, "fp16", unit), tensor_core.mma(c, a, b, "fp16", unit)
        assert alone.view(np.int64).tolist() == beside[:2].view(np.int64).tolist()
        assert (beside[2] != c[2]).all()


# ---------------------------------------------------------------------------------------------- an H100's digests


@cache
def blessed() -> dict[str, str]:
    """Of the newest baseline of an H100, by check."""
    newest = max(
        (b for b in baseline.list_baselines(paths.baselines()) if b.device_class == "sm_90"), key=lambda b: b.created
    )
    return baseline.digests("sm_90", newest.name, paths.baselines())


@pytest.mark.parametrize("name", ["attention", "elementary", "swiglu", "rms_norm", "layer_norm"])
def test_predictions_have_the_digests_of_an_h100(name):
    op = find(name)
    cases = [case for case in op.cases if baseline.key(str(case), "bound") in blessed()]
    assert len(cases) >= 34
    for case in cases:
        inputs = op.make_inputs(case)
        first = op.predict(case, inputs)
        found = op.predict(case, {**inputs, **first})  # a norm's sum is what its second stage reads
        assert digest(found) == blessed()[baseline.key(str(case), "bound")], repr(case)


def library_exp2(x):
    return np.exp2(x.astype(np.float64)).astype(np.float32)


def approximate_exp2(x, exact=elementary_bits.exp2):
    """As near as a GPU's own unit, 2^-22."""
    return (exact(x) * np.float32(1 - 2.0**-22)).astype(np.float32)


def product_rounded_first(s, factor, top):
    return s * factor - attention_bits._base(top) + attention_bits.GRID - attention_bits.GRID


def without_a_factor(z, dtype):
    return attention_bits._power(z)


def from_the_last(*bounds):
    return reversed(range(*bounds))


def bits():
    """Predictions of attention in half, which keeps more bits than bfloat16, and where sums that cancel show most."""
    op = find("attention")
    cases = [case for case in op.cases if case.dtype == "fp16" and case.regime in ("cancelling", "normal")]
    return {str(case): op.predict(case, op.make_inputs(case))["y"].view(torch.int16) for case in cases}


@cache
def declared():
    return bits()


def others():
    """Elements with other bits than the declared arithmetic's."""
    return sum(int((y != declared()[case]).sum()) for case, y in bits().items())


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("GRID", np.float32(1536)),
        ("_raised", product_rounded_first),
        ("_weight", without_a_factor),
        ("range", from_the_last),
    ],
    ids=["finer exponents", "a product rounded first", "weights without a factor", "last chunk first"],
)
def test_another_arithmetic_has_other_bits(what, other, monkeypatch):
    """A prediction that any order and any rounding would meet proves nothing."""
    assert declared()
    monkeypatch.setattr(attention_bits, what, other, raising=False)
    assert others() > 0


@pytest.mark.parametrize("power", [library_exp2, approximate_exp2])
def test_weights_do_not_hang_on_who_computes_a_power_of_two(power, monkeypatch):
    """Their exponents lie where a GPU's own unit is sure of the rounding to 16 bits; sinks are left as they are."""
    assert declared()
    alone = {case for case in declared() if "sinks" not in case}
    monkeypatch.setattr(elementary_bits, "exp2", power)
    exact = attention_bits._power

    def of_weights(z):  # bases of chunks differ by whole numbers, whose powers are exact
        return np.where(z == np.rint(z), np.exp2(z, dtype=np.float32), exact(z))

    monkeypatch.setattr(attention_bits, "_power", of_weights)
    found = bits()
    assert alone
    assert all((found[case] == declared()[case]).all() for case in alone)


@pytest.mark.parametrize("unit", [Unit(step=8), Unit(fraction_bits=24), Unit(rounding="nearest")], ids=str)
def test_another_tensor_core_has_other_bits(unit):
    assert declared()
    with tensor_core.predicting({"bf16": unit, "fp16": unit}):
        assert others() > 0


# ---------------------------------------------------------------------------------------------- what the gate sees


@pytest.mark.parametrize("name", ["attention", "elementary"])
def test_one_unit_in_the_last_place_is_within_the_bound_and_not_predicted(name):
    op = find(name)
    case = next(case for case in op.cases if case.regime == "normal" and min(case.shape) > 1)
    inputs = op.make_inputs(case)
    y = op.predict(case, inputs)["y"].clone()
    at = (0,) * y.ndim
    y.view(INTEGERS[y.dtype])[at] += 1
    execution = Execution({"y": y}, ())
    assert judge(op, case, "bound", "host", inputs, execution).passed
    outcome = judge(op, case, "predicted", "host", inputs, execution)
    assert (outcome.passed, outcome.bad) == (False, 1)
    assert "not the predicted bits" in outcome.message
