"""References that a GPU computes: the operators' own code on another device, held to the CPU's within float64."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from mxharness.device.cuda import CudaDevice
from mxharness.execution import Execution
from mxharness.judge import gates, judge, references
from mxharness.judge.evidence import is_evidence
from mxharness.judge.references import CPU, SHARE
from mxharness.op import Case, Expected
from mxharness.ops import OPS, find

from .pretended import GPU, gpu

CASE = Case("gemm", (5, 40, 96), options=("fp32",))


@contextmanager
def another(device):
    """A GPU: the run's own, or one that is not there."""
    if device.torch_device.type == "cuda":
        yield device.torch_device
    else:
        with gpu():
            yield GPU


def test_every_reference_is_the_same_on_a_gpu(op, device, outputs, monkeypatch):
    monkeypatch.setattr(references, "sampled", lambda case, gate: True)
    small = sorted(op.cases, key=lambda case: math.prod(case.shape))
    case = next(case for case in small if is_evidence(case, op.make_inputs(case)))
    inputs = op.make_inputs(case)
    made = outputs(op, case, inputs)
    for gate in gates(op, case):
        with another(device) as where:
            found = references.find(op, case, gate, inputs, made, where)
        assert found.disagreement == ""
        assert {one.value.device for one in found.expected.values()} == {CPU}


def otherwise(change):
    """A gemm whose reference is another one on a GPU."""
    op = find("gemm")

    def golden(case, tensors):
        found = op.golden(case, tensors)
        return {"y": change(found["y"])} if tensors["x"].device == GPU else found

    return replace(op, golden=golden)


def further(value):
    return value * (1 + 2.0**-28 * (torch.arange(40, device=value.device) == 7).double())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda one: one, ""),
        (lambda one: replace(one, value=further(one.value)), "reference's value for y: 5 of 200 elements, the first"),
        (lambda one: replace(one, magnitude=one.magnitude * 1.001), "reference's magnitude for y: 200 of 200 elements"),
        (
            lambda one: replace(one, quantum=one.quantum * (1 + 2.0**-50)),
            "reference's quantum for y: 200 of 200 elements, the",
        ),
        (lambda one: replace(one, slack=one.value.abs()), "reference's slack for y: only one has it"),
        (lambda one: replace(one, value=one.value.where(one.value < 1, torch.nan)), "nan and "),
        (lambda one: replace(one, value=one.value.float()), "(5, 40) torch.float32 and (5, 40) torch.float64"),
    ],
    ids=["none", "value", "magnitude", "quantum", "slack", "nan", "dtype"],
)
def test_a_gpu_that_disagrees_fails_the_case_by_name(change, told, monkeypatch):
    monkeypatch.setattr(references, "sampled", lambda case, gate: True)
    monkeypatch.setattr(references, "place", lambda device, inputs, outputs: GPU)
    op = otherwise(change)
    inputs = op.make_inputs(CASE)
    with gpu():
        outcome = judge(op, CASE, "bound", "host", inputs, Execution(op.predict(CASE, inputs), ()))
    assert (outcome.passed, outcome.refused, outcome.bad) == (not told, False, 0), "the CPU's decides"
    assert told in outcome.message
    assert ("cuda:0 and the CPU disagree on the " in outcome.message) is bool(told)


@pytest.mark.parametrize("slack", [None, 0.001])
def test_the_room_is_that_of_float64_for_so_many_terms(slack):
    one = torch.ones(1, dtype=torch.float64)
    here = Expected(one, 3 * one, chain=12, slack=None if slack is None else slack * one)
    room = 2 * 144 * (4 * 2.0**-53 + 2.0**-29 * (slack or 0))
    for share, told in ((0.95, 0), (1.05, 1)):
        there = replace(here, value=one + share * room)
        assert len(list(references.disagreements(CASE, {"y": there}, {"y": here}, GPU))) == told


def test_an_output_that_only_one_has_a_reference_for_is_named():
    here = references.computed(find("gemm"), CASE, "bound", find("gemm").make_inputs(CASE), {})
    assert list(references.disagreements(CASE, {}, here, GPU)) == [
        "only one of cuda:0 and the CPU has a reference for y"
    ]
    assert list(references.disagreements(CASE, here, here, GPU)) == []


def test_one_case_in_fifty_is_asked_of_both_and_always_the_same():
    checks = [(case, gate) for op in OPS for case in op.cases for gate in gates(op, case)]
    asked = [check for check in checks if references.sampled(*check)]
    assert 0.7 < len(asked) * SHARE / len(checks) < 1.4
    assert asked == [check for check in reversed(checks) if references.sampled(*check)][::-1]
    assert references.sampled(replace(CASE, seed=11), "bound") is False


def test_between_samples_a_gpus_reference_decides_alone(monkeypatch):
    monkeypatch.setattr(references, "sampled", lambda case, gate: False)
    monkeypatch.setattr(references, "place", lambda device, inputs, outputs: GPU)
    op = otherwise(lambda one: replace(one, value=one.value + 1))
    inputs = op.make_inputs(CASE)
    with gpu():
        outcome = judge(op, CASE, "bound", "host", inputs, Execution(op.predict(CASE, inputs), ()))
    assert outcome.bad == 200


def test_a_gpu_is_asked_for_what_is_large_and_only_where_the_kernel_ran_on_it(device, monkeypatch):
    card = CudaDevice.__new__(CudaDevice)  # without a GPU
    card.torch_device = GPU
    large, small = {"x": torch.zeros(references.LEAST - 1)}, {"x": torch.zeros(references.LEAST - 2)}
    y = {"y": torch.zeros(1)}
    assert references.place(card, large, y) == GPU
    assert references.place(card, small, y) == CPU
    assert references.place(None, large, y) == CPU
    if device.torch_device == CPU:
        assert references.place(device, large, y) == CPU
    monkeypatch.setattr("mxharness.device.cuda._lost", ["a kernel hangs"])
    assert references.place(card, large, y) == CPU


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_gpu_without_memory_or_one_that_failed_leaves_it_to_the_cpu(error):
    def golden(case, tensors):
        if tensors["x"].device == GPU:
            raise error("CUDA error")
        return find("gemm").golden(case, tensors)

    op = replace(find("gemm"), golden=golden)
    inputs = op.make_inputs(CASE)
    with gpu():
        found = references.find(op, CASE, "bound", inputs, {}, GPU)
    assert torch.equal(found.expected["y"].value, golden(CASE, inputs)["y"].value)
