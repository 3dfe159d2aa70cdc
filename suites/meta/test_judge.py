"""The judge itself: what it must refuse, count and say, on outputs made wrong on purpose."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from mxharness.bounds import LAMBDA, gamma, multiplied, probable
from mxharness.execution import Execution
from mxharness.judge import digest, gates, judge, measures
from mxharness.op import Case
from mxharness.ops import OPS, find
from mxharness.pattern import describe

CASE = Case("gemm", (5, 40, 96), options=("fp32",))


def verdict(change, case=CASE, gate="bound", violations=()):
    """The outcome for the correctly rounded reference after `change` (a function of the output tensor)."""
    op = find(case.op)
    inputs = op.make_inputs(case)
    y = op.predict(case, inputs)["y"].clone()
    changed = change(y)
    return judge(op, case, gate, "host", inputs, Execution({"y": y if changed is None else changed}, tuple(violations)))


def put(place, value):
    def change(y):
        y[place] = value

    return change


def test_right_output_passes_every_gate():
    integers = replace(CASE, regime="integers")
    for gate in gates(find("gemm"), integers):
        outcome = verdict(lambda y: None, integers, gate)
        assert outcome.passed
        assert outcome.message == ""
        assert outcome.elements == 200


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_nan_or_inf_fails_and_is_counted_first(value):
    outcome = verdict(put((2, 3), value))
    assert not outcome.passed
    assert (outcome.bad, outcome.nan + outcome.inf) == (1, 1)
    assert outcome.ratio == math.inf
    assert f"1 of them {'NaN' if math.isnan(value) else 'Inf'}" in outcome.message
    assert "worst [2, 3]" in outcome.message


def test_unwritten_output_fails_everywhere():
    outcome = verdict(lambda y: torch.full_like(y.view(torch.uint8), 0xFF).view(torch.float32))
    assert (outcome.passed, outcome.bad, outcome.nan) == (False, 200, 200)
    assert "pattern: every element" in outcome.message


def test_bound_is_per_element():
    """An error that the largest element could absorb fails in a small one."""
    op = find("gemm")
    inputs = op.make_inputs(CASE)
    expected = op.golden(CASE, inputs)["y"]
    small = int(expected.magnitude.argmin())
    allowance = float(expected.magnitude.max()) * expected.chain * 2.0**-24

    def change(y):
        y.view(-1)[small] += allowance

    assert verdict(change).bad == 1


def test_predicted_bits_see_one_ulp_that_the_bound_allows():
    def change(y):
        y[1, 1] = torch.nextafter(y[1, 1], torch.tensor(math.inf))

    assert verdict(change, gate="bound").passed
    outcome = verdict(change, gate="predicted")
    assert (outcome.bad, outcome.max_ulp) == (1, 1.0)
    assert "not the predicted bits" in outcome.message


def test_sign_of_zero_is_a_bit():
    case = Case("dequant", (1, 32), regime="codes", dtype="fp32")
    op = find("dequant")
    inputs = op.make_inputs(case)
    y = op.golden(case, inputs)["y"].value.clone()
    zeros = (y == 0).nonzero()
    assert len(zeros) > 0
    y[tuple(zeros[0])] *= -1
    assert judge(op, case, "exact", "host", inputs, Execution({"y": y}, ())).bad == 1


def test_message_says_what_where_how_bad_and_what_to_paste():
    outcome = verdict(put((0, 7), 1000.0))
    assert outcome.message.startswith("gemm 5x40x96: 1 of 200 elements of y past the bound (chunks of K products")
    assert "worst [0, 7]: got 1000, should be " in outcome.message
    assert "x the bound" in outcome.message
    assert outcome.message.endswith('paste into gemm.CASES: Case("gemm", (5, 40, 96), options=("fp32",))')
    assert eval(outcome.message.rpartition("CASES: ")[2], {"Case": Case}) == CASE  # noqa: S307  the text is ours


def test_violation_fails_right_values():
    outcome = verdict(lambda y: None, violations=["wrote 4 bytes past the end of output y, the nearest 0 bytes away"])
    assert not outcome.passed
    assert outcome.bad == 0
    assert "wrote 4 bytes past the end of output y" in outcome.message


def test_kernel_that_left_nothing_fails():
    op = find("gemm")
    outcome = judge(op, CASE, "bound", "host", op.make_inputs(CASE), Execution({}, ("a kernel failed",)))
    assert (outcome.passed, outcome.elements, outcome.ratio) == (False, 0, math.inf)


@pytest.mark.parametrize(
    ("change", "gate", "sentence"),
    [
        (
            lambda y: {"y": y[:, :39]},
            "bound",
            r"output y is \(5, 39\) torch.float32, should be \(5, 40\) torch.float32",
        ),
        (lambda y: {"y": y[:, :39]}, "predicted", r"output y is \(5, 39\) torch.float32, should be \(5, 40\)"),
        (
            lambda y: {"y": y.bfloat16()},
            "predicted",
            r"output y is \(5, 40\) torch.bfloat16, should be \(5, 40\) torch.float32",
        ),
        (lambda y: {"y": y, "z": y * math.nan}, "bound", "outputs y, z do not meet references y"),
        (lambda y: {"z": y}, "bound", "outputs z do not meet references y"),
        (lambda y: {"z": y}, "predicted", "outputs z do not meet references y"),
    ],
)
def test_names_shapes_and_dtypes_come_before_values(change, gate, sentence):
    op = find("gemm")
    inputs = op.make_inputs(CASE)
    outputs = change(op.predict(CASE, inputs)["y"])
    with pytest.raises(AssertionError, match=sentence):
        judge(op, CASE, gate, "host", inputs, Execution(outputs, ()))


def test_an_operator_without_references_is_not_judged():
    op = replace(find("gemm"), golden=lambda case, inputs: {})
    inputs = op.make_inputs(CASE)
    with pytest.raises(AssertionError, match="outputs y do not meet references none"):
        judge(op, CASE, "bound", "host", inputs, Execution(op.predict(CASE, inputs), ()))


def test_all_nan_has_no_good_numbers():
    outcome = verdict(lambda y: y * math.nan)
    assert (outcome.max_ulp, outcome.nmse) == (math.inf, math.inf)


def test_digest_sees_a_bit_a_shape_and_a_dtype_but_not_the_payload_of_nan():
    x = torch.tensor([1.0, math.nan])
    other_nan = torch.tensor([0x3F800000, 0x7FC12345], dtype=torch.int32).view(torch.float32)
    assert digest({"y": x}) == digest({"y": other_nan})
    changed = [torch.tensor([1.0000001, math.nan]), x.reshape(1, 2), x.double(), torch.tensor([-1.0, math.nan])]
    assert len({digest({"y": tensor}) for tensor in (x, *changed)}) == 5


@pytest.mark.parametrize(
    ("place", "phrase"),
    [
        ((slice(None), slice(1, None, 2)), "every odd column"),
        ((slice(None), slice(128, None)), "the last 22 columns (the tail of tiles of 128)"),
        ((3, slice(None)), "row 3 alone"),
        ((slice(8, None), slice(None)), "the last 2 rows (the tail of tiles of 8)"),
        ((slice(None), slice(32, 64)), "columns 32 to 63"),
        ((slice(None), slice(5, None, 32)), "element 5 of each block of 32 columns"),
        ((4, 77), "one element"),
    ],
)
def test_pattern_names_the_shape_of_a_fault(place, phrase):
    bad = torch.zeros(10, 150, dtype=torch.bool)
    bad[place] = True
    assert describe(bad) == phrase


# Numbers beside the verdict


def test_an_error_past_the_probabilistic_line_is_drift_and_no_failure():
    case = Case("gemm", (5, 40, 2880), options=("fp32",))
    inputs = find("gemm").make_inputs(case)
    expected = find("gemm").golden(case, inputs)["y"]
    y = find("gemm").predict(case, inputs)["y"]
    healthy = judge(find("gemm"), case, "bound", "host", inputs, Execution({"y": y}, ()))
    assert 0 < healthy.line < 1
    assert not healthy.drifted
    line = 6 * math.sqrt(expected.chain) * 2.0**-24 * float(expected.magnitude[1, 1])
    moved = y.double()
    moved[1, 1] = expected.value[1, 1] + 1.5 * line
    outcome = judge(find("gemm"), case, "bound", "host", inputs, Execution({"y": moved.float()}, ()))
    assert outcome.passed
    assert outcome.drifted
    assert outcome.line == pytest.approx(1.5, rel=0.05)
    assert outcome.chain == expected.chain


def test_the_line_never_lies_past_the_bound_and_its_lambda_grows_with_the_number_of_comparisons():
    assert probable(4) == gamma(4)
    assert probable(10_000) == 600 * 2.0**-24
    assert multiplied(1) == LAMBDA
    sure = [2 * count * math.exp(-(multiplied(count) ** 2) / 2) for count in (1, 1000, 10**7)]
    assert sure == pytest.approx([sure[0]] * 3)


def test_trends_are_recorded_and_decide_nothing():
    def scaled(y):
        return y * 2

    outcome = verdict(scaled)
    assert outcome.cosine == pytest.approx(1.0)  # blind to scale
    assert outcome.sqnr == pytest.approx(0.0, abs=1e-3)
    assert not outcome.passed
    one = verdict(put((0, 7), 1000.0))
    assert one.cosine < 0.5
    assert one.high_ratio <= one.ratio
    assert measures.cosine(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 1.0]).double()) == pytest.approx(0.5**0.5)


def test_a_tolerance_says_all_that_it_is_made_of():
    for op in OPS:
        made = op.tolerance.provenance
        assert all(made.values())
        assert ("gamma_n" in made["formula"]) == (op.tolerance.unit_roundoff > 0)
    tolerance = find("gemm").tolerance
    for change in ({"ceiling": 0.2}, {"unit_roundoff": 2.0**-23}, {"why": "?"}, {"source": "?"}, {"devices": "sm_120"}):
        assert replace(tolerance, **change).provenance != tolerance.provenance
