"""Baselines: what may be blessed, that nothing is lost on the way, and what cannot be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mxharness import baseline, drift
from mxharness.errors import UserError
from mxharness.record import RunRecord

from .made import crash_after, outcome, run


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
        (run(outcome(message="51x the bound", ratio=51.0)), "a failing run cannot be a baseline: 1 check failed"),
        (
            run(outcome(message="51x the bound", ratio=51.0), known=({"check": f"{outcome().case} bound"},)),
            "a run with known failures cannot be",
        ),
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


@pytest.mark.parametrize("calls", [0, 1])
def test_a_crash_while_replacing_leaves_the_old_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    baseline.create("main", run(), root=tmp_path)
    before = baseline.load("host", "main", tmp_path)
    monkeypatch.setattr(Path, "rename", crash_after(calls, Path.rename))
    with pytest.raises(KeyboardInterrupt):
        baseline.create("main", run(outcome(0, digest="f" * 16)), replace=True, root=tmp_path)
    monkeypatch.undo()
    assert baseline.load("host", "main", tmp_path) == before
    assert [folder.name for folder in (tmp_path / "host").iterdir()] == ["main"]


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
