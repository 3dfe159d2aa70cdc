"""Baselines over time: what is compared with what, where a level changes, and how many small moves are too much."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
from click.testing import CliRunner, Result
from mxharness import baseline, changes, drift, history, paths, record
from mxharness.baseline import Baseline
from mxharness.commands.baseline import baseline as command
from mxharness.device.resources import parsed
from mxharness.errors import UserError
from mxharness.op import Case, Outcome
from mxharness.record import RunRecord, Skip

CASES = 24
EARLY, LATE = "2026-01-01T00:00:00Z", "2026-12-01T00:00:00Z"


def outcome(seed: int, factor: float = 1.0, digest: int = 0, **more: object) -> Outcome:
    case = Case("gemm", (3, 33, 64), seed=seed)
    facts = {
        "case": str(case),
        "op": "gemm",
        "shape": case.shape,
        "dtype": "bf16",
        "regime": "normal",
        "device": "host",
        "gate": "bound",
        "passed": True,
        "elements": 99,
        "bad": 0,
        "nan": 0,
        "inf": 0,
        "ratio": 0.02 * (1 + seed / CASES) * factor,
        "max_ulp": 1.0,
        "nmse": 1e-6,
        "digest": f"{digest:08x}{seed:08x}",
        "inputs": f"{seed:016x}",
        "message": "",
        "high_ratio": 0.01,
        "line": 0.3,
    }
    return Outcome(**{**facts, **more})  # type: ignore[arg-type]  # the facts above have Outcome's types


FAULTS = ({"name": "swap", "caught": True, "detector": "exact"}, {"name": "drop", "caught": True, "detector": "race"})
PERPLEXITY = {
    "name": "tiny",
    "text": "prose",
    "protocol": "windows of 512",
    "weights": "mxfp4",
    "activations": "bf16",
    "perplexity": 20.0,
    "kl": 1.5e-5,
    "text_sha256": "173c",
    "passed": True,
}
KERNELS = {"gemm.cu gemm_bf16": {"registers": 64, "stack": 0, "spill_stores": 0, "spill_loads": 0, "shared": 512}}


def run(month: int = 1, factor: float = 1.0, **more: object) -> RunRecord:
    """Version number `month`, all of whose errors are `factor` times the first's; other bits where that is not 1."""
    outcomes = tuple(outcome(seed, factor, digest=month if factor != 1 else 0) for seed in range(CASES))
    facts = {
        "device_class": "host",
        "arithmetic": "tensor-core",
        "started": f"2026-{month:02}-01T00:00:00Z",
        "seconds": 1.0,
        "command": "mxharness run",
        "selected": CASES,
        "executed": CASES,
        "outcomes": outcomes,
        "environment": {"commit": f"c{month}"},
        "perplexity": (PERPLEXITY,),
        "faults": FAULTS,
        "kernels": KERNELS,
    }
    return RunRecord(**{**facts, **more})  # type: ignore[arg-type]  # the facts above have RunRecord's types


def versions(*records: RunRecord) -> tuple[Baseline, ...]:
    return tuple(replace(baseline.of(one), name=f"v{i}") for i, one in enumerate(records))


def series(values: Sequence[float], spread: float = 0.1) -> history.Series:
    points = tuple(history.Point(f"v{i}", EARLY, value, "", i > 0) for i, value in enumerate(values))
    return history.Series("x", "gemm", "ratio", points, spread, 2.0)


def gemm(*records: RunRecord) -> history.Series:
    return next(one for one in history.operator_series(versions(*records)))


# Steps


def test_a_step_is_found_where_it_is_and_how_high() -> None:
    (step,) = history.steps(series([1.0, 1.02, 0.99, 1.9, 2.1, 2.0]))
    assert step.version == "v3"
    assert step.before == pytest.approx((1.0 * 1.02 * 0.99) ** (1 / 3))
    assert step.after == pytest.approx((1.9 * 2.1 * 2.0) ** (1 / 3))


def test_two_steps_down_and_up_again() -> None:
    found = history.steps(series([2.0, 2.0, 2.0, 0.5, 0.5, 0.5, 2.0, 2.0, 2.0]))
    assert [step.version for step in found] == ["v3", "v6"]


