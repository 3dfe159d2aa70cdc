"""A run is held against its manifest: whatever is missing, new, skipped or broken fails, and the first line says so."""

from __future__ import annotations

import re

import pytest
from mxharness import coverage, fuzz, manifest
from mxharness.errors import UserError
from mxharness.manifest import Manifest, canonical, compare, parse, render, shard, within

pytest_plugins = ["pytester"]

CHECKS = """
from dataclasses import asdict

import pytest
from mxharness.op import Outcome

@pytest.mark.gates("exact")
def test_exact(op, case, gate, record_property):
    about = dict(case=str(case), op=op.name, shape=case.shape, dtype=case.dtype, regime=case.regime, device="host")
    numbers = dict.fromkeys(("bad", "nan", "inf", "ratio", "max_ulp", "nmse"), 0)
    texts = dict.fromkeys(("digest", "inputs", "message"), "")
    found = Outcome(**about, **numbers, **texts, gate=gate, passed=True, elements=1)
    record_property("outcome", asdict(found))

def test_random(op, part, random_check, request):
    (tally,) = (row for name, row in request.node.user_properties if name == "fuzz")
    tally.update(examples=part.examples, checks=part.examples)
"""
OTHERS = """
import pytest

@pytest.mark.parametrize("n", range(3))
def test_numbers(n):
    assert n < 9

def test_plant(record_property):
    record_property("fault", {"name": "swap", "caught": True})
"""


@pytest.fixture
def project(pytester):
    """A small project of the same form: kernels/, suites/ and the manifest of what is in it."""
    pytester.mkdir("kernels")
    suites = pytester.mkdir("suites")
    (suites / "test_checks.py").write_text(CHECKS)
    (suites / "test_others.py").write_text(OTHERS)
    assert run(pytester, "--collect-only", "--manifest-to", suites / "manifest.txt")[0] == 0
    return pytester


def run(pytester, *arguments, at=("suites",)):
    """(exit code, the verdict of pytest's summary) of a run of the project in this process."""
    options = ("-p", "mxharness.plugin", "-p", "no:cacheprovider", "--import-mode=importlib", "--device", "host")
    done = pytester.runpytest_inprocess("-q", "--rootdir", pytester.path, *options, *arguments, *at)
    lines = [line for line in done.outlines if line.startswith(("PASS: ", "FAIL: "))]
    assert len(lines) == ("--collect-only" not in arguments), done.outlines
    if lines:
        heading = next(line for line in done.outlines if re.search("^=+ ", line))
        assert "= mxharness =" in heading, "the verdict is the first thing of the summary"
        assert done.outlines[done.outlines.index(heading) + 1] == lines[0]
    return done.ret, lines[0] if lines else ""


def change(project, name, old, new):
    path = project.path / "suites" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_run_of_the_whole_manifest_passes_and_a_part_says_what_limited_it(project):
    code, line = run(project)
    assert (code, line.partition(":")[0]) == (0, "PASS"), line
    assert "limited" not in line
    code, line = run(project, "--op", "dequant", "-k", "exact")
    assert code == 0
    assert re.search(r"PASS: \d+ of \d+ checks right on host .*; limited by --op dequant -k exact$", line)
    code, line = run(project, at=("suites/test_others.py::test_numbers",))
    assert code == 0
    assert "limited by suites/test_others.py::test_numbers" in line


LOSSES = {
    "a parameter set": ("test_others.py", "range(3)", "range(2)", "1 other test of the manifest vanished, as test_oth"),
    "every parameter": ("test_others.py", "range(3)", "range(0)", "3 other tests of the manifest vanished, as test_o"),
    "a test": ("test_others.py", "def test_numbers", "def no_test_numbers", "3 other tests of the manifest vanished"),
    "an operator": ("manifest.txt", "  dequant-", "  dequent-", "1 operator of the manifest vanished: dequent; "),
    "a case": ("manifest.txt", "  dequant-", "  dequant-9x", " checks of the manifest vanished, as dequant-9x"),
    "a file": (
        "manifest.txt",
        "test_others.py",
        "test_othets.py",
        "1 suite file of the manifest vanished: suites/test",
    ),
    "a file's syntax": (
        "test_others.py",
        "import pytest",
        "import pytest(",
        "could not collect suites/test_others.py",
    ),
    "the manifest": ("manifest.txt", "tests suites", "toasts suites", "manifest.txt is damaged: line "),
}


