"""The judge itself: what it must refuse, count and say, on outputs made wrong on purpose."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from mxharness.execution import Execution
from mxharness.judge import digest, gates, judge
from mxharness.op import Case, Expected
from mxharness.ops import find
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


def test_loose_case_is_refused():
    op = find("gemm")
    strict = replace(op, tolerance=replace(op.tolerance, ceiling=1e-9))
    inputs = op.make_inputs(CASE)
    outcome = judge(strict, CASE, "bound", "host", inputs, Execution(op.predict(CASE, inputs), ()))
    assert not outcome.passed
    assert "past the ceiling of 1e-09: this case proves nothing" in outcome.message


def test_inexact_case_is_refused_as_exact_arithmetic():
    outcome = verdict(lambda y: None, gate="exact-arithmetic")  # normal data: the sums are not exact
    assert not outcome.passed
    assert "does not fit float32" in outcome.message


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


# Stages, whole functions, ids


def staged(slack=0.0, ceiling=0.5):
    """A gemm whose whole function is its one stage, with more room."""
    op = find("gemm")

    def composed(case, inputs):
        found = op.golden(case, inputs)["y"]
        return {"y": replace(found, slack=torch.full_like(found.value, slack))}

    return replace(op, composed=composed, tolerance=replace(op.tolerance, composed_ceiling=ceiling))


def test_the_whole_function_is_a_gate_of_its_own_with_room_for_its_stages():
    op, inputs = staged(slack=0.01), find("gemm").make_inputs(CASE)
    assert gates(op, CASE) == ("bound", "predicted", "composed")
    y = op.predict(CASE, inputs)["y"].clone()
    y[2, 3] += 0.009
    assert judge(op, CASE, "composed", "host", inputs, Execution({"y": y}, ())).passed
    assert not judge(op, CASE, "bound", "host", inputs, Execution({"y": y}, ())).passed
    y[2, 3] += 0.002
    outcome = judge(op, CASE, "composed", "host", inputs, Execution({"y": y}, ()))
    assert (outcome.passed, outcome.bad) == (False, 1)
    assert "1 of 200 elements of y past the whole function's bound" in outcome.message


def test_a_bound_that_is_no_number_passes_nothing():
    op, inputs = staged(slack=math.nan), find("gemm").make_inputs(CASE)
    outcome = judge(op, CASE, "composed", "host", inputs, Execution(op.predict(CASE, inputs), ()))
    assert (outcome.passed, outcome.bad) == (False, 200)


def test_a_whole_function_whose_bound_says_nothing_is_refused():
    op, inputs = staged(slack=10.0), find("gemm").make_inputs(CASE)
    outcome = judge(op, CASE, "composed", "host", inputs, Execution(op.predict(CASE, inputs), ()))
    assert not outcome.passed
    assert "past the ceiling of 0.5: this case proves nothing" in outcome.message
    assert (outcome.refused, outcome.bad) == (True, 0)
    wrong = {"y": op.predict(CASE, inputs)["y"] + 100}
    outcome = judge(op, CASE, "composed", "host", inputs, Execution(wrong, ()))
    assert (outcome.refused, outcome.passed) == (False, False), "wrong is wrong, however wide the bound"


def test_a_later_stage_is_judged_from_the_kernels_own_earlier_output():
    def golden(case, tensors):
        doubled = Expected(tensors["y"].double() * 2, tensors["y"].double().abs(), 1, torch.float32)
        return {**find("gemm").golden(case, tensors), "z": doubled}

    op = replace(find("gemm"), golden=golden)
    inputs = op.make_inputs(CASE)
    right = op.predict(CASE, inputs)["y"]
    y = right * 1.001  # the first stage is wrong
    outcome = judge(op, CASE, "bound", "host", inputs, Execution({"y": y, "z": y * 2}, ()))
    assert not outcome.passed
    assert "elements of y past the bound" in outcome.message
    assert "elements of z" not in outcome.message
    assert judge(op, CASE, "predicted", "host", inputs, Execution({"y": right, "z": y}, ())).elements == 200


@pytest.mark.parametrize(
    ("ids", "bad", "ties"), [((3, 1), 0, 0), ((3, 2), 0, 1), ((0, 1), 1, 0), ((3, 4), 1, 0), ((-1, 2), 1, 1)]
)
def test_an_id_is_right_where_its_margin_is_less_than_its_bounds(ids, bad, ties):
    permitted = torch.tensor([[False, False, False, True], [False, True, True, False]])
    expected = Expected(torch.tensor([3, 1]), permitted=permitted, dtype=torch.int64)
    op = replace(find("gemm"), places=None, golden=lambda case, tensors: {"ids": expected})
    execution = Execution({"ids": torch.tensor(ids)}, ())
    outcome = judge(op, CASE, "bound", "host", op.make_inputs(CASE), execution)
    assert (outcome.passed, outcome.bad, outcome.ties) == (bad == 0, bad, ties)


def test_an_output_without_a_magnitude_is_exact_also_among_bounded_ones():
    ids = torch.tensor([4, 7])
    op = replace(find("gemm"), places=None, golden=lambda case, tensors: {"ids": Expected(ids)})
    for got, passed in ((ids, True), (ids + 1, False)):
        outcome = judge(op, CASE, "bound", "host", op.make_inputs(CASE), Execution({"ids": got}, ()))
        assert outcome.passed is passed
