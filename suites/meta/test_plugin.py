"""The pytest plugin fails closed: less executed than selected, nothing selected, no device."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

GOOD = """
import pytest

@pytest.mark.gates("exact")
def test_exact(op, case, gate, check):
    check(op, case, gate)
"""


PARENT = """
import json, os, sys
import hypothesis, pytest, torch, xdist
import mxharness.faults, mxharness.plugin.fixtures
for line in sys.stdin:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        output, *arguments = json.loads(line)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.exit(pytest.main(arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Has imported what takes seconds to import and runs each pytest in a fork of itself."""


@pytest.fixture(scope="module")
def parent():
    command = [sys.executable, "-P", "-c", PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(parent):
    """Pytest in a process of its own on one file; (exit code, output, record or None)."""

    def once(folder, text, *arguments):
        (folder / "test_it.py").write_text(text)
        output, record = folder / "output.txt", folder / "run.json"
        start = (output, "-c", "/dev/null", "--rootdir", folder, "-p", "mxharness.plugin", "-p", "no:cacheprovider")
        end = ("--device", "host", "--report", folder, "-q", *arguments, folder)
        parent.stdin.write(json.dumps([str(one) for one in (*start, *end)]) + "\n")
        parent.stdin.flush()
        code = int(parent.stdout.readline())
        return code, output.read_text(), json.loads(record.read_text()) if record.exists() else None

    return once


def test_a_run_records_every_check(run, tmp_path):
    code, output, record = run(tmp_path, GOOD, "--op", "dequant", "--quick")
    assert code == 0, output
    assert record["selected"] == record["executed"] == len(record["outcomes"]) > 0
    assert all(outcome["op"] == "dequant" and outcome["passed"] for outcome in record["outcomes"])
    assert record["filters"] == ["--op dequant", "--quick"]


def test_workers_report_to_the_controller(run, tmp_path):
    code, output, record = run(tmp_path, GOOD, "--op", "dequant", "-n", "2")
    assert code == 0, output
    assert record["selected"] == record["executed"] == len(record["outcomes"]) > 7


def test_a_check_that_never_judges_fails_the_run(run, tmp_path):
    silent = GOOD.replace(
        "    check(op, case, gate)", "    if case.seed == 0 and case.dtype == 'fp16': return\n    check(op, case, gate)"
    )
    code, output, record = run(tmp_path, silent, "--op", "dequant")
    assert code == 1
    assert re.search(r"^FAIL: \d+ of \d+ selected tests did not run, as dequant-", output, re.MULTILINE)
    assert record["executed"] < record["selected"]


def test_one_check_judged_twice_does_not_count_for_another(run, tmp_path):
    twice = GOOD.replace(
        "    check(op, case, gate)", "    if case.dtype == 'fp32': check(op, case, gate), check(op, case, gate)"
    )
    code, output, record = run(tmp_path, twice, "--op", "dequant")
    assert code == 1
    assert re.search(r"^FAIL: \d+ of \d+ selected tests did not run, as dequant-", output, re.MULTILINE)
    assert record["executed"] == len(record["outcomes"]) < record["selected"]


def test_random_cases_that_prove_nothing_are_no_failures_but_all_of_them_are(run, tmp_path):
    text = """
from dataclasses import replace
from hypothesis import given, settings

def test_fuzz(op, check):
    narrow = replace(op, tolerance=replace(op.tolerance, ceiling=CEILING))
    @settings(max_examples=30, database=None)
    @given(op.fuzz())
    def holds(case):
        check(narrow, case, "bound")
    holds()
"""
    code, output, _ = run(tmp_path, text.replace("CEILING", "5e-5"), "--op", "elementary")
    assert code == 0, output
    code, output, _ = run(tmp_path, text.replace("CEILING", "1e-30"), "--op", "elementary")
    assert code == 1
    assert "filter" in output or "Unsatisfi" in output


def test_a_failure_that_a_test_swallows_fails_the_run(run, tmp_path):
    text = """
import pytest
from dataclasses import replace

@pytest.mark.gates("bound")
def test_bound(op, case, gate, check):
    try:
        check(replace(op, tolerance=replace(op.tolerance, unit_roundoff=2.0**-60)), case, gate)
    except AssertionError:
        pass
"""
    code, _, record = run(tmp_path, text, "--op", "mma", "--quick")
    assert code == 1
    assert not all(outcome["passed"] for outcome in record["outcomes"])


def test_a_failure_beside_a_passing_check_is_recorded_with_its_reason(run, tmp_path):
    code, _, record = run(tmp_path, GOOD + "    assert case.dtype != 'fp16', 'no half today'\n", "--op", "dequant")
    assert code == 1
    assert record["tests"]["failed"] > 0
    assert record["tests"]["failures"][0]["message"].startswith("AssertionError: no half today")


def test_an_unknown_gate_is_refused(run, tmp_path):
    code, output, _ = run(tmp_path, GOOD.replace('"exact"', '"exactt"'), "--op", "dequant")
    assert code != 0
    assert "no gate exactt; there are exact, exact-arithmetic, predicted, bound" in output


def test_a_skipped_check_fails_the_run(run, tmp_path):
    code, output, _ = run(
        tmp_path, GOOD.replace("    check(", "    pytest.skip('no time')\n    check("), "--op", "dequant", "-v"
    )
    assert code == 1
    assert "did not happen: no time" in output


def test_an_empty_selection_is_not_green(run, tmp_path):
    code, output, _ = run(tmp_path, GOOD, "--op", "dequant", "-k", "nothing_is_called_this")
    assert code == 1
    assert "FAIL: nothing was selected; " in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--device", "tpu"), "no device 'tpu'; there are host, cuda and auto"),
        (("--op", "nothing"), "no operator 'nothing'; there are quantize, dequant, mma, "),
    ],
)
def test_bad_options_are_one_sentence(run, tmp_path, arguments, sentence):
    code, output, _ = run(tmp_path, GOOD, *arguments)
    assert code == 4
    assert f"ERROR: {sentence}" in output


def test_a_failing_check_shows_the_judges_message(run, tmp_path):
    text = """
import pytest
from dataclasses import replace

@pytest.mark.gates("bound")
def test_bound(op, case, gate, check):
    check(replace(op, tolerance=replace(op.tolerance, unit_roundoff=2.0**-60)), case, gate)
"""
    code, output, record = run(tmp_path, text, "--op", "mma", "--quick")
    assert code == 1
    assert "elements of d past the bound (K products added on a tensor core that truncates)" in output
    assert 'paste into mma.CASES: Case("mma", ' in output
    assert any(not outcome["passed"] and outcome["message"] for outcome in record["outcomes"])


@pytest.mark.parametrize("options", [(), ("-v",), ("--device", "auto")], ids=["-q", "header", "any device"])
def test_another_device_than_the_required_one_is_refused_however_little_is_shown(run, tmp_path, options):
    code, output, _ = run(tmp_path, GOOD, "--require-device", "sm_00", *options)
    assert code == 4
    assert "ERROR: this run requires sm_00 and the device is " in output


def test_the_header_names_device_kernels_baseline_and_ledger(run, tmp_path):
    from mxharness import baseline, paths
    from mxharness.device.source import shipped

    held = baseline.list_baselines(paths.baselines())[-1]
    name = f"{held.device_class}/{held.name}"
    named = ("--baseline", name, "-v", "--op", "dequant", "-k", "nothing")
    _, output, _ = run(tmp_path, GOOD, *named)
    lines = [line for line in output.splitlines() if line.startswith("mxharness: ")]
    assert re.match(r"mxharness: host \(.+\), tensor-core arithmetic, bit for bit; kernels ", lines[0])
    assert f"kernels {shipped().digest()[:12]} ({len(shipped().files)} files)" in lines[0]
    about = rf"mxharness: baseline {re.escape(name)}, \d+ days? old, {held.checks:,} checks; compared with it"
    assert re.fullmatch(about, lines[1])
    assert lines[2] == "mxharness: no known failure"
    _, output, _ = run(tmp_path, GOOD, "-v", "--op", "dequant", "-k", "nothing")
    assert "mxharness: compared with no baseline (--baseline NAME)\n" in output


FAILING = (
    GOOD
    + """
from hypothesis import given, seed, settings

def test_fuzz(op, part, random_check):
    @seed(part.stream(op))
    @settings(max_examples=part.examples, database=None)
    @given(op.fuzz())
    def holds(case):
        random_check(op, case)
    holds()
    assert op.name != "dequant"

def test_other():
    assert not "right"
"""
)


def test_what_is_not_a_check_has_its_command_in_the_record(run, tmp_path):
    drawn = ("--fuzz", "3", "--fuzz-seed", "9")
    code, _, record = run(tmp_path, FAILING, *drawn, "-k", "fuzz and (dequant or mma) or other")
    assert code == 1
    again = "mxharness run --device host --no-perplexity"
    assert {row["op"]: row["command"] for row in record["fuzz"]} == {
        op: f"{again} --op {op} --fuzz 3 --fuzz-seed 9 -k test_fuzz" for op in ("dequant", "mma")
    }
    assert [row["command"] for row in record["tests"]["failures"]] == [
        f"{again} --fuzz 3 --fuzz-seed 9 -k 'test_fuzz[dequant- and 1of1 and ]'",
        f"{again} -k test_other",
    ]
