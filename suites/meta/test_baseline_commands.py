"""`mxharness baseline` over several versions: what it shows, refuses and takes away."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from mxharness import baseline, drift, record, report
from mxharness.commands.baseline import baseline as command
from mxharness.errors import UserError
from mxharness.record import RunRecord, Skip
from mxharness.report import head, trend

from .made import CASES, GOOD, LEFT_OUT, Page, case_of, version


def call(tmp_path: Path, *arguments: str) -> Result:
    place = ["--at", str(tmp_path / "store")]
    return CliRunner().invoke(command, [*arguments, *place], standalone_mode=False, catch_exceptions=True)


def blessed(tmp_path: Path, name: str, found: RunRecord, *arguments: str) -> Result:
    path = tmp_path / "run.json"
    record.save(found, path)
    return call(tmp_path, "create", name, "--run", str(path), *arguments)


def test_create_shows_what_it_blesses_and_refuses_growth_without_a_reason(tmp_path: Path) -> None:
    first = blessed(tmp_path, "v0", version(1))
    assert first.return_value == 0
    assert "Blessed, against" not in first.output
    taken = blessed(tmp_path, "v0", version(2, 1.1))
    assert isinstance(taken.exception, UserError)
    second = blessed(tmp_path, "v1", version(2, 1.1))
    assert "Blessed, against host/v0" in second.output
    assert "drifted" in second.output
    refused = blessed(tmp_path, "v2", version(3, 1.3))
    assert refused.return_value == 1
    assert "nothing was blessed" in refused.output
    assert call(tmp_path, "list").output.count("host/") == 2
    assert blessed(tmp_path, "v2", version(3, 1.3), "--accept-growth", "faster").return_value == 0
    replaced = blessed(tmp_path, "v1", version(2, 1.05), "--replace")
    assert "Blessed, against host/v1" in replaced.output


def test_create_can_replace_what_cannot_be_read(tmp_path: Path) -> None:
    blessed(tmp_path, "v0", version(1))
    (tmp_path / "store" / "host" / "v0" / "gemm.json").write_text("{")
    assert blessed(tmp_path, "v0", version(1), "--replace").return_value == 0
    assert len(baseline.load("host", "v0", tmp_path / "store").checks) == CASES


def test_history_fails_on_growth_and_names_steps(tmp_path: Path) -> None:
    for i in range(4):
        baseline.create(f"v{i}", version(1 + i, 1.08**i), root=tmp_path / "store")
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
        baseline.create(f"v{i}", version(1 + i), root=tmp_path / "store")
    shown = call(tmp_path, "show", "v1").output
    assert "host/v1: 24 checks, 2 of 2 planted faults caught, 2026-02-01T00:00:00Z" in shown
    assert "gemm.cu gemm_bf16" in shown
    assert isinstance(call(tmp_path, "show", "v1", "--op", "nope").exception, UserError)
    assert str(case_of(3).case)[:20] in call(tmp_path, "show", "host/v1", "--op", "gemm").output
    assert "would delete (--delete does) host/v0, host/v1" in call(tmp_path, "prune", "host", "--keep", "1").output
    assert len(baseline.list_baselines(tmp_path / "store")) == 3
    assert (
        "deleted host/v0, host/v1; 1 of host left" in call(tmp_path, "prune", "host", "--keep", "1", "--delete").output
    )
    assert [one.name for one in baseline.list_baselines(tmp_path / "store")] == ["v2"]


def test_the_environment_names_a_place_for_all_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(baseline.ADDRESS, "memory://team-of-the-test/baselines")
    place = baseline.create("main", version())
    assert place == "memory://team-of-the-test/baselines/host/main.json"
    assert drift.compare("main", version(perplexity=(), skipped=(Skip("perplexity", "out", asked=True),))).passed
    assert ("host", "main") in {(one.device_class, one.name) for one in baseline.list_baselines()}
    assert {one.device_class for one in baseline.list_baselines()} >= {"sm_90"}  # those that came with this version
    baseline.remove("host", "main")
    assert ("host", "main") not in {(one.device_class, one.name) for one in baseline.list_baselines()}


# One against the other


def test_two_baselines_are_compared_without_a_run(tmp_path: Path) -> None:
    store, page = tmp_path / "store", tmp_path / "page.html"
    kernels = {"kernels/gemm.cu": "1", "kernels/host/launch.cpp": "1"}
    first = version(1, environment=kernels, device_class="sm_90")
    second = version(2, 1.1, environment=dict.fromkeys(kernels, "2"), device_class="sm_90")
    later = version(
        3, environment=kernels, device_class="sm_90", outcomes=second.outcomes[1:], selected=23, executed=23
    )
    for i, one in enumerate((first, replace(second, perplexity=()), later)):
        baseline.create(f"v{i}", replace(one, skipped=(LEFT_OUT,)), root=store)
    found = call(tmp_path, "diff", "v0", "sm_90/v1", "--page", str(page))
    assert found.return_value == 1
    assert "FAIL: sm_90/v1 against sm_90/v0: 24 drifted, 1 vanished" in found.output
    assert "bless" not in found.output
    assert f"page: {page}" in found.output
    lines = Page(page.read_text(encoding="utf-8")).lines
    assert lines[:2] == ["FAIL:", "sm_90/v1 against sm_90/v0: 24 drifted, 1 vanished, 3 same"]
    assert "1 kernel file changed: gemm.cu" in lines, "a GPU never sees what lies in kernels/host"
    assert "24 checks in both, 24 of them with other bits" in lines
    assert any(line.startswith("2 versions: v0 (") for line in lines)
    assert not any(line.startswith("To bless") for line in lines)
    assert not any("v2" in line for line in lines), "what came later is no part of it"
    document = json.loads(call(tmp_path, "diff", "v1", "v2", "--page", str(page), "--json").output)
    assert "23 checks in both, 0 of them with other bits" in Page(page.read_text(encoding="utf-8")).lines
    assert document["counts"] == {"same": 26, "vanished": 1, "new": 1}
    assert call(tmp_path, "diff", "v0", "v0").return_value == 0
    assert isinstance(call(tmp_path, "diff", "v0", "v9").exception, UserError)
    assert isinstance(call(tmp_path, "diff", "v0", "v1", "--page", str(page / "x")).exception, UserError)


def test_baselines_of_two_device_classes_are_compared_bit_for_bit(tmp_path: Path) -> None:
    baseline.create("main", version(1, environment={"kernels/host/launch.cpp": "1"}), root=tmp_path / "store")
    other = version(2, 1.1, device_class="sm_90", environment={})
    baseline.create("main", other, root=tmp_path / "store")
    page = tmp_path / "page.html"
    found = call(tmp_path, "diff", "host/main", "sm_90/main", "--page", str(page))
    assert "FAIL: sm_90/main against host/main: 24 failed" in found.output
    lines = Page(page.read_text(encoding="utf-8")).lines
    assert "1 kernel file changed: host/launch.cpp" in lines
    assert sum(line.startswith("failed: ") for line in lines) == 8
    assert "and 16 more like these, in the table below" in lines
    both = call(tmp_path, "diff", "main", "main")
    assert "main is in host, sm_90; name one" in str(both.exception)


# One that cannot be read


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Three versions, of which the second is damaged; the damaged file."""
    for i in range(3):
        baseline.create(f"v{i}", version(1 + i, 1.2**i), root=tmp_path / "store")
    path = tmp_path / "store" / "host" / "v1" / "gemm.json"
    path.write_text('{"api_version": 7}')
    return path


