"""The probe finds a tensor core's model or says that there is none; device facts decide which gates may judge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mxharness import bounds, facts, fitting, paths, probe, regimes, tensor_core
from mxharness.commands import probe as command
from mxharness.device import host
from mxharness.errors import UserError
from mxharness.execution import execute
from mxharness.fitting import FAMILY, KNOWN
from mxharness.judge import gates, judge
from mxharness.op import Case
from mxharness.ops import find, mma
from mxharness.tensor_core import HOPPER, Unit

AMPERE, VOLTA = Unit(8, 24), Unit(4, 23)
ODD = Unit(4, 22, "floor", "nearest")
CASE = Case("mma", (16, 128))


@pytest.fixture(scope="module")
def devices():
    """Host devices with other tensor cores."""
    return {unit: host.open_device(unit=unit) for unit in (AMPERE, VOLTA, ODD)}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder for the facts of this user alone."""
    monkeypatch.setattr(facts, "own_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def short(monkeypatch):
    """Chains of up to 128, which show all that is asked for."""
    monkeypatch.setattr(mma, "CASES", tuple(case for case in mma.CASES if case.shape[1] <= 128))


def fact(exact_integers=2**24):
    units = {"bf16": AMPERE, "fp16": AMPERE}
    changes = {"units": units, "unit_roundoff": 2.0**-23, "exact_integers": exact_integers}
    return replace(facts.HOST, device_class="sm_80", **changes)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_directed_inputs_tell_every_two_members_of_the_family_apart(dtype):
    vectors = fitting.directed(dtype).values()
    kind = regimes.DTYPES[dtype]
    for one in vectors:
        assert all(np.array_equal(torch.from_numpy(x).to(kind).double().numpy(), x) for x in (one.a, one.b))
    bits = {b"".join(fitting.predicted(one, dtype, unit).tobytes() for one in vectors) for unit in FAMILY}
    assert len(bits) == len(FAMILY) == 1320


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("unit", [AMPERE, VOLTA, ODD], ids=str)
def test_the_unit_of_a_device_is_found(unit, dtype, devices):
    found = fitting.fit(lambda vectors: probe.sums(devices[unit], dtype, vectors), dtype)
    assert found == fitting.Fit((unit,))


@pytest.mark.parametrize(
    "unit",
    [
        Unit(8, 25, accumulator="after"),
        Unit(16, 24, exponents="normalised", subnormals="flushed"),
        Unit(16, None, rounding="nearest"),
    ],
    ids=str,
)
def test_units_that_the_host_cannot_be_compiled_as_are_found_too(unit):
    assert fitting.fit(lambda vectors: fitting.predicted(vectors, "fp16", unit), "fp16").units == (unit,)


def test_exact_sums_are_rounded_once():
    """2^24 + 1 + 2^-40 rounds up to nearest, and its parts in float64 would hide the last term."""
    c, a = np.array([[2.0**24]]), np.array([[1.0, 2.0**-40] + [0.0] * 14])
    ones = np.ones((1, 16))
    assert tensor_core.mma(c, a, ones, "bf16", Unit(16, None, rounding="nearest")) == 2.0**24 + 2
    assert tensor_core.mma(-c, -a, ones, "bf16", Unit(16, None)) == -(2.0**24)
    small = np.array([[-(2.0**-60)] + [0.0] * 15])
    assert tensor_core.mma(np.array([[1.0]]), small, ones, "bf16", Unit(16, None)) == 1 - 2.0**-24


def test_the_host_follows_hoppers_model():
    result = probe.run_probe(host.open_device(), seeds=1)
    assert result.passed
    assert result.message.startswith(
        "PASS: host follows Hopper's model (steps of 16, 25 fraction bits, truncation); 0 of"
    )
    assert (result.exact_integers, result.past_exact, result.unit_roundoff) == (2**24, 14.0, 2.0**-24)
    for found in result.findings:
        assert found.neighbours.keys() == fitting.neighbours(HOPPER).keys()
        assert min(found.neighbours.values()) > 0.1
        assert found.moved_inside == 0 < found.moved_across


def test_another_gpu_is_fitted_and_its_fact_is_what_the_judge_uses(devices, own, short):
    result = probe.run_probe(devices[AMPERE], seeds=1)
    assert result.passed
    assert "follows a fitted model: steps of 8, 24 fraction bits, truncation (as published of Ampere" in result.message
    path = facts.store(replace(probe.as_fact(result, "A100", "1"), device_class="sm_80"))
    assert path.parent == own
    known = facts.find("sm_80")
    assert (known.units, known.unit_roundoff) == ({"bf16": AMPERE, "fp16": AMPERE}, 2.0**-23)
    assert gates(mma.OP, CASE, known) == ("bound", "predicted")
    inputs = mma.make_inputs(CASE)
    execution = execute(mma.OP, CASE, devices[AMPERE], inputs)
    assert not judge(mma.OP, CASE, "predicted", "sm_90", inputs, execution).passed
    for gate in ("bound", "predicted"):
        assert judge(mma.OP, CASE, gate, "sm_80", inputs, execution).passed
    hopper = execute(mma.OP, CASE, host.open_device(), inputs).outputs["d"]
    assert torch.equal(mma.predict(CASE, inputs)["d"], hopper)  # as before, outside of the judge


def test_a_device_that_follows_no_model_is_said_to(own, short):
    result = probe.run_probe(host.open_device(fast=True), seeds=1)
    assert not result.passed
    assert result.message.startswith(
        "FAIL: host follows in bf16 no model in the family of 1,320: the closest, steps of"
    )
    assert all(found.unit is None and found.difference > 0.1 for found in result.findings)
    assert result.unit_roundoff == facts.UNMEASURED
    facts.store(replace(probe.as_fact(result, "a GPU", "1"), device_class="sm_80"))
    assert facts.lacking("sm_80") == (
        "sm_80 has no known model of its tensor core in bf16 and fp16: predicted bits are not judged"
    )
    assert gates(mma.OP, CASE, facts.find("sm_80")) == ("bound",)


def test_data_that_tell_nothing_prove_nothing(monkeypatch):
    def zeros(case):
        return {name: torch.zeros_like(tensor) for name, tensor in make_inputs(case).items()}

    make_inputs = mma.make_inputs
    monkeypatch.setattr(mma, "CASES", mma.CASES[:1] + mma.CASES[3:4])
    monkeypatch.setattr(mma, "make_inputs", zeros)
    result = probe.run_probe(host.open_device(), seeds=1)
    assert not result.passed
    assert "the data cannot tell the model from 23 fraction bits, 24 fraction bits" in result.message
    assert result.message.endswith("so this probe proves nothing")


def test_the_width_of_exact_integers_is_measured(devices):
    assert probe.exact_integers(devices[VOLTA]) == 2**24
    assert probe.exact_integers(devices[ODD]) == 2**23
    inputs = probe.integers("fp16", 20)
    c, a, b = (inputs[name].double().abs() for name in ("c", "a", "b"))
    magnitude = c + a @ b.mT
    assert (magnitude[:40] == 2**20).all()
    assert (magnitude[40:] > 2**19).all()
    assert (magnitude[40:] < 2**20).all()


def test_the_unit_roundoff_bounds_a_step():
    assert [tensor_core.unit_roundoff(unit) * 2**24 for unit in (HOPPER, AMPERE, VOLTA)] == [1, 2, 4]
    assert tensor_core.unit_roundoff(Unit(4, 25, accumulator="after")) * 2**24 == 2
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(1, 2, (64, 1, 128)).astype(np.float16).astype(float) for _ in range(2))
    exact = (a @ b.swapaxes(1, 2))[:, 0, 0]
    for unit in FAMILY[::20]:
        if unit.subnormals == "kept":
            error = np.abs(tensor_core.mma(np.zeros((64, 1, 1)), a, b, "fp16", unit)[:, 0, 0] - exact)
            assert (error <= bounds.gamma(128, tensor_core.unit_roundoff(unit)) * exact).all(), unit


