"""One operator, one place; one door for each heavy package; kernels/ holds no Python."""

from __future__ import annotations

import re
from pathlib import Path

import mxharness
import pytest
import torch
from mxharness import functional, paths
from mxharness.device import open_device
from mxharness.device.source import shipped
from mxharness.errors import UserError
from mxharness.execution import execute
from mxharness.functional.dispatch import GATED
from mxharness.judge import digest, gates
from mxharness.op import GATES, Case
from mxharness.ops import OPS, find, select

PACKAGE = Path(mxharness.__file__).parent


def modules():
    return {
        path.relative_to(PACKAGE).as_posix(): path.read_text()
        for path in PACKAGE.rglob("*.py")
        if "_bundle" not in path.parts
    }


def importers(name):
    pattern = re.compile(rf"^\s*(?:import|from) {name}\b", re.MULTILINE)
    return {path for path, text in modules().items() if pattern.search(text)}


def test_every_kernel_file_is_an_operator_and_every_operator_a_module():
    # For other numbers of rows, launched by the operators of attention.cu and gemm.cu.
    also = {"attention_many.cu", "attention_wide.cu", "dense_wide.cu", *GATED}
    assert {op.source for op in OPS} | also == set(shipped().names())
    for op in OPS:
        assert f"ops/{op.family}.py" in modules()
        assert shipped().kernels(op.source), f"{op.source} has no entry point"


def test_cases_name_their_operator_and_are_distinct():
    for op in OPS:
        assert len(set(map(str, op.cases))) == len(op.cases) > 0
        assert {case.op for case in op.cases} == {op.name}
        assert {len(case.shape) for case in op.cases} == {len(op.axes.split())}
        assert all(eval(repr(case), {"Case": Case}) == case for case in op.cases)  # noqa: S307  the text is ours


def test_every_gate_of_every_case_is_run_by_a_suite():
    marks = re.findall(r"@pytest\.mark\.gates\((.*?)\)", "".join(p.read_text() for p in paths.suites().glob("*.py")))
    run = [gate for mark in marks for gate in re.findall(r'"([\w-]+)"', mark)]
    assert sorted(run) == sorted(GATES)


def test_every_tolerance_says_why():
    assert all(op.tolerance.why and op.tolerance.source for op in OPS)
    assert all(op.tolerance.ceiling > 0 for op in OPS if op.tolerance.unit_roundoff)
    assert all(op.tolerance.composed_ceiling > 0 for op in OPS if op.composed)


def test_every_operator_that_rounds_is_judged_by_every_gate_or_says_why_not(op):
    met = {gate for case in op.cases for gate in gates(op, case)}
    assert not met & set(op.without)
    assert met | set(op.without) == ({"exact"} if met == {"exact"} else set(GATES) - {"exact"})
    assert all(op.without.values())


def test_a_name_selects_an_operator_and_a_file_all_of_its():
    assert select("gemm") == (find("gemm"),)
    assert [op.name for op in select("gemm.cu")] == ["gemm", "gemm_bias", "gemm_batch", "gemm_persistent", "dense"]
    with pytest.raises(UserError, match=r"no operator 'nothing'; there are quantize, .*; or all of quantize.cu, "):
        select("nothing")


def test_no_reference_looks_at_the_output_it_judges(op):
    """Stages are judged from the kernel's own earlier outputs, never from themselves."""
    case = op.cases[0]
    inputs = op.make_inputs(case)
    outputs = execute(op, case, open_device("host"), inputs).outputs
    right = op.golden(case, {**outputs, **inputs})
    for name, tensor in outputs.items():
        garbage = torch.full_like(tensor, 1) - tensor
        judged = op.golden(case, {**outputs, name: garbage, **inputs})[name]
        assert torch.equal(judged.value.nan_to_num(7.0), right[name].value.nan_to_num(7.0)), name
        if op.predict is not None and name in (bits := op.predict(case, {**outputs, name: garbage, **inputs})):
            assert digest({"": bits[name]}) == digest({"": op.predict(case, {**outputs, **inputs})[name]}), name


def test_every_function_that_launches_a_kernel_is_judged():
    """What mxharness.functional offers is an operator, or stands here with the reason why it is none."""
    makers = {"embedding_cache", "kv_cache", "persistent", "rope_table"}  # make what an operator's functions take
    arithmetic = {name for name in functional.__all__ if name.endswith("vram_savings")} | {"gemm_profile"}
    functions = {name for name in functional.__all__ if callable(getattr(functional, name)) and name == name.lower()}
    unjudged = functions - {op.name for op in OPS} - makers - arithmetic - {"dequantize"}  # the operator dequant
    assert not unjudged


def test_one_door_a_package():
    assert importers("pycuda") == {"device/cuda.py"}
    assert {path.partition("/")[0] for path in importers("matplotlib")} == {"plot"}
    assert importers("datasets") == {"text.py"}


def test_operators_do_not_know_devices_and_devices_not_operators():
    ops = {path for path in modules() if path.startswith("ops/")}
    assert not ops & (
        importers("mxharness.device.cuda") | importers("mxharness.device.host") | importers("mxharness.judge")
    )
    assert not {path for path in importers("mxharness.ops") if path.startswith("device/")}


def test_kernels_hold_no_python():
    assert not list(paths.kernels().rglob("*.py"))


def test_no_suite_names_an_operator():
    names = re.compile(rf"\b({'|'.join(op.name for op in OPS)})\b")
    for path in paths.suites().glob("test_*.py"):
        if path.name in ("test_accuracy.py", "test_exact.py", "test_fuzz.py", "test_invariance.py", "test_faults.py"):
            assert not names.search(path.read_text()), path.name
