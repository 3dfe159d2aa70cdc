"""What a failing check leaves: one whole folder under a name that is safe, whoever else writes."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from mxharness import repro
from mxharness.device import open_device
from mxharness.execution import execute
from mxharness.judge import judge
from mxharness.ops import find
from mxharness.replay import replay

from .failing import HALF_IS_WRONG, SUM, narrow

FILES = {repro.CASE, repro.INPUTS, repro.OUTPUTS, repro.HOW}


def test_names_are_safe_and_differ():
    assert repro.safe_name("gemm-3x33x64-k=2-bound") == "gemm-3x33x64-k=2-bound"
    names = {
        repro.safe_name(name) for name in ("../../etc", "..-..-etc", "a/b", "a-b", "a b", "x" * 500, "x" * 501, "é")
    }
    assert len(names) == 8
    assert all(re.fullmatch(r"[A-Za-z0-9_=][A-Za-z0-9._=-]{0,200}|-[0-9a-f]{8}", name) for name in names), names


def test_many_at_once_leave_one_whole_folder(tmp_path):
    op, device = narrow(find("mma")), open_device("host")
    inputs = op.make_inputs(SUM)
    execution = execute(op, SUM, device, inputs)
    outcome = judge(op, SUM, "bound", "host", inputs, execution)

    def write(number):
        marked = replace(outcome, message=str(number))
        return repro.save(tmp_path, "same", op, SUM, "bound", device, inputs, execution.outputs, marked)

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(write, range(64)))
    assert [path.name for path in tmp_path.iterdir()] == ["same"]
    assert folders == {tmp_path / "same"}
    assert repro.load(tmp_path / "same").outcome.message in map(str, range(64))


def test_a_folder_that_cannot_be_written_hides_no_verdict(tmp_path):
    (tmp_path / "file").write_text("")
    op, device = narrow(find("mma")), open_device("host")
    inputs = op.make_inputs(SUM)
    execution = execute(op, SUM, device, inputs)
    outcome = judge(op, SUM, "bound", "host", inputs, execution)
    place = tmp_path / "file" / "failures"
    kept = repro.keep(place, "x", op, SUM, "bound", device, inputs, execution.outputs, outcome)
    assert kept == replace(outcome, message=f"{outcome.message}; not saved in {place}: Not a directory")


CHECKS = f"""
from hypothesis import given, seed, strategies
from mxharness.op import Case

{HALF_IS_WRONG}
def test_fuzz(op, part, random_check):
    seen = []
    @seed(part.stream(op))
    @given(strategies.integers(1, 60).map(lambda rows: Case("dequant", (rows, 40), "codes")))
    def holds(case):
        seen.append(case)
        random_check(wrong(op) if case.shape[0] > 6 else op, case)
    try:
        holds()
    finally:
        failed = [case.shape[0] for case in seen if case.shape[0] > 6]
        print("FAILED", len(failed), "LARGEST", max(failed), "LAST", repr(seen[-1]))
"""


def test_two_workers_save_what_failed_and_of_random_cases_the_smallest(tmp_path):
    (tmp_path / "test_it.py").write_text(CHECKS)
    command = [sys.executable, "-P", "-m", "pytest", "-c", "/dev/null", "--rootdir", str(tmp_path), "-n", "2", "-rA"]
    command += ["-p", "mxharness.plugin", "-p", "no:cacheprovider", "--device", "host", "--op", "dequant", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    place = tmp_path / "mxharness-out" / "failures"
    listed = {f"{case}-exact" for case in find("dequant").cases if case.dtype == "fp16"}
    folders = {path.name: path for path in place.iterdir()}
    (random,) = set(folders) - listed
    assert listed <= set(folders)
    assert all({path.name for path in folder.iterdir()} == FILES for folder in folders.values())
    for name in folders:
        assert re.search(rf"; mxharness replay mxharness-out/failures/{re.escape(name)}$", done.stdout, re.MULTILINE)
    failed, largest, last = re.search(r"FAILED (\d+) LARGEST (\d+) LAST (.*)", done.stdout).groups()
    smallest = repro.load(folders[random])
    assert smallest.case.shape == (7, 40)
    assert int(failed) > 2
    assert int(largest) > 7
    assert last == repr(smallest.case)
    assert replay(smallest, open_device("host")).outcome.passed  # by the operator's own reference
