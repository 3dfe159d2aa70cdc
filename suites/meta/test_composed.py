"""Whole functions and their stages before the judge, and operators whose output is ids."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from mxharness.execution import Execution
from mxharness.judge import gates, judge
from mxharness.op import Case, Expected
from mxharness.ops import find

CASE = Case("gemm", (5, 40, 96), options=("fp32",))


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