@pytest.mark.parametrize(("deviations", "found"), [(2.9, 0), (3.1, 1)])
def test_a_step_of_two_versions_is_three_standard_deviations_of_their_difference(deviations: float, found: int) -> None:
    other = math.exp(deviations * 0.1 * math.sqrt(2))
    assert len(history.steps(series([1.0, other]))) == found


def test_chance_alone_makes_few_steps() -> None:
    draw = numpy.random.default_rng(0)
    noisy = [series([math.exp(draw.normal(0, 0.1)) for _ in range(20)]) for _ in range(300)]
    assert sum(bool(history.steps(one)) for one in noisy) < 30


def test_the_fit_is_the_best_of_all() -> None:
    """Against every way to cut nine points."""
    draw = numpy.random.default_rng(1)
    for _ in range(20):
        values = [draw.choice([0.0, 4.0]) + draw.normal(0, 1) for _ in range(9)]

        def cost(starts: tuple[int, ...], values: list[float] = values) -> float:
            bounds = [0, *starts, len(values)]
            parts = [values[a:b] for a, b in pairwise(bounds)]
            return 9 * len(starts) + sum(sum((x - sum(p) / len(p)) ** 2 for x in p) for p in parts)

        every = [tuple(i + 1 for i in range(8) if mask >> i & 1) for mask in range(256)]
        found = history.steps(series([math.exp(value) for value in values], spread=1.0))
        starts = tuple(int(step.version[1:]) for step in found)
        assert cost(starts) == pytest.approx(min(map(cost, every)))


def test_a_break_is_no_step() -> None:
    points = tuple(history.Point(f"v{i}", EARLY, value, "", i not in (0, 2)) for i, value in enumerate((1, 1, 9, 9)))
    broken = replace(series([1.0]), points=points)
    assert history.steps(broken) == ()
    assert history.growth(broken) == history.Growth("v2", "v3", 1.0, 2.0)


# Series


def test_an_operator_chains_what_two_versions_share() -> None:
    """New cases with large errors change nothing, and neither does a case that went."""
    second = run(2, 1.1)
    larger = replace(outcome(99), ratio=0.9, inputs="9" * 16)
    second = replace(second, outcomes=(*second.outcomes[1:], larger))
    third = run(3, 1.21)
    third = replace(third, outcomes=(*third.outcomes[1:], larger))
    found = gemm(run(1), second, third)
    moved = 1.1 ** ((CASES - 1) / CASES)  # one of them, the newcomer, stayed
    assert [point.value for point in found.points] == pytest.approx([1.0, 1.1, 1.1 * moved], rel=1e-3)
    assert [point.comparable for point in found.points] == [False, True, True]


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": "f" * 16},
        {"elements": 98},
    ],
)
def test_other_inputs_are_not_compared(change: dict[str, object]) -> None:
    second = run(2, 3.0)
    second = replace(second, outcomes=tuple(replace(one, **change) for one in second.outcomes))
    assert not any(one.points[1].comparable for one in history.check_series(versions(run(1), second)))
    assert [point.value for point in gemm(run(1), second).points] == [1.0, 1.0]


def test_another_tolerance_and_another_ratio_of_the_same_bits_are_another_ruler() -> None:
    first = run(1, tolerances={"gemm": {"ceiling": "0.1"}})
    wider = run(2, 0.5, tolerances={"gemm": {"ceiling": "0.2"}})
    assert not gemm(first, wider).points[1].comparable
    same_bits = replace(run(2), outcomes=tuple(outcome(seed, 3.0) for seed in range(CASES)))
    assert not gemm(run(1), same_bits).points[1].comparable
    assert gemm(run(1), run(2, 3.0)).points[1].comparable


def test_a_perplexity_of_another_text_starts_anew() -> None:
    second = run(2, perplexity=({**PERPLEXITY, "text_sha256": "beef"},))
    (found,) = history.perplexity_series(versions(run(1), second))
    assert [point.comparable for point in found.points] == [False, False]


# Growth