@pytest.mark.parametrize("what", LOSSES)
def test_what_vanished_fails_whatever_else_narrows_the_run(project, what):
    name, old, new, sentence = LOSSES[what]
    change(project, name, old, new)
    for arguments in ((), ("--op", "dequant", "-k", "exact", "--shard", "1/2")):
        code, line = run(project, *arguments)
        assert code == 1, arguments
        assert line.startswith("FAIL: ")
        assert sentence in line


def test_a_manifest_that_is_gone_fails(project):
    (project.path / "suites" / "manifest.txt").unlink()
    code, line = run(project)
    assert code == 1
    assert line.startswith("FAIL: cannot read the manifest ")


def test_a_gate_that_judges_nothing_any_more_is_named():
    held = Manifest(checks=frozenset({"a.py::t[gemm-s0-bound]", "a.py::t[gemm-s0-predicted]"}))
    found = compare(held, Manifest(checks=frozenset({"a.py::t[gemm-s0-bound]"})))
    assert found.gates == ("predicted",)
    assert found.lost()[0] == "1 gate of the manifest vanished: predicted"


def test_a_new_test_fails_a_whole_run_until_it_is_blessed_and_not_a_run_of_its_file(project):
    change(project, "test_others.py", "range(3)", "range(4)")
    code, line = run(project)
    assert code == 1
    assert (
        "FAIL: 1 test is not in the manifest, as test_others.py::test_numbers[3] (`mxharness manifest --write`" in line
    )
    assert run(project, at=("suites/test_others.py",))[0] == 0
    run(project, "--collect-only", "--manifest-to", project.path / "suites" / "manifest.txt")
    assert run(project)[0] == 0


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("pytest.skip('no time today')", 1),
        ("pytest.xfail('it never worked')", 1),
        ("pytest.importorskip('no_such_package')", 0),
        ("pytest.skip('no GPU: nothing was tested')", 0),
    ],
)
def test_a_skip_passes_only_where_the_machine_lacks_something(project, statement, code):
    change(project, "test_others.py", "assert n < 9", statement)
    found, line = run(project)
    assert found == code, line
    assert ("skipped for no lack of the machine's" in line) == bool(code)


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        ("test_others.py", 'record_property("fault"', 'record_property("flaw"', "no planted fault was run"),
        ("test_checks.py", "examples=part.examples, ", "", "no random case was judged of "),
        (
            "test_checks.py",
            "tally.update(",
            "tally.update(rejected=99, ",
            "most random cases of quantize prove not",
        ),
        ("test_checks.py", "    record_property(", "    (lambda *_: None)(", " selected tests did not run, as "),
    ],
)
def test_a_test_that_does_nothing_fails_the_run(project, name, old, new, sentence):
    change(project, name, old, new)
    code, line = run(project)
    assert code == 1
    assert sentence in line
    assert line.startswith("FAIL: ")


def test_a_plugin_that_leaves_tests_out_unasked_fails_the_run(project):
    hook = "def pytest_collection_modifyitems(items):\n    items[:] = [one for one in items if '[1]' not in one.name]\n"
    (project.path / "suites" / "conftest.py").write_text(hook)
    code, line = run(project)
    assert code == 1
    assert line.startswith("FAIL: 1 test of the manifest left out by no option, as test_others.py::test_numbers[1]; ")
    assert run(project, "--op", "dequant")[0] == 0, "what is limited says so"


def test_an_empty_selection_fails(project):
    code, line = run(project, "-k", "nothing_is_called_this")
    assert (code, line.partition(";")[0]) == (1, "FAIL: nothing was selected")


def test_a_run_that_stops_early_names_what_it_left(project):
    change(project, "test_others.py", "n < 9", "n < 1")
    code, line = run(project, "-x")
    assert code == 1
    assert re.search(r"FAIL: 2 of [\d,]+ selected tests did not run, as test_others.py::test_numbers\[2\]", line)


# The file


SOME = Manifest(
    checks=frozenset({"suites/a.py::t[gemm-1x1x32-bf16-normal-s0-bound]"}),
    tests=frozenset({"suites/a.py::u", "suites/b.py::C::v[x y-é]", "suites/b.py::C::v[2]", "suites/sub/c.py::w"}),
)


def test_the_file_is_sorted_and_is_read_back():
    text = render(SOME)
    assert parse(text) == SOME
    assert render(parse(text)) == text
    assert text.splitlines()[1:] == [
        "checks suites/a.py::t",
        "  gemm-1x1x32-bf16-normal-s0-bound",
        "tests suites/a.py::u",
        "tests suites/b.py::C::v",
        "  2",
        "  x y-é",
        "tests suites/sub/c.py::w",
    ]
    with pytest.raises(UserError, match=r"f\.txt is damaged: line 2 "):
        parse("tests a\nb c", "f.txt")


