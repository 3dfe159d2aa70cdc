"""Shards put together are the whole run or fail; crashed and killed processes never look green."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from mxharness import cli, fuzz, manifest, plugin, record
from mxharness.commands import running
from mxharness.coverage import Coverage
from mxharness.errors import UserError
from mxharness.manifest import Manifest
from mxharness.merge import merge
from mxharness.op import Outcome
from mxharness.record import OtherTests, RunRecord, Skip

CASES = [f"gemm-{seed}x1x32-bf16-normal-s0" for seed in range(20)]
WHOLE = Manifest(
    checks=frozenset(f"suites/a.py::t[{case}-bound]" for case in CASES),
    tests=frozenset({"suites/b.py::fuzz[gemm]", "suites/c.py::fault[swap]", "suites/d.py::u"}),
)
IDS = [*WHOLE.checks, *(one.replace("[gemm]", "[gemm-@1of1@]") for one in WHOLE.tests)]


def outcome(case: str) -> Outcome:
    return Outcome(
        case=case, op="gemm", shape=(1, 1, 32), dtype="bf16", regime="normal", device="host", gate="bound", passed=True,
        elements=1, bad=0, nan=0, inf=0, ratio=0.5, max_ulp=0.5, nmse=0.0, digest="0" * 16, inputs="0" * 16, message="",
    )  # fmt: skip


def part(index: int, count: int = 3, *, perplexity: bool = False) -> RunRecord:
    """The record of one shard of a run that is right."""
    mine = sorted(manifest.shard(IDS, index, count))
    outcomes = tuple(outcome(case) for case in CASES if f"suites/a.py::t[{case}-bound]" in mine)
    drawn = any("fuzz[" in one for one in mine)
    row = {"name": "tiny", "perplexity": 9.0, "passed": True, "message": ""}
    return RunRecord(
        device_class="host",
        arithmetic="tensor-core",
        started=f"2026-01-0{index}T00:00:00Z",
        seconds=10.0 * index,
        command="mxharness run --shard",
        selected=len(outcomes),
        executed=len(outcomes),
        outcomes=outcomes,
        environment={"cpu": f"cpu {index}", "kernels/gemm.cu": "0" * 16, "mxharness": "1"},
        filters=(f"--shard {index}/{count}",),
        skipped=() if perplexity else (Skip("perplexity", "left out by --no-perplexity", asked=True),),
        perplexity=(row,) if perplexity else (),
        faults=({"name": "swap", "caught": True},) if any("fault[" in one for one in mine) else None,
        tests=OtherTests(passed=sum("::t[" not in one for one in mine)),
        coverage=Coverage(WHOLE.digest, 23, collected="c", selected=tuple(mine), shard=f"{index}/{count}"),
        fuzz=(fuzz.FuzzRow("gemm", 40, 40, 80, 40, 0, 0.5),) if drawn else (),
    )


def merged(*records: RunRecord) -> tuple[RunRecord, record.Verdict]:
    found = merge({f"{i}.json": one for i, one in enumerate(records)}, WHOLE, "mxharness merge")
    return found, record.verdict(found)


def test_all_shards_are_the_whole_run_and_perplexity_of_one_suffices():
    found, verdict = merged(part(2), part(1, perplexity=True), part(3))
    assert verdict.passed, verdict.first_line
    assert found.selected == found.executed == len(found.outcomes) == 20
    assert (found.filters, found.tests.passed, len(found.faults or ()), found.seconds) == ((), 3, 1, 30.0)
    assert found.coverage is not None
    assert set(found.coverage.selected) == set(IDS)
    assert verdict.first_line.startswith("PASS: 20 of 20 checks right on host")
    assert "perplexity 1 of 1" in verdict.first_line
    assert "2/3 on cpu 2 in 20 s" in str(found.environment["shards"])
    assert "left out on request" in merged(part(1), part(2), part(3))[1].first_line


def test_a_missing_shard_fails_and_is_named_with_what_it_had():
    found, verdict = merged(part(1), part(3))
    assert not verdict.passed
    assert verdict.first_line.startswith("FAIL: shard 2/3 is missing; ")
    assert found.selected < 20


def changed(one: RunRecord, **changes: object) -> RunRecord:
    assert one.coverage is not None
    return replace(one, coverage=replace(one.coverage, **changes))  # type: ignore[arg-type]  # the tests know them


def test_doubled_lost_and_contradicting_tests_fail():
    first, second, third = part(1), part(2), part(3)
    twice = merged(first, second, third, part(2))[1]
    assert not twice.passed
    assert " ran in two shards, as " in twice.first_line
    other = replace(second, outcomes=tuple(replace(one, digest="f" * 16) for one in second.outcomes))
    assert " disagree between two shards, as gemm-" in merged(first, second, third, other)[1].first_line
    assert second.coverage is not None
    less = changed(second, selected=second.coverage.selected[1:])
    line = merged(first, less, third)[1].first_line
    assert "1 test of the manifest in no shard, as gemm-" in line
    assert "is not part " in line
    unfinished = changed(second, missing=second.coverage.selected[:1])
    assert "1 of 23 selected tests did not run, as gemm-" in merged(first, unfinished, third)[1].first_line
    killed = replace(second, incomplete="the suites were killed by SIGKILL")
    assert merged(first, killed, third)[1].first_line.startswith("FAIL: 1.json: the suites were killed by SIGKILL; ")


def test_what_every_whole_run_has_may_not_be_missing_in_all_shards():
    parts = [replace(part(index), fuzz=(), faults=None) for index in (1, 2, 3)]
    line = merged(*parts)[1].first_line
    assert line.startswith("FAIL: no planted fault was run; no random case was judged of gemm; ")


DIFFERENT = {
    "device class is host in 0.json and sm_90 in 1.json": {"device_class": "sm_90"},
    "arithmetic is tensor-core in 0.json and float32 in 1.json": {"arithmetic": "float32"},
    "filters is none in 0.json and --op gemm in 1.json": {"filters": ("--op gemm", "--shard 2/3")},
    "kernels/gemm.cu differ between 0.json and 1.json": {
        "environment": {"cpu": "", "kernels/gemm.cu": "f" * 16, "mxharness": "1"}
    },
    "mxharness is 1 in 0.json and 2 in 1.json": {
        "environment": {"cpu": "", "kernels/gemm.cu": "0" * 16, "mxharness": "2"}
    },
    "1.json is no shard: it was not run with --shard I/N": {"coverage": None},
    "number of shards is 3 in 0.json and 2 in 1.json": {"coverage": Coverage(WHOLE.digest, shard="2/2")},
    "manifest is .* in 0.json and old in 1.json": {"coverage": Coverage("old", shard="2/3")},
    "collected tests is c in 0.json and d in 1.json": {"coverage": Coverage(WHOLE.digest, collected="d", shard="2/3")},
}


@pytest.mark.parametrize("sentence", DIFFERENT)
def test_records_of_different_runs_are_not_merged(sentence):
    with pytest.raises(UserError, match=sentence):
        merged(part(1), replace(part(2), **DIFFERENT[sentence]), part(3))


def test_the_manifest_of_another_version_and_other_seeds_are_refused():
    with pytest.raises(UserError, match=r"0\.json was held against manifest .* and this mxharness has "):
        merge({"0.json": part(1, 1)}, Manifest(), "")
    seeded = [replace(part(i), fuzz=(fuzz.FuzzRow("gemm", 40, 40, seed=i),)) for i in (1, 2, 3)]
    with pytest.raises(UserError, match=r"random cases have other seeds in 0\.json than in 1\.json"):
        merged(*seeded)


def test_the_command_writes_the_whole_and_exits_by_its_verdict(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(manifest, "load", lambda _: WHOLE)
    paths = []
    for index in (1, 2, 3):
        paths.append(str(tmp_path / f"{index}.json"))
        record.save(part(index), tmp_path / f"{index}.json")
    for given, code, word in ((paths, 0, "PASS: 20 of 20"), (paths[1:], 1, "FAIL: shard 1/3 is missing")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["merge", *given, "--out", str(tmp_path / "out")])
        assert ended.value.code == code
        assert capsys.readouterr().out.startswith(word)
        assert record.verdict(record.load(tmp_path / "out" / "run.json")).passed == (code == 0)
        assert (tmp_path / "out" / "report.html").is_file()


def test_a_shard_that_does_not_exist_is_refused(capsys):
    for text in ("0/2", "3/2", "1", "a/b", "1/2/3"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["run", "--device", "host", "--no-perplexity", "--shard", text])
        assert ended.value.code == 2
        assert f"no shard '{text}'; parts are 1/N to N/N" in capsys.readouterr().err


def test_another_device_than_the_required_one_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "--device", "host", "--require-device", "sm_90"])
    assert ended.value.code == 2
    assert "this run requires sm_90 and the device is host" in capsys.readouterr().err


# Processes that die

DEADLY = """
import os, signal, pytest