def test_many_small_moves_are_one_large_one() -> None:
    """Each of them is 8 %, and no step; together they are past the budget."""
    found = gemm(*(run(1 + i, 1.08**i) for i in range(4)))
    grown = history.growth(found)
    assert grown.exceeded
    assert (grown.since, grown.until, grown.factor) == ("v0", "v3", pytest.approx(1.08**3, rel=1e-3))
    assert not history.growth(gemm(*(run(1 + i, 1.08**i) for i in range(3)))).exceeded
    assert not history.growth(gemm(run(1, 1.5), run(2))).exceeded


def test_few_cases_have_what_chance_may_do_as_budget() -> None:
    few = [replace(one, outcomes=one.outcomes[:2]) for one in (run(1), run(2, 1.5))]
    assert gemm(*few).budget == pytest.approx(math.exp(3 * math.sqrt(2) * history.SPREAD / math.sqrt(2)))
    assert gemm(run(1), run(2, 1.5)).budget == history.OPERATOR_BUDGET


def test_growth_of_perplexity_that_passes_every_time_is_seen() -> None:
    rows = [{**PERPLEXITY, "perplexity": 20 * math.exp(0.0009 * i)} for i in range(5)]
    found = versions(*(run(1 + i, perplexity=(row,)) for i, row in enumerate(rows)))
    (first, *_) = history.perplexity_series(found)
    assert history.growth(first).exceeded
    assert all(not moved(old, new) for old, new in pairwise(found))


def moved(before: Baseline, after: Baseline) -> dict[str, changes.Status]:
    return {change.key: change.status for change in changes.between(before, after) if change.status != "same"}


def test_a_comparison_fails_on_growth_until_it_is_accepted(tmp_path: Path) -> None:
    for i in range(3):
        baseline.create(f"v{i}", run(1 + i, 1.08**i), root=tmp_path)
    fourth = run(4, 1.08**3)
    assert "gemm growth" in {change.key for change in drift.compare("v2", fourth, root=tmp_path).changes}
    baseline.create("v3", fourth, root=tmp_path)
    again = drift.compare("v3", run(5, 1.08**3, outcomes=fourth.outcomes), root=tmp_path)
    assert not again.passed
    (grown,) = [change for change in again.changes if change.status != "same"]
    assert grown.message.startswith("ratio, relative has grown to 1.26 times what it was at v0, 1.25 allowed")
    baseline.create("v3", fourth, root=tmp_path, replace=True, accepted="a faster sum")
    assert baseline.load("host", "v3", tmp_path).accepted == "a faster sum"
    assert drift.compare("v3", run(5, 1.08**3, outcomes=fourth.outcomes), root=tmp_path).passed


def test_what_came_since_the_baseline_alone_is_told_once(tmp_path: Path) -> None:
    baseline.create("v0", run(1), root=tmp_path)
    found = drift.compare("v0", run(2, 1.5), root=tmp_path)
    assert {change.key for change in found.changes if change.status != "same"} == {
        baseline.key(outcome(seed).case, "bound") for seed in range(CASES)
    }


# What moved


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"faults": ({**FAULTS[0], "detector": "bound"}, FAULTS[1])}, {"swap": "drifted"}),
        ({"faults": ({**FAULTS[0], "caught": False}, FAULTS[1])}, {"swap": "failed"}),
        ({"faults": FAULTS[:1]}, {"drop": "vanished"}),
        ({"faults": (*FAULTS, {**FAULTS[0], "name": "more"})}, {"more": "new"}),
        ({"faults": None}, {}),
        ({"kernels": {}}, {}),
        ({"perplexity": ({**PERPLEXITY, "kl": 2e-5},)}, {"tiny | prose | windows of 512 | mxfp4 | bf16": "drifted"}),
        ({"perplexity": ({**PERPLEXITY, "kl": 1.4e-5},)}, {}),
    ],
)
def test_faults_and_divergence_are_compared(change: dict[str, object], expected: dict[str, str]) -> None:
    assert moved(*versions(run(1), run(2, **change))) == expected  # type: ignore[arg-type]  # RunRecord's fields


@pytest.mark.parametrize(
    ("column", "value", "status"),
    [("spill_stores", 8, "drifted"), ("registers", 65, "drifted"), ("registers", 40, "better")],
)
def test_a_kernels_spills_and_registers_are_compared(column: str, value: int, status: str) -> None:
    ((name, row),) = KERNELS.items()
    found = changes.between(*versions(run(1), run(2, kernels={name: {**row, column: value}})))
    (change,) = [one for one in found if one.status != "same"]
    assert (change.key, change.op, change.status) == (name, "kernels", status)
    assert change.message == f"{column} {row[column]} -> {value}"


