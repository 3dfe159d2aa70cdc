"""The judge itself: what it must refuse, count and say, on outputs made wrong on purpose."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from mxharness import regimes
from mxharness.bounds import LAMBDA, gamma, multiplied, probable, quantum
from mxharness.device import open_device
from mxharness.execution import Execution, execute
from mxharness.judge import digest, gates, judge, measures
from mxharness.judge.evidence import FEW, degenerate, empty, inexact, is_evidence, loose
from mxharness.op import Case, Expected
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


# What proves nothing


def judged(inputs, gate="bound", op=None, case=CASE):
    """The outcome for the correctly rounded reference of other inputs."""
    op = op or find(case.op)
    return judge(op, case, gate, "host", inputs, Execution(find(case.op).predict(case, inputs), ()))


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
