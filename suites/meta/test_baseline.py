"""The run record's verdict and the baseline: what may be blessed, what counts as moved, what a reader is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mxharness import baseline, drift, record
from mxharness.errors import UserError
from mxharness.op import Case, Outcome
from mxharness.ops import find
from mxharness.record import OtherTests, RunRecord, Skip

LEFT_OUT = Skip("perplexity", "left out", asked=True)
PERPLEXITY = {
    "name": "tiny",
    "text": "prose",
    "protocol": "windows of 512",
    "weights": "mxfp4",
    "activations": "bf16",
    "perplexity": 59.7537,
    "text_sha256": "173c",
    "tokens_per_second": 101.0,
    "passed": True,
    "message": "within tolerance",
}


def outcome(seed: int = 0, **changes: object) -> Outcome:
    case = Case("gemm", (3, 33, 64), seed=seed)
    facts = {
        "case": str(case),
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "regime": case.regime,
        "device": "host",
        "gate": "bound",
        "passed": True,
        "elements": 99,
        "bad": 0,
        "nan": 0,
        "inf": 0,
        "ratio": 0.31234567,
        "max_ulp": 0.75,
        "nmse": 1.23456e-6,
        "digest": f"{seed:016x}",
        "inputs": "abcdef0123456789",
        "message": "",
    }
    return Outcome(**{**facts, **changes})  # type: ignore[arg-type]  # the facts above have Outcome's types


def run(*outcomes: Outcome, **changes: object) -> RunRecord:
    outcomes = outcomes or (outcome(0), outcome(1), outcome(1, gate="predicted", ratio=0.0))
    facts = {
        "device_class": "host",
        "arithmetic": "tensor-core",
        "started": "2026-11-21T22:40:00Z",
        "seconds": 1.5,
        "command": "mxharness run",
        "selected": len(outcomes),
        "executed": len(outcomes),
        "outcomes": outcomes,
        "environment": {"kernels/gemm.cu": "1234"},
        "perplexity": (PERPLEXITY,),
    }
    return RunRecord(**{**facts, **changes})  # type: ignore[arg-type]  # the facts above have RunRecord's types


def broken(**changes: object) -> Outcome:
    return outcome(0, **{"passed": False, "bad": 1, "ratio": 51.0, "message": "51x the bound", **changes})


def statuses(found: drift.Comparison) -> dict[str, str]:
    return {change.key: change.status for change in found.changes if change.status != "same"}


# The record


def test_a_record_survives_the_file_with_infinities_and_nan(tmp_path: Path) -> None:
    kept = run(
        outcome(0, ratio=math.inf, nmse=-math.inf, passed=False, bad=1, message="wrong"),
        perplexity=({**PERPLEXITY, "perplexity": math.inf},),
        faults=({"name": "swap", "caught": True, "detector": "exact"},),
        skipped=(LEFT_OUT,),
        filters=("--op gemm",),
        axes={"gemm": "M N K"},
        tests=OtherTests(1, 1, 0, (record.Failure("a::b", "boom"),)),
    )
    record.save(kept, tmp_path / "run.json")
    assert record.load(tmp_path / "run.json") == kept
    record.save(run(outcome(0, ratio=math.nan)), tmp_path / "run.json")
    assert math.isnan(record.load(tmp_path / "run.json").outcomes[0].ratio)
    text = (tmp_path / "run.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is damaged"),
        ("[]", "no api_version"),
        ('{"api_version": 99}', "reads up to 1"),
        ('{"api_version": 1}', "not a complete run record"),
        ('{"api_version": true, "seconds": 1}', "no api_version"),
    ],
)
def test_a_file_that_is_no_record_is_named_in_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        record.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        record.load(tmp_path / "absent.json")


def test_a_failed_outcome_cannot_read_back_as_passed(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    record.save(run(), path)
    path.write_text(path.read_text().replace('"passed": true', '"passed": "no"', 1))
    with pytest.raises(UserError, match="not a complete run record"):
        record.load(path)


def test_a_good_run_passes_with_its_coverage_in_the_first_line() -> None:
    found = record.verdict(run())
    assert found.passed
    assert found.first_line.startswith(
        "PASS: 3 of 3 checks right on host (bit-exact tensor-core arithmetic); 1 operator"
    )
    assert "perplexity 1 of 1" in found.first_line


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"executed": 2}, "1 of 3 selected checks did not execute"),
        ({"selected": 4}, "1 of 4 selected checks did not execute"),
        ({"selected": 0, "executed": 0}, "no check executed"),
        ({"executed": 0}, "no check executed"),
        ({"executed": 5, "selected": 5}, "2 executed checks left no verdict"),
        ({"outcomes": (broken(), outcome(1), outcome(2))}, "1 check failed: gemm 1"),
        ({"outcomes": (outcome(0, bad=1), outcome(1), outcome(2))}, "1 check failed: gemm 1"),
        ({"outcomes": (outcome(0, ratio=math.nan), outcome(1), outcome(2))}, "1 check failed: gemm 1"),
        ({"outcomes": (outcome(0, elements=0), outcome(1), outcome(2))}, "1 check compared no element"),
        ({"perplexity": ()}, "perplexity did not run"),
        ({"perplexity": (), "skipped": (Skip("perplexity", "no model here"),)}, "no model here"),
        ({"perplexity": ({**PERPLEXITY, "passed": False},)}, "perplexity out of tolerance: tiny"),
        ({"perplexity": ({**PERPLEXITY, "perplexity": math.nan},)}, "perplexity out of tolerance: tiny"),
        ({"faults": ()}, "no planted fault was run"),
        ({"faults": ({"name": "swap", "caught": False},)}, "1 planted fault not caught: swap"),
        ({"tests": OtherTests(failed=2)}, "2 other tests failed"),
    ],
)
def test_a_run_that_did_less_or_found_more_fails_and_says_so(changes: dict[str, object], reason: str) -> None:
    found = record.verdict(run(**changes))
    assert not found.passed
    assert found.first_line.startswith("FAIL: ")
    assert reason in found.first_line
    assert any(reason in one for one in found.reasons)


def test_perplexity_left_out_on_request_passes_and_shows() -> None:
    found = record.verdict(run(perplexity=(), skipped=(LEFT_OUT,)))
    assert found.passed
    assert "perplexity left out on request" in found.first_line


# Blessing


def test_a_baseline_reads_back_and_its_text_is_sorted_and_repeatable(tmp_path: Path) -> None:
    kept = run(outcome(2), outcome(1), outcome(0))
    folder = baseline.create("main", kept, root=tmp_path)
    again = baseline.create("other", replace(kept, outcomes=kept.outcomes[::-1]), root=tmp_path)
    names = ["environment.json", "gemm.json", "perplexity.json", "tolerances.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)
    lines = [line for line in (folder / "gemm.json").read_text().splitlines() if "gemm-3x33x64" in line]
    assert lines == sorted(lines)
    assert len(lines) == 3
    assert '"ratio": 0.3123}' in lines[0]
    assert "tokens_per_second" not in (folder / "perplexity.json").read_text()
    loaded = baseline.load("host", "main", tmp_path)
    assert loaded.checks == baseline.entries(kept)
    assert loaded.created == kept.started
    assert baseline.digests("host", "main", tmp_path)[baseline.key(outcome(1).case, "bound")] == f"{1:016x}"
    assert [(one.device_class, one.name, one.operators, one.checks) for one in baseline.list_baselines(tmp_path)] == [
        ("host", "main", ("gemm",), 3),
        ("host", "other", ("gemm",), 3),
    ]


def test_nothing_is_overwritten_without_replace(tmp_path: Path) -> None:
    baseline.create("main", run(), root=tmp_path)
    changed = run(outcome(0, digest="f" * 16))
    with pytest.raises(UserError, match="host/main exists; --replace"):
        baseline.create("main", changed, root=tmp_path)
    assert len(baseline.digests("host", "main", tmp_path)) == 3
    baseline.create("main", changed, replace=True, root=tmp_path)
    assert list(baseline.digests("host", "main", tmp_path).values()) == ["f" * 16]
    assert [path.name for path in (tmp_path / "host").iterdir()] == ["main"]


@pytest.mark.parametrize(
    ("unfit", "says"),
    [
        (run(broken()), "a failing run cannot be a baseline: 1 check failed"),
        (run(broken(), known=({"check": f"{broken().case} {broken().gate}"},)), "a run with known failures cannot be"),
        (run(selected=9), "6 of 9 selected checks did not execute"),
        (run(filters=("--op gemm",)), "limited by --op gemm"),
        (run(arithmetic="float32"), "needs tensor-core arithmetic"),
        (run(outcome(0), outcome(0, digest="f" * 16)), "ran twice with different bits"),
    ],
)
def test_an_unfit_run_is_not_blessed(tmp_path: Path, unfit: RunRecord, says: str) -> None:
    with pytest.raises(UserError, match=says):
        baseline.create("main", unfit, root=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", ".", "..", "../main", "a/b", "-x", ".x", "a b", "main\n", "x" * 65])
def test_a_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="is no name for a baseline"):
        baseline.create(name, run(), root=tmp_path)
    with pytest.raises(UserError, match="is no device class"):
        baseline.create("main", run(device_class="../host"), root=tmp_path)
    assert not list(tmp_path.iterdir())


def _crash_after(calls: int, target: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    """`target`, raising at call number `calls` (from 0) instead of doing anything."""
    count = 0

    def rename(self: Path, other: Path) -> Path:
        nonlocal count
        count += 1
        if count == calls + 1:
            raise KeyboardInterrupt
        return target(self, other)

    return rename


@pytest.mark.parametrize("calls", [0, 1])
def test_a_crash_while_replacing_leaves_the_old_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    baseline.create("main", run(), root=tmp_path)
    before = baseline.load("host", "main", tmp_path)
    monkeypatch.setattr(Path, "rename", _crash_after(calls, Path.rename))
    with pytest.raises(KeyboardInterrupt):
        baseline.create("main", run(outcome(0, digest="f" * 16)), replace=True, root=tmp_path)
    monkeypatch.undo()
    assert baseline.load("host", "main", tmp_path) == before
    assert [folder.name for folder in (tmp_path / "host").iterdir()] == ["main"]


def test_a_crash_while_writing_a_file_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    record.save(run(), path)
    before = path.read_text()
    monkeypatch.setattr(Path, "replace", _crash_after(0, Path.replace))
    with pytest.raises(KeyboardInterrupt):
        record.save(run(seconds=9.0), path)
    monkeypatch.undo()
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


# Reading


def test_a_missing_baseline_says_what_exists(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is none yet; `mxharness baseline create main` makes one"):
        drift.compare("main", run(), root=tmp_path)
    baseline.create("main", run(), root=tmp_path)
    with pytest.raises(
        UserError, match="no baseline host/other; there are host/main; `mxharness baseline create other`"
    ):
        drift.compare("other", run(), root=tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("gemm.json", "{", "", "is damaged"),
        ("gemm.json", '"api_version": 1', '"api_version": 2', "reads up to 1"),
        ("gemm.json", '"digest": "', '"digets": "', "has no valid digest"),
        ("gemm.json", '"ratio": 0.3123', '"ratio": "small"', "has no valid ratio"),
        ("gemm.json", '"checks"', '"cheques"', "it has no 'checks'"),
        ("environment.json", '"api_version"', '"version"', "no api_version"),
        ("perplexity.json", '"perplexity": 59.7537', '"perplexity": null', "has no valid perplexity"),
    ],
)
def test_a_damaged_or_newer_baseline_is_refused(tmp_path: Path, file: str, old: str, new: str, says: str) -> None:
    path = baseline.create("main", run(), root=tmp_path) / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=says) as caught:
        drift.compare("main", run(), root=tmp_path)
    assert file in str(caught.value)


def test_a_baseline_without_checks_or_environment_is_refused(tmp_path: Path) -> None:
    folder = baseline.create("main", run(), root=tmp_path)
    (folder / "gemm.json").unlink()
    with pytest.raises(UserError, match="holds no check"):
        drift.compare("main", run(), root=tmp_path)
    (folder / "environment.json").unlink()
    with pytest.raises(UserError, match="cannot read baseline"):
        drift.compare("main", run(), root=tmp_path)


# Comparing


def test_the_same_run_is_the_same(tmp_path: Path) -> None:
    baseline.create("main", run(), root=tmp_path)
    found = drift.compare("main", run(), root=tmp_path)
    assert found.passed
    assert dict(found.counts) == {"same": 4}
    assert found.first_line == "PASS: host against host/main: 4 same"


MOVED = {"digest": "f" * 16}


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({**MOVED, "ratio": 0.2}, "better"),
        ({**MOVED, "ratio": 0.4}, "drifted"),
        ({**MOVED, "ratio": 0.2, "nmse": 9e-6}, "drifted"),
        (MOVED, "drifted"),
        ({"ratio": 0.2}, "drifted"),
        ({"inputs": "0" * 16}, "drifted"),
        ({"elements": 98}, "drifted"),
        ({"ratio": 0.3124}, "same"),
    ],
)
def test_what_moved_is_told_apart(tmp_path: Path, changes: dict[str, object], status: str) -> None:
    baseline.create("main", run(), root=tmp_path)
    found = drift.compare("main", run(outcome(0, **changes), *run().outcomes[1:]), root=tmp_path)
    key = baseline.key(outcome(0).case, "bound")
    assert statuses(found).get(key, "same") == status
    assert found.passed == (status in {"same", "better"})
    change = next(change for change in found.changes if change.key == key)
    assert bool(change.message) == (status != "same")
    assert ("other bits" in change.message) == ("digest" in changes)
    assert ("(99 -> 98 elements)" in change.message) == ("elements" in changes)


def test_a_changed_tolerance_is_a_line_of_its_own_whatever_the_verdicts(tmp_path: Path) -> None:
    tolerance = find("gemm").tolerance
    before = run(outcome(), tolerances={"gemm": tolerance.provenance})
    baseline.create("main", before, root=tmp_path)
    assert drift.compare("main", before, root=tmp_path).passed
    looser = run(outcome(), tolerances={"gemm": replace(tolerance, ceiling=0.25).provenance})
    found = drift.compare("main", looser, root=tmp_path)
    assert not found.passed
    assert statuses(found)["gemm tolerance"] == "drifted"
    assert "tolerance of gemm changed: ceiling: 0.1 -> 0.25" in [change.message for change in found.changes]


def test_a_baseline_from_before_tolerances_were_kept_still_compares(tmp_path: Path) -> None:
    folder = baseline.create("main", run(outcome()), root=tmp_path)
    (folder / "tolerances.json").unlink()
    now = run(outcome(), tolerances={"gemm": find("gemm").tolerance.provenance})
    assert baseline.load("host", "main", tmp_path).tolerances == {}
    assert drift.compare("main", now, root=tmp_path).passed


def test_failed_new_and_vanished_fail_with_the_command(tmp_path: Path) -> None:
    baseline.create("main", run(), root=tmp_path)
    found = drift.compare("main", run(broken(), outcome(7), run().outcomes[2]), root=tmp_path)
    assert not found.passed
    assert statuses(found) == {
        baseline.key(outcome(0).case, "bound"): "failed",
        baseline.key(outcome(1).case, "bound"): "vanished",
        baseline.key(outcome(7).case, "bound"): "new",
    }
    assert found.command == "mxharness baseline create main --replace"
    assert found.first_line.startswith(
        "FAIL: host against host/main: 1 failed, 1 vanished, 1 new, 2 same; 1 check failed"
    )
    for outcomes in ((outcome(0), outcome(1)), (*run().outcomes, outcome(7))):
        assert not drift.compare("main", run(*outcomes), root=tmp_path).passed


def test_what_a_filter_left_out_is_not_run_but_a_failing_run_never_passes(tmp_path: Path) -> None:
    baseline.create("main", run(), root=tmp_path)
    left_out = {"filters": ("--op gemm",), "perplexity": (), "skipped": (LEFT_OUT,)}
    found = drift.compare("main", run(outcome(0), **left_out), root=tmp_path)
    assert found.passed
    assert dict(found.counts) == {"same": 1, "not run": 3}
    assert not drift.compare("main", run(outcome(0), selected=2, **left_out), root=tmp_path).passed
    nothing = drift.compare("main", run(outcome(9), **left_out), root=tmp_path)
    assert not nothing.passed


def test_a_check_with_two_results_fails(tmp_path: Path) -> None:
    baseline.create("main", run(), root=tmp_path)
    found = drift.compare("main", run(*run().outcomes, outcome(0, digest="f" * 16)), root=tmp_path)
    assert statuses(found) == {baseline.key(outcome(0).case, "bound"): "failed"}


def test_two_device_classes_are_compared_bit_for_bit_and_only_by_name(tmp_path: Path) -> None:
    gpu = run(device_class="sm_90")
    baseline.create("main", gpu, root=tmp_path)
    with pytest.raises(UserError, match="no baseline host/main; there are sm_90/main"):
        drift.compare("main", run(), root=tmp_path)
    assert drift.compare("sm_90/main", run(outcome(0, ratio=0.9), *run().outcomes[1:]), root=tmp_path).passed
    assert drift.compare("main", run(), device_class="sm_90", root=tmp_path).passed
    for changes in ({**MOVED, "ratio": 0.2}, {"inputs": "0" * 16}, {"elements": 98}):
        found = drift.compare("sm_90/main", run(outcome(0, **changes), *run().outcomes[1:]), root=tmp_path)
        assert statuses(found) == {baseline.key(outcome(0).case, "bound"): "failed"}
    assert "on a sm_90 device" in found.command


def test_float32_arithmetic_is_not_compared(tmp_path: Path) -> None:
    baseline.create("main", run(), root=tmp_path)
    with pytest.raises(UserError, match="float32 arithmetic"):
        drift.compare("main", run(arithmetic="float32"), root=tmp_path)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"perplexity": 59.79, "tokens_per_second": 3.0}, "same"),
        ({"perplexity": 59.9}, "drifted"),
        ({"perplexity": 50.0}, "drifted"),
        ({"perplexity": math.nan}, "failed"),
        ({"passed": False}, "failed"),
        ({"text_sha256": "ffff"}, "failed"),
    ],
)
def test_perplexity_drifts_in_both_directions(tmp_path: Path, changes: dict[str, object], status: str) -> None:
    baseline.create("main", run(), root=tmp_path)
    found = drift.compare("main", run(perplexity=({**PERPLEXITY, **changes},)), root=tmp_path)
    assert statuses(found).get(baseline.perplexity_key(PERPLEXITY), "same") == status
    assert found.passed == (status == "same")


def test_another_text_is_a_new_perplexity_and_the_old_one_vanished(tmp_path: Path) -> None:
    baseline.create("main", run(), root=tmp_path)
    found = drift.compare("main", run(perplexity=({**PERPLEXITY, "text": "wikitext"},)), root=tmp_path)
    assert sorted(statuses(found).values()) == ["new", "vanished"]


def test_a_changed_kernel_shows_in_the_environment(tmp_path: Path) -> None:
    baseline.create("main", run(), root=tmp_path)
    found = drift.compare("main", run(environment={"kernels/gemm.cu": "5678", "gpu": "H100"}), root=tmp_path)
    assert found.environment == (("kernels/gemm.cu", "1234", "5678"), ("gpu", "-", "H100"))