@pytest.mark.parametrize("column", ["high_ratio", "line"])
def test_the_errors_distribution_drifts_though_the_largest_stays(column: str) -> None:
    second = run(2)
    second = replace(second, outcomes=(replace(second.outcomes[0], **{column: 0.6}), *second.outcomes[1:]))
    assert list(moved(*versions(run(1), second)).values()) == ["drifted"]


def test_a_baseline_of_before_the_tails_were_kept_still_compares() -> None:
    first, second = versions(run(1), run(2))
    old = {
        key: {name: value for name, value in row.items() if name not in ("high_ratio", "line")}
        for key, row in first.checks.items()
    }
    assert moved(replace(first, checks=old, faults={}, kernels={}), second) == {}


def test_faults_and_kernels_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    record.save(run(), path)
    assert record.load(path) == run()
    baseline.create("main", record.load(path), root=tmp_path)
    loaded = baseline.load("host", "main", tmp_path)
    assert loaded.kernels == KERNELS
    assert loaded.faults == {row["name"]: {"caught": True, "detector": row["detector"]} for row in FAULTS}
    assert loaded.perplexity["tiny | prose | windows of 512 | mxfp4 | bf16"]["kl"] == 1.5e-5
    assert replace(loaded, name="this run") == baseline.of(run())


def test_a_fault_planted_twice_is_caught_where_both_are() -> None:
    twice = (FAULTS[0], {**FAULTS[0], "caught": False, "detector": ""}, {**FAULTS[0], "detector": "bound"})
    assert baseline.of(run(faults=twice)).faults == {"swap": {"caught": False, "detector": "bound, exact"}}


def test_a_record_of_before_kernels_were_kept_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    record.save(run(), path)
    document = json.loads(path.read_text())
    del document["kernels"]
    path.write_text(json.dumps(document))
    assert record.load(path) == run(kernels={})


def test_across_device_classes_the_sentence_says_what_differs(tmp_path: Path) -> None:
    baseline.create("main", run(device_class="sm_90", environment={"gpu": "H100", "commit": "a"}), root=tmp_path)
    found = drift.compare("sm_90/main", run(environment={"cpu": "Xeon", "commit": "a"}), root=tmp_path)
    assert found.passed
    assert found.first_line.endswith("bit for bit, though these differ: cpu, gpu")


def test_what_the_assembler_says_is_read() -> None:
    text = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 39 registers, used 1 barriers, 16 bytes cumulative stack size, 64 bytes smem
