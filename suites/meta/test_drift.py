"""A run against a baseline: what counts as moved, and what a reader is told."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from mxharness import baseline, drift
from mxharness.errors import UserError
from mxharness.ops import find

from .made import LEFT_OUT, PERPLEXITY, outcome, run


def statuses(found: drift.Comparison) -> dict[str, str]:
    return {change.key: change.status for change in found.changes if change.status != "same"}


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
    found = drift.compare(
        "main", run(outcome(message="51x the bound", ratio=51.0), outcome(7), run().outcomes[2]), root=tmp_path
    )
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