def test_an_unmeasured_class_has_the_roundoff_of_the_worst_unit_it_may_have(own):
    """Volta's unit, below compute capability 8.0, sums four products with no bit to spare."""
    assert facts.roundoff("sm_70") == facts.roundoff("sm_75") == tensor_core.unit_roundoff(VOLTA) == 2.0**-22
    assert facts.roundoff("sm_80") == facts.roundoff("sm_120") == tensor_core.unit_roundoff(AMPERE) == 2.0**-23
    assert "bounds are 4 times as wide" in facts.lacking("sm_75")
    assert "bounds are 2 times as wide" in facts.lacking("sm_86")


def test_an_unmeasured_class_is_bounded_more_widely_and_judged_by_fewer_gates(own):
    assert facts.find("sm_80") is None
    assert facts.lacking("sm_80").startswith("sm_80 has no device fact: predicted bits and exact arithmetic are not")
    integers = Case("gemm", (3, 33, 64), regime="integers")
    assert gates(find("gemm"), integers) == ("bound", "exact-arithmetic", "predicted")
    assert gates(find("gemm"), integers, None) == ("bound",)
    narrow = fact(exact_integers=2**23)
    assert gates(find("gemm"), integers, narrow) == ("bound", "predicted")
    inputs = mma.make_inputs(CASE)
    execution = execute(mma.OP, CASE, host.open_device(), inputs)
    ratio = {name: judge(mma.OP, CASE, "bound", name, inputs, execution).ratio for name in ("sm_90", "host", "sm_80")}
    assert ratio["sm_90"] == ratio["host"] == pytest.approx(2 * ratio["sm_80"], rel=0.01)
    assert bounds.gamma(100) == 100 * 2.0**-24 / (1 - 100 * 2.0**-24)  # as before, outside of the judge