def test_a_part_of_the_suites_is_held_against_its_part_of_the_manifest():
    assert within(SOME, ["suites"]) == SOME
    assert within(SOME, ["suites/b.py::C"]).ids == {"suites/b.py::C::v[x y-é]", "suites/b.py::C::v[2]"}
    assert within(SOME, ["suites"], ["suites/b.py", "suites/sub"]).ids == within(SOME, ["suites/a.py"]).ids
    assert not within(SOME, ["suites/a.p", "suites/b.py::C::v[x"]).ids


def test_what_varies_by_machine_is_no_part_of_an_id():
    assert canonical("a.py::t[@sm_90/v0.2.0-rc@-gemm]") == canonical("a.py::t[gemm-@none@]") == "a.py::t[gemm]"
    assert canonical("a.py::t[@none@]") == canonical("a.py::t") == "a.py::t"
    assert canonical("a.py::t[x@y]") == "a.py::t[x@y]"


def test_shards_are_disjoint_complete_balanced_and_spread_each_function():
    ids = [f"a.py::t[{i}]" for i in range(100)] + [f"a.py::u[{i}]" for i in range(7)] + ["b.py::v", "b.py::w"]
    parts = [shard(ids, index, 4) for index in (1, 2, 3, 4)]
    assert sorted(one for part in parts for one in part) == sorted(ids)
    assert {len(part) for part in parts} <= {27, 28}
    for part in parts:
        assert sum("::t[" in one for one in part) == 25
        assert sum("::u[" in one for one in part) in (1, 2)
    assert shard(reversed(ids), 2, 4) == parts[1]
    assert shard(ids, 1, 1) == set(ids)


# Random cases


@pytest.mark.parametrize("examples", [1, 40, 100, 101, 1000, 1001])
def test_the_parts_of_a_fuzz_add_up_and_draw_from_other_seeds(examples):
    from mxharness.ops import OPS

    parts = fuzz.parts(examples, 7)
    assert sum(part.examples for part in parts) == examples
    assert min(part.examples for part in parts) > 0
    assert len(parts) == (1 if examples <= 100 else 8)
    streams = {part.stream(op) for part in (*parts, *fuzz.parts(examples, 8)) for op in OPS}
    assert len(streams) == 2 * len(parts) * len(OPS)


def test_the_parts_of_an_operator_are_one_row():
    first = {"op": "gemm", "planned": 5, "examples": 5, "checks": 9, "bitwise": 4, "rejected": 1, "largest": 0.25}
    rows = fuzz.merged([first, {**first, "largest": 0.75, "examples": 4}, {**first, "op": "dequant", "bitwise": 9}])
    assert [row.op for row in rows] == ["dequant", "gemm"]
    assert (rows[1].planned, rows[1].examples, rows[1].checks, rows[1].rejected) == (10, 9, 18, 2)
    assert rows[1].margin == 0.25
    assert fuzz.sentence(rows) == "14 random cases right, smallest margin 0.25 of the bound (gemm)"
    assert fuzz.sentence(rows[:1]) == "5 random cases right"


def test_hypothesis_runs_as_many_random_cases_as_were_asked_for(pytester):
    pytester.makepyfile(
        test_it="""
        from hypothesis import given, seed, settings

        def test_fuzz(op, part, random_check):
            @seed(part.stream(op))
            @settings(max_examples=part.examples)
            @given(op.fuzz())
            def holds(case):
                random_check(op, case)
            holds()
        """
    )
    code, line = run(pytester, "--op", "dequant", "--fuzz", "123", at=("test_it.py",))
    assert code == 0
    assert "8 of 8 other tests passed; 123 random cases right" in line


@pytest.mark.parametrize("why", ["could not import 'x'", "gguf is not installed; not compared: y", "sm_86 has no fact"])
def test_lawful_skips(why):
    assert coverage.lawful(why)


def test_the_project_s_own_manifest_holds_every_operator_and_fault():
    from mxharness import paths
    from mxharness.faults import FAULTS
    from mxharness.ops import OPS

    committed = manifest.load(paths.root())
    assert {manifest.operator(check) for check in committed.checks} == {op.name for op in OPS}
    planted = {manifest.parameters(one) for one in committed.tests if "::test_fault_is_caught[" in one}
    assert planted == {fault.name for fault in FAULTS}