ptxas info    : Compile time = 150.810 ms
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers
"""
    assert parsed(text) == {
        "first": {"registers": 39, "stack": 16, "spill_stores": 8, "spill_loads": 4, "shared": 64},
        "second": {"registers": 30, "stack": 0, "spill_stores": 0, "spill_loads": 0, "shared": 0},
    }


# The shipped versions


def test_the_versions_that_came_with_this_one_tell_a_history() -> None:
    found = history.history("sm_90", paths.baselines())
    assert [version.created for version in found] == sorted(version.created for version in found)
    assert len(found) >= 2
    every = history.all_series(found)
    assert {one.op for one in every} >= {"gemm", "perplexity"}
    assert not [one.key for one in every if history.growth(one).exceeded]


def test_a_damaged_version_is_named_and_another_class_is_not_read(tmp_path: Path) -> None:
    baseline.create("v0", run(1), root=tmp_path)
    folder = baseline.create("v0", run(1, device_class="sm_90"), root=tmp_path)
    (Path(folder) / "gemm.json").write_text('{"api_version": 7}')
    assert [version.name for version in history.history("host", tmp_path)] == ["v0"]
    with pytest.raises(UserError, match=r"sm_90/v0/gemm.json has api_version 7 and this mxharness reads up to 1"):
        history.history("sm_90", tmp_path)


# The commands


def call(tmp_path: Path, *arguments: str) -> Result:
    place = ["--at", str(tmp_path / "store")]
    return CliRunner().invoke(command, [*arguments, *place], standalone_mode=False, catch_exceptions=True)


def blessed(tmp_path: Path, name: str, found: RunRecord, *arguments: str) -> Result:
    path = tmp_path / "run.json"
    record.save(found, path)
    return call(tmp_path, "create", name, "--run", str(path), *arguments)


def test_create_shows_what_it_blesses_and_refuses_growth_without_a_reason(tmp_path: Path) -> None:
    first = blessed(tmp_path, "v0", run(1))
    assert first.return_value == 0
    assert "Blessed, against" not in first.output
    taken = blessed(tmp_path, "v0", run(2, 1.1))
    assert isinstance(taken.exception, UserError)
    second = blessed(tmp_path, "v1", run(2, 1.1))
    assert "Blessed, against host/v0" in second.output
    assert "drifted" in second.output
    refused = blessed(tmp_path, "v2", run(3, 1.3))
    assert refused.return_value == 1
    assert "nothing was blessed" in refused.output
    assert call(tmp_path, "list").output.count("host/") == 2
    assert blessed(tmp_path, "v2", run(3, 1.3), "--accept-growth", "faster").return_value == 0
    replaced = blessed(tmp_path, "v1", run(2, 1.05), "--replace")
    assert "Blessed, against host/v1" in replaced.output


def test_create_can_replace_what_cannot_be_read(tmp_path: Path) -> None:
    blessed(tmp_path, "v0", run(1))
    (tmp_path / "store" / "host" / "v0" / "gemm.json").write_text("{")
    assert blessed(tmp_path, "v0", run(1), "--replace").return_value == 0
    assert len(baseline.load("host", "v0", tmp_path / "store").checks) == CASES


def test_history_fails_on_growth_and_names_steps(tmp_path: Path) -> None:
    for i in range(4):
        baseline.create(f"v{i}", run(1 + i, 1.08**i), root=tmp_path / "store")
    found = call(tmp_path, "history", "host")
    assert found.return_value == 1
    assert "FAIL: 4 versions of host, v0 to v3" in found.output
    document = json.loads(call(tmp_path, "history", "host", "--json").output)
    assert [row["key"] for row in document["grown"]] == ["gemm"]
    assert [row["commit"] for row in document["versions"]] == ["c1", "c2", "c3", "c4"]
    shutil.rmtree(tmp_path / "store" / "host" / "v3")
    assert call(tmp_path, "history", "host").return_value == 0
    for wrong in (("history", "sm_90"), ("history", "host", "--op", "nope")):
        assert isinstance(call(tmp_path, *wrong).exception, UserError)


def test_show_and_prune(tmp_path: Path) -> None:
    for i in range(3):
        baseline.create(f"v{i}", run(1 + i), root=tmp_path / "store")
    shown = call(tmp_path, "show", "v1").output
    assert "host/v1: 24 checks, 2 of 2 planted faults caught, 2026-02-01T00:00:00Z" in shown
    assert "gemm.cu gemm_bf16" in shown
    assert isinstance(call(tmp_path, "show", "v1", "--op", "nope").exception, UserError)
    assert str(outcome(3).case)[:20] in call(tmp_path, "show", "host/v1", "--op", "gemm").output
    assert "would delete (--delete does) host/v0, host/v1" in call(tmp_path, "prune", "host", "--keep", "1").output
    assert len(baseline.list_baselines(tmp_path / "store")) == 3
    assert (
        "deleted host/v0, host/v1; 1 of host left" in call(tmp_path, "prune", "host", "--keep", "1", "--delete").output
    )
    assert [one.name for one in baseline.list_baselines(tmp_path / "store")] == ["v2"]


def test_the_environment_names_a_place_for_all_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(baseline.ADDRESS, "memory://team-of-the-test/baselines")
    place = baseline.create("main", run())
    assert place == "memory://team-of-the-test/baselines/host/main.json"
    assert drift.compare("main", run(perplexity=(), skipped=(Skip("perplexity", "out", asked=True),))).passed
    assert ("host", "main") in {(one.device_class, one.name) for one in baseline.list_baselines()}
    assert {one.device_class for one in baseline.list_baselines()} >= {"sm_90"}  # those that came with this version
    baseline.remove("host", "main")
    assert ("host", "main") not in {(one.device_class, one.name) for one in baseline.list_baselines()}