def test_what_came_with_this_version_overrules_a_probe(own):
    measured = facts.find("sm_90")
    assert measured.units == {"bf16": HOPPER, "fp16": HOPPER}
    assert (measured.mismatches, measured.exact_integers, measured.unit_roundoff) == (0, 2**24, 2.0**-24)
    other = replace(fact(), device_class="sm_90")
    with pytest.raises(
        UserError, match=r"this sm_90 is not the one known .*units bf16 steps of 8, .* instead of bf16 st"
    ):
        facts.store(other)
    (own / "sm_90.json").write_text(json.dumps({"api_version": 1}))
    assert facts.find("sm_90") == measured


def test_a_damaged_fact_is_named(own):
    (own / "sm_80.json").write_text(json.dumps({"api_version": 1, "units": {"bf16": {"step": 8, "nonsense": 1}}}))
    with pytest.raises(UserError, match=r"device fact .*sm_80.json is damaged .*; `mxharness probe` makes it anew"):
        facts.find("sm_80")


def test_published_models_are_in_the_family_and_say_whether_they_were_measured():
    assert {known.unit for known in KNOWN} <= set(FAMILY)
    assert [known.name for known in KNOWN if known.measured] == ["Hopper"]
    assert all(known.source for known in KNOWN)


def test_a_run_says_which_gates_could_not_judge_and_counts_their_checks(tmp_path):
    (tmp_path / "unmeasured.py").write_text("from mxharness import facts\nfacts.find = lambda device_class: None\n")
    suites = [str(paths.suites() / f"test_{name}.py") for name in ("exact", "accuracy")]
    options = ["-p", "unmeasured", "-p", "no:cacheprovider", "--device", "host", "--op", "mma", "-k", "64x16-bf16"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *suites],
        cwd=paths.checkout(),
        env={
            **os.environ,
            "COLUMNS": "400",
            "PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    reason = "host has no device fact: predicted bits and exact arithmetic are not judged"
    header, _, rest = done.stdout.partition("collected")
    assert f"mxharness: {reason}" in header
    assert f"did not happen: {reason}" in rest
    assert "test_exact, 9 cases)" in rest
    assert "8 of 8 checks right" in rest
    assert "did not run" not in rest


def canned(unit, device_class="sm_80", share=0.3):
    row = probe.ProbeRow("bf16", "normal", 100, 0 if unit else 7)
    near = dict.fromkeys(fitting.neighbours(unit or AMPERE), share)
    found = [probe.Finding(name, unit, unit or AMPERE, 0.07, near, 0, 9) for name in probe.DTYPE_NAMES]
    passed = bool(unit and share)
    return probe.ProbeResult(passed, device_class, "the verdict", (row,), tuple(found), 2**24, 14.0, 2.0**-24)


@pytest.mark.parametrize(
    ("result", "options", "code", "kept"),
    [
        (canned(HOPPER), (), 0, True),
        (canned(HOPPER), ("--no-store",), 0, False),
        (canned(None), (), 1, True),
        (canned(HOPPER, share=0.0), (), 1, False),
        (canned(HOPPER, "sm_90"), (), 0, False),
    ],
)
def test_the_command_keeps_what_was_proved(result, options, code, kept, own, monkeypatch):
    monkeypatch.setattr(probe, "run_probe", lambda device, seeds: result)
    device = host.open_device()
    device.device_class = result.device_class
    monkeypatch.setattr("mxharness.device.open_device", lambda name: device)
    said = CliRunner().invoke(command.probe, [*options], standalone_mode=False)
    assert said.return_value == code
    assert said.output.startswith("the verdict\n")
    assert (own / "sm_80.json").exists() == kept
    document = json.loads(CliRunner().invoke(command.probe, [*options, "--json"], standalone_mode=False).output)
    assert document["passed"] == (code == 0)
    assert bool(document["stored"]) == kept


def test_the_command_fails_a_gpu_that_is_not_as_known(own, monkeypatch):
    monkeypatch.setattr(probe, "run_probe", lambda device, seeds: canned(AMPERE, "sm_90"))
    device = host.open_device()
    device.device_class = "sm_90"
    monkeypatch.setattr("mxharness.device.open_device", lambda name: device)
    said = CliRunner().invoke(command.probe, [], standalone_mode=False)
    assert said.return_value == 1
    assert said.output.startswith("FAIL: this sm_90 is not the one known (NVIDIA H100 80GB HBM3, driver 580.159.04")
