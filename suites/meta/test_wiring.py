"""One operator, one place; one door for each heavy package; kernels/ holds no Python."""

from __future__ import annotations

import re
from pathlib import Path

import mxharness
from mxharness import paths
from mxharness.device.source import shipped
from mxharness.op import Case
from mxharness.ops import OPS

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
    assert {op.source for op in OPS} == set(shipped().names())
    for op in OPS:
        assert f"ops/{op.family}.py" in modules()
        assert shipped().kernels(op.source), f"{op.source} has no entry point"


def test_cases_name_their_operator_and_are_distinct():
    for op in OPS:
        assert len(set(map(str, op.cases))) == len(op.cases) > 0
        assert {case.op for case in op.cases} == {op.name}
        assert {len(case.shape) for case in op.cases} == {len(op.axes.split())}
        assert all(eval(repr(case), {"Case": Case}) == case for case in op.cases)  # noqa: S307  the text is ours


def test_every_tolerance_says_why():
    assert all(op.tolerance.why and op.tolerance.source for op in OPS)


def test_one_door_a_package():
    assert importers("pycuda") == {"device/cuda.py"}
    assert importers("matplotlib") == {"plot.py"}
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