def test_a_damaged_baseline_is_listed_beside_the_others(tmp_path: Path, damaged: Path) -> None:
    found = call(tmp_path, "list")
    assert found.return_value == 1
    assert [name in found.output for name in ("host/v0", "host/v1", "host/v2")] == [True] * 3
    assert f"host/v1 is left out: baseline {damaged} has api_version 7 and this mxharness reads up to 1" in found.output
    document = json.loads(call(tmp_path, "list", "--json").output)
    assert [one["name"] for one in document["baselines"]] == ["v0", "v2"]
    assert [(one["device_class"], one["name"]) for one in document["damaged"]] == [("host", "v1")]
    assert "host/v2: 24 checks" in call(tmp_path, "show", "v2").output
    assert isinstance(call(tmp_path, "show", "v1").exception, UserError)


def test_history_judges_what_can_be_read_and_fails_all_the_same(tmp_path: Path, damaged: Path) -> None:
    found = call(tmp_path, "history", "host")
    assert found.return_value == 1
    assert "host/v1 is left out: " in found.output
    assert "FAIL: 2 versions of host, v0 to v2" in found.output
    assert "1 of 26 series grown past their budget; 1 version cannot be read" in found.output
    shutil.rmtree(tmp_path / "store" / "host" / "v2")
    ended = call(tmp_path, "history", "host", "--json")
    alone = json.loads(ended.output)
    assert (ended.return_value, alone["passed"], alone["grown"]) == (1, False, [])
    assert [one["name"] for one in alone["damaged"]] == ["v1"]
    shutil.rmtree(tmp_path / "store" / "host" / "v0")
    assert "has api_version 7" in str(call(tmp_path, "history", "host").exception)


def test_prune_never_takes_what_it_cannot_date(tmp_path: Path, damaged: Path) -> None:
    found = call(tmp_path, "prune", "host", "--keep", "1", "--delete")
    assert found.return_value == 1
    assert "deleted host/v0; 1 of host left" in found.output
    assert "host/v1 is left out: " in found.output
    assert damaged.is_file()
    assert sorted(path.name for path in damaged.parents[1].iterdir()) == ["v1", "v2"]


def test_a_comparison_says_over_which_version_growth_was_not_judged(tmp_path: Path, damaged: Path) -> None:
    path = tmp_path / "run.json"
    record.save(version(4, 1.44, outcomes=version(3, 1.44).outcomes), path)
    found = call(tmp_path, "compare", "v2", "--run", str(path))
    assert found.return_value == 1
    assert f"growth not judged over host/v1: baseline {damaged} has api_version 7" in found.output
    assert "gemm growth" in found.output, "over those that can be read it is"
    damaged.unlink()
    same = drift.compare("v2", version(3), root=tmp_path / "store")
    assert not same.passed
    baseline.remove("host", "v0", tmp_path / "store")
    same = drift.compare("v2", version(3, 1.44), root=tmp_path / "store")
    assert (same.moved, same.passed) == (False, False)
    assert head.reasons(record.verdict(version(3)), same) == list(same.damaged)


def test_create_names_what_it_cannot_read_and_goes_on(tmp_path: Path, damaged: Path) -> None:
    found = blessed(tmp_path, "v3", version(4, 1.0))
    assert found.return_value == 0
    assert "host/v1 is left out: " in found.stderr
    assert "Blessed, against host/v2" in found.output


def test_the_report_draws_what_can_be_read_and_names_the_rest(tmp_path: Path, damaged: Path) -> None:
    found = trend.of("host", tmp_path / "store")
    assert found is not None
    assert [name for name, _, _ in found.versions] == ["v0", "v2"]
    text = " ".join(Page(report.render(GOOD, history=found)).lines)
    assert f"host/v1 is left out: baseline {damaged} has api_version 7" in text