@pytest.mark.parametrize("n", range(12))
def test_numbers(n):
    if n == 5:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def deadly(tmp_path, monkeypatch):
    """Arguments of a pytest on a project with one test that kills its process."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "test_it.py").write_text(DEADLY)
    ids = frozenset(f"suites/test_it.py::test_numbers[{n}]" for n in range(12))
    (tmp_path / "suites" / "manifest.txt").write_text(manifest.render(Manifest(tests=ids)))
    arguments = [
        "-c",
        "/dev/null",
        "--rootdir",
        str(tmp_path),
        "-p",
        "mxharness.plugin",
        "-p",
        "no:cacheprovider",
        "-q",
    ]
    arguments += ["--device", "host", str(tmp_path / "suites")]
    monkeypatch.setattr(
        running,
        "pytest_arguments",
        lambda request, _: [*arguments, "--report", str(request.out), "-n", request.workers],
    )
    return arguments


def test_a_crashed_worker_is_named_and_what_it_left_is_run_by_others(deadly, tmp_path):
    command = [sys.executable, "-P", "-m", "pytest", *deadly, "-n", "2", "--report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads((tmp_path / "run.json").read_text())
    assert done.returncode == 1
    assert "FAIL: 1 other test failed; " in done.stdout.replace("no planted fault was run; ", "")
    assert (found["tests"]["passed"], found["tests"]["failed"]) == (11, 1)
    assert found["tests"]["failures"][0]["id"] == "suites/test_it.py::test_numbers[5]"
    assert "crashed" in found["tests"]["failures"][0]["message"]
    assert (found["coverage"]["missing"], found["coverage"]["lost"]) == ([], [])


def test_workers_that_all_die_leave_their_tests_missing(deadly, tmp_path):
    command = [sys.executable, "-P", "-m", "pytest", *deadly, "-n", "1", "--max-worker-restart", "0"]
    done = subprocess.run([*command, "--report", str(tmp_path)], capture_output=True, text=True, check=False)
    verdict = record.verdict(record.load(tmp_path / "run.json"))
    assert done.returncode != 0
    assert not verdict.passed
    assert "6 of 12 selected tests did not run, as test_it.py::test_numbers[10]" in verdict.first_line
    assert "6 of 12 selected tests did not run" in done.stdout


def test_a_killed_run_leaves_no_green_record_and_names_its_last_test(deadly, tmp_path, capfd):
    request = running.Request(device="host", out=tmp_path / "out", model=None, workers="0")
    found = running.execute(request)
    verdict = record.verdict(found)
    assert not verdict.passed
    assert verdict.first_line.startswith(
        "FAIL: the suites were killed by SIGKILL while running suites/test_it.py::test_numbers[5]; "
    )
    assert record.load(tmp_path / "out" / "run.json") == found
    capfd.readouterr()


# Several GPUs


def test_workers_take_the_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(plugin, "device_of", lambda _: SimpleNamespace(name="cuda"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)

    def gpus(visible: str) -> list[str]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = []
        for worker in range(4):
            node = SimpleNamespace(config=None, workerinput={}, gateway=SimpleNamespace(id=f"gw{worker}"))
            plugin.pytest_configure_node(node)
            found.append(node.workerinput.get("gpu"))
        return found

    assert gpus("") == ["0", "1", "2", "0"]
    assert gpus("4,GPU-5,6") == ["4", "GPU-5", "6", "4"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert gpus("") == [None] * 4
