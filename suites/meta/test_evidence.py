"""What the judge refuses to call evidence: loose and inexact cases, degenerate inputs, references of one number."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from mxharness import regimes
from mxharness.bounds import quantum
from mxharness.device import open_device
from mxharness.execution import Execution, execute
from mxharness.judge import gates, judge
from mxharness.judge.evidence import FEW, degenerate, empty, inexact, is_evidence, loose
from mxharness.op import Case
from mxharness.ops import OPS, find

CASE = Case("gemm", (5, 40, 96), options=("fp32",))


def judged(inputs, gate="bound", op=None, case=CASE):
    """The outcome for the correctly rounded reference of other inputs."""
    op = op or find(case.op)
    return judge(op, case, gate, "host", inputs, Execution(find(case.op).predict(case, inputs), ()))


def test_loose_case_is_refused():
    op = find("gemm")
    strict = replace(op, tolerance=replace(op.tolerance, ceiling=1e-9))
    inputs = op.make_inputs(CASE)
    outcome = judge(strict, CASE, "bound", "host", inputs, Execution(op.predict(CASE, inputs), ()))
    assert not outcome.passed
    assert "past the ceiling of 1e-09: this case proves nothing" in outcome.message


def test_inexact_case_is_refused_as_exact_arithmetic():
    outcome = judged(find(CASE.op).make_inputs(CASE), gate="exact-arithmetic")  # normal data: the sums are not exact
    assert not outcome.passed
    assert "a partial sum may round" in outcome.message


def test_a_quantum_divides_every_number():
    numbers = torch.tensor(
        [[6.0, -4.0, 0.0], [0.75, 1e6, 3.0], [0.0, -0.0, 0.0], [2.0**-133, 1.0, 2.0], [1, math.nan, 2]]
    )
    assert quantum(numbers).tolist() == [2.0, 0.25, math.inf, 2.0**-133, 0.0]
    assert quantum(numbers.to(torch.bfloat16)[:, :1]).tolist() == [2.0, 0.25, math.inf, 2.0**-133, 1.0]


@pytest.mark.parametrize(
    ("change", "exact"),
    [
        (lambda x: x * 2.0**-20, True),  # integers still, of another quantum
        (lambda x: torch.where(x == 4, 4 + 2.0**-5, x), False),  # results fit float32, not every partial sum does
        (lambda x: torch.where(x == 4, 2.0**22, x), False),
        (lambda x: torch.where(x == 4, math.inf, x), False),
    ],
)
def test_exact_arithmetic_is_refused_where_a_partial_sum_may_round(change, exact):
    op, case = find("gemm"), replace(CASE, regime="integers")
    inputs = op.make_inputs(case)
    inputs = {**inputs, "x": change(inputs["x"])}
    outcome = judge(op, case, "exact-arithmetic", "host", inputs, Execution(op.predict(case, inputs), ()))
    assert ("a partial sum may round" in outcome.message) is not exact
    assert outcome.passed or not exact


def test_every_sum_of_products_is_shown_by_exact_arithmetic(op):
    """An output that a failure is sought along K of is a contraction: some case makes all its terms integers."""
    contractions, shown = set(), set()
    exact = [case for case in op.cases if case.regime in regimes.EXACT]
    for case in (op.cases[0], *exact):
        if contractions and contractions <= shown:
            break
        inputs = op.make_inputs(case)
        stages = op.golden(case, {**execute(op, case, open_device("host"), inputs).outputs, **inputs})
        contractions |= set(stages) & set(op.operands(case) if op.operands else ())
        if case in exact:
            shown |= {name for name, stage in stages.items() if not inexact(stage)}
    assert contractions <= shown


@pytest.mark.parametrize("gate", ["bound", "predicted"])
@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("x", lambda x: x * 0, "every number of x is zero: this case proves nothing"),
        ("x", lambda x: x * 0 + 3, "every number of x is the same: this case proves nothing"),
        ("x", lambda x: x.abs(), "every number of x is of one sign: this case proves nothing"),
        ("x", lambda x: -x.abs(), "every number of x is of one sign: this case proves nothing"),
        ("codes", lambda codes: codes & 0x88, "every weight in codes is zero: this case proves nothing"),
        ("codes", lambda codes: codes * 0 + 0x33, "every weight in codes is the same: this case proves nothing"),
        ("codes", lambda codes: codes & 0x77, "every weight in codes is of one sign: this case proves nothing"),
        ("codes", lambda codes: codes | 0x88, "every weight in codes is of one sign: this case proves nothing"),
    ],
)
def test_degenerate_inputs_are_refused_in_every_gate_unless_declared(gate, name, change, says):
    inputs = find("gemm").make_inputs(CASE)
    outcome = judged({**inputs, name: change(inputs[name])}, gate)
    assert (outcome.passed, outcome.refused, outcome.bad) == (False, True, 0)
    assert says in outcome.message
    declared = replace(CASE, regime="positive")
    assert "of one sign" not in judged({**inputs, name: change(inputs[name])}, gate, case=declared).message


def test_ordinary_inputs_and_those_positive_by_nature_are_not_degenerate():
    inputs = find("gemm").make_inputs(CASE)
    assert degenerate(CASE, inputs) == ""
    positive = torch.rand(64)
    assert degenerate(CASE, {**inputs, "uniforms": positive, "angles": positive, "norm_weight": positive}) == ""
    assert degenerate(CASE, {**inputs, "uniforms": positive * 0}) != ""
    assert degenerate(CASE, {"x": torch.ones(3)}) == "", "too few to tell"


@pytest.mark.parametrize("gate", ["bound", "exact", "predicted", "exact-arithmetic", "composed"])
@pytest.mark.parametrize("value", [0.0, math.nan, -1.5])
def test_references_that_are_one_number_are_refused_in_every_gate(gate, value):
    want = torch.full((8, 8), value)
    assert "every reference is" in empty(CASE, gate, {"y": want})
    assert empty(replace(CASE, regime="nan"), gate, {"y": want}) == ""
    assert empty(CASE, gate, {"y": want, "z": torch.arange(64.0)}) == "" or gate not in ("exact", "bound")


@pytest.mark.parametrize("gate", ["predicted", "exact-arithmetic", "composed"])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_result_that_is_nearly_all_zero_or_broken_is_refused(gate, value):
    want = torch.full((10, 10), value)
    want[0, :10] = torch.arange(1.0, 11.0)
    assert "only 10% of the references of y are finite and not zero" in empty(CASE, gate, {"y": want})
    want[1, :10] = torch.arange(1.0, 11.0)
    assert empty(CASE, gate, {"y": want}) == ""


def test_a_good_median_does_not_hide_bounds_without_meaning():
    want = torch.arange(1.0, 101.0, dtype=torch.float64)
    bound, nowhere = want * 1e-3, torch.zeros(100, dtype=torch.bool)
    assert loose(bound, want, nowhere, 0.1) == ""
    bound[:41] = want[:41] * 2
    assert "41% of the elements have a bound as large as their reference" in loose(bound, want, nowhere, 0.1)
    bound[0] = want[0] / 2
    assert loose(bound, want, nowhere, 0.1) == ""
    assert "most partial sums may overflow" in loose(bound, want, ~nowhere, 0.1)


def test_every_gate_of_every_operator_rests_on_evidence(op):
    """Some case under each gate is neither declared degenerate nor so in fact, and no small one."""
    left = {gate for case in op.cases for gate in gates(op, case)}
    for case in op.cases:
        new = left & set(gates(op, case))
        if new and math.prod(case.shape) >= FEW and is_evidence(case, op.make_inputs(case)):
            left -= new
    assert not left


def test_what_is_declared_says_what_for():
    assert all(regimes.DECLARED.values())
    known = {case.regime for op in OPS for case in op.cases}
    assert set(regimes.DECLARED) <= known
    assert set(regimes.DECLARED_OPTIONS) <= {option for op in OPS for case in op.cases for option in case.options}
    assert not set(regimes.DECLARED) & {"normal", "integers", "codes"}
