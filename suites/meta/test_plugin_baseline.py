"""pytest --baseline fails on what moved; --update-baseline writes what is right, shows it, and fails all the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from mxharness.manifest import Manifest, render
from mxharness.ops import find

pytest_plugins = ["pytester"]

SUITE = """
from dataclasses import asdict

import pytest
from mxharness.fuzz import FuzzRow
from mxharness.op import Outcome
from mxharness.ops import find

DEQUANT = find("dequant")
CASES = DEQUANT.cases[:3]

@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case}-exact")
def test_exact(case, record_property):
    about = dict(case=str(case), op="dequant", shape=case.shape, dtype=case.dtype, regime=case.regime, device="host")
    numbers = dict.fromkeys(("bad", "nan", "inf", "ratio", "max_ulp", "nmse"), 0)
    found = Outcome(**about, **numbers, digest="00", inputs="11", message="", gate="exact", passed=True, elements=1)
    record_property("outcome", asdict(found))

def test_random(record_property):
    record_property("fuzz", asdict(FuzzRow("dequant", planned=1, examples=1, checks=1, bitwise=1)))

def test_plant(record_property):
    record_property("fault", {"name": "swap", "caught": True, "detector": "exact"})
"""
MODEL = """
from dataclasses import replace

from mxharness.plugin import against

ROW = {"name": "tiny", "text": "t", "protocol": "p", "weights": "mxfp4", "activations": "fp16", "message": "so it is"}

def measured(record, request, opened):
    return replace(record, perplexity=({**ROW, "perplexity": 9.5, "passed": True},))

against.measured = measured
"""
"""A model that takes no time."""
WRITTEN = r"FAIL: baseline host/main (re)?written; run again without --update-baseline; 3 of 3 checks right on host "


@pytest.fixture
def project(pytester, monkeypatch):
    """Three checks, a random case, a fault; baselines of its own."""
    monkeypatch.setenv("MXHARNESS_BASELINES", str(pytester.path / "blessed"))
    monkeypatch.setattr("mxharness.plugin.against.measured", None)  # put back when the project's own has gone
    pytester.mkdir("kernels")
    suites = pytester.mkdir("suites")
    (suites / "test_it.py").write_text(SUITE)
    (suites / "conftest.py").write_text(MODEL)
    demand(pytester, "random", "plant")
    return pytester


def demand(project, *names):
    """Write the manifest: the three checks and other tests of these names."""
    checks = frozenset(f"suites/test_it.py::test_exact[{case}-exact]" for case in find("dequant").cases[:3])
    tests = frozenset(f"suites/test_{'it' if name != 'bits' else 'regression'}.py::test_{name}" for name in names)
    (project.path / "suites" / "manifest.txt").write_text(render(Manifest(checks, tests)))


def run(project, *arguments, at=("suites",), quiet="-q"):
    """(exit code, the verdict or the refusal, everything) of a run of the project in this process."""
    options = ("-p", "mxharness.plugin", "-p", "no:cacheprovider", "--import-mode=importlib", "--device", "host")
    done = project.runpytest_inprocess(quiet, "--rootdir", project.path, *options, *arguments, *at)
    lines = [*done.outlines, *done.errlines]
    first = next((line for line in lines if line.startswith(("PASS: ", "FAIL: ", "ERROR: "))), "")
    return done.ret, first, "\n".join(lines)


def change(project, old, new):
    path = project.path / "suites" / "test_it.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def blessed(project) -> Path:
    return project.path / "blessed" / "host" / "main"


def texts(project):
    """What the baseline holds; what of it names a time or a machine left out."""
    return {path.name: path.read_text() for path in blessed(project).iterdir() if path.name != "environment.json"}


def test_a_baseline_is_written_and_rewritten_and_the_run_fails_all_the_same(project):
    for word in ("written", "rewritten"):
        code, line, text = run(project, "--baseline", "main", "--update-baseline", quiet="-v")
        assert (" drift " in text) == (word == "rewritten"), "the first is against none"
        assert f"= Blessed{', against host/main' if word == 'rewritten' else ''} =" in text
        assert code == 1
        found = re.match(WRITTEN, line)
        assert found, line
        assert f" {word}; " in found[0]
    code, line, _ = run(project, "--baseline", "main")
    assert (code, line[:5]) == (0, "PASS:")
    assert line.endswith("; against host/main: 4 same, 1 not run")  # the model, which no suite measures
    assert json.loads((blessed(project) / "perplexity.json").read_text())["perplexity"]
    assert not list(blessed(project).parent.glob(".*")), "nothing half-written is left"


def test_what_moved_fails_and_blessing_it_shows_what_is_blessed(project):
    run(project, "--baseline", "main", "--update-baseline")
    change(project, 'digest="00"', 'digest="22"')
    code, line, text = run(project, "--baseline", "host/main", quiet="-v")
    assert code == 1
    assert line.startswith("FAIL: moved from baseline host/main: 3 drifted, 1 same, 1 not run; 3 of 3 checks right")
    assert "= Moved from host/main =" in text
    assert len(re.findall(r"(?m)^drifted +dequant-\S+ exact +other bits \(00 -> 22\)", text)) == 3
    assert "bless it: pytest --baseline main --update-baseline" in text
    assert re.search(r"(?m)^dequant +3 +3 +- +1 +3 drifted +\d", text), "the operator's line says so, too"
    before = texts(project)
    code, line, text = run(project, "--baseline", "main", "--update-baseline")
    assert code == 1
    assert re.match(WRITTEN, line)
    assert "= Blessed, against host/main =" in text
    assert len(re.findall(r"(?m)^drifted +dequant-\S+ exact +other bits \(00 -> 22\)", text)) == 3
    assert f"review and commit {blessed(project)}" in text
    assert texts(project)["dequant.json"] == before["dequant.json"].replace('"00"', '"22"')
    assert run(project, "--baseline", "main")[0] == 0


@pytest.mark.parametrize(
    ("old", "new", "arguments", "why"),
    [
        ("passed=True", "passed=False", (), "a failing result is never blessed"),
        ('{"name": "swap", "caught": True', '{"name": "swap", "caught": False', (), "a failing run cannot be a"),
        ("    record_property(\"fuzz\"", "    assert False\n    record_property(\"fuzz\"", (), "a failing result is"),
        ("    record_property(\"fuzz\"", "    assert False\n    record_property(\"fuzz\"", ("-x",), "a failing"),
        ("DEQUANT.cases[:3]", "DEQUANT.cases[:2]", (), "a failing result is never blessed"),
        ("def test_plant", "def no_test_plant", (), "a failing result is never blessed"),
    ],
    ids=["check", "fault", "other test", "stopped", "vanished case", "vanished test"],
)  # fmt: skip
def test_nothing_but_a_whole_run_that_is_right_is_blessed(project, old, new, arguments, why):
    run(project, "--baseline", "main", "--update-baseline")
    before = texts(project)
    change(project, old, new)
    change(project, 'digest="00"', 'digest="22"')
    code, line, _ = run(project, "--baseline", "main", "--update-baseline", *arguments)
    assert code == 1
    assert line.startswith("FAIL: ")
    assert f"baseline host/main not written: {why}" in line
    assert "rewritten" not in line
    assert texts(project) == before


def test_a_model_that_is_out_of_tolerance_is_not_blessed(project):
    (project.path / "suites" / "conftest.py").write_text(MODEL.replace('"passed": True', '"passed": False'))
    code, line, _ = run(project, "--baseline", "main", "--update-baseline")
    assert code == 1
    assert "baseline host/main not written: a failing run cannot be a baseline: perplexity out of tolerance: ti" in line
    assert not blessed(project).exists()


@pytest.mark.parametrize(
    ("arguments", "at", "sentence"),
    [
        (("--update-baseline",), ("suites",), "rewrites the baseline that --baseline NAME names; name one"),
        (("--baseline", "sm_90/main", "--update-baseline"), ("suites",), "a run on host cannot rewrite sm_90/main"),
        (("--baseline", "main"), ("suites",), "no baseline host/main; there are "),
        (("--baseline", "../main", "--update-baseline"), ("suites",), "a run on host cannot rewrite ../main"),
        (("--baseline", "ma in", "--update-baseline"), ("suites",), "'ma in' is no name for a baseline; take up to 64"),
        *(
            (("--baseline", "main", "--update-baseline", *part), at, f"this run ({limit}) would lose what it leaves o")
            for part, at, limit in (
                (("--op", "dequant"), ("suites",), "--op dequant"),
                (("-k", "exact"), ("suites",), "-k exact"),
                (("--quick",), ("suites",), "--quick"),
                (("--shard", "1/2"), ("suites",), "--shard 1/2"),
                (("--deselect", "x"), ("suites",), "--deselect x"),
                ((), ("suites/test_it.py",), "suites/test_it.py"),
                ((), ("kernels",), "of no project"),
            )
        ),
    ],
)  # fmt: skip
def test_what_would_lose_something_is_refused_before_anything_runs(project, arguments, at, sentence):
    code, line, text = run(project, *arguments, at=at)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert sentence in line, text
    assert not blessed(project).exists()


def test_only_what_failed_before_is_a_part_too(project):
    done = project.runpytest_inprocess(
        "-q", "--rootdir", project.path, "-p", "mxharness.plugin", "--device", "host", "--lf", "--baseline", "main",
        "--update-baseline", "--import-mode=importlib", "suites",
    )  # fmt: skip
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert any("this run (--lf) would lose" in line for line in done.errlines)


def test_the_bits_of_the_baseline_before_are_not_asked_of_the_next(project):
    (project.path / "suites" / "test_regression.py").write_text("def test_bits():\n    assert False, 'other bits'\n")
    demand(project, "random", "plant", "bits")
    assert run(project)[0] == 1
    _, line, _ = run(project, "--baseline", "main", "--update-baseline")
    assert re.match(WRITTEN, line), line
    assert "limited" not in line


def test_workers_leave_it_to_the_controller(project):
    options = ("-p", "mxharness.plugin", "-p", "no:cacheprovider", "--import-mode=importlib", "--device", "host")
    rewrite = ("--baseline", "main", "--update-baseline", "-n", "1", "--rootdir", project.path)
    (project.path / "suites" / "conftest.py").write_text(f"import mxharness.plugin.against\n{MODEL}")
    done = project.runpytest_inprocess(*options, *rewrite, "suites")
    (line,) = (line for line in done.outlines if line.startswith(("PASS: ", "FAIL: ")))
    assert re.match(WRITTEN, line), line
    assert sum(line.startswith("mxharness: host (") for line in done.outlines) == 1
    assert "mxharness: baseline host/main will be written if everything passes" in done.outlines
    assert len(list(blessed(project).parent.iterdir())) == 1
    assert len(json.loads((blessed(project) / "dequant.json").read_text())["checks"]) == 3
