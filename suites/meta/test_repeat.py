"""The commands that repeat a row of a run: they name what ran, and work where they are typed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression
from mxharness import baseline, paths, record, repeat, report
from mxharness.cli import commands
from mxharness.faults.planted import FAULTS
from mxharness.fuzz import FuzzRow
from mxharness.record import Failure, OtherTests, Verdict, verdict

from .made import LEFT_OUT, PERPLEXITY, Page, run

TEST = "suites/test_fuzz.py::test_fuzz[apply_rope-@1of1@]"
SEED = ("--fuzz", "40", "--fuzz-seed", "7")


def parsed(command: str) -> None:
    """Parse the arguments of an mxharness command, as typing it would; raises what is wrong with them."""
    name, subcommand, *arguments = shlex.split(command)
    assert name == "mxharness"
    chosen = commands.commands[subcommand]
    chosen.parse_args(chosen.make_context(subcommand, list(arguments)), arguments)


def test_a_test_is_run_by_its_node_id_where_its_file_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(paths.root())
    assert repeat.of_test("host", TEST, SEED) == f"pytest --device host --fuzz 40 --fuzz-seed 7 '{TEST}'"
    monkeypatch.chdir(tmp_path)
    elsewhere = repeat.of_test("cuda", TEST, SEED)
    parsed(elsewhere)
    assert elsewhere.startswith("mxharness run --device cuda --no-perplexity --fuzz 40 --fuzz-seed 7 -k ")


@pytest.mark.parametrize(
    "name", ["test_fuzz[apply_rope-@1of1@]", "test_it[a=b, c]", "test_it[x y-é]", "test_it", "test_it[@none@]"]
)
def test_elsewhere_it_is_selected_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    command = shlex.split(repeat.of_test("host", f"suites/test_it.py::TestIt::{name}"))
    selects = Expression.compile(command[command.index("-k") + 1])

    def selected(test: str) -> bool:
        def holds(part: str, /, **_: str | int | bool | None) -> bool:
            return part in test

        return selects.evaluate(holds)

    assert selected(name)
    assert not selected("test_other[thing]")


def test_random_cases_are_drawn_from_the_same_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(paths.root())
    here = repeat.of_random("host", TEST, "apply_rope", 40, 7)
    assert here == "pytest --device host --op apply_rope --fuzz 40 --fuzz-seed 7 suites/test_fuzz.py::test_fuzz"
    monkeypatch.chdir(tmp_path)
    parsed(repeat.of_random("host", TEST, "apply_rope", 40, 7))


def test_faults_and_models_are_arguments_that_the_commands_take() -> None:
    for fault in FAULTS:
        parsed(repeat.of_fault("sm_90", fault.name))
    assert repeat.of_fault("sm_90", "swap").endswith("--device cuda")
    assert repeat.of_fault("host", "swap").endswith("--device host")
    parsed(repeat.of_perplexity("host", "a folder/model", 8))


@pytest.mark.parametrize(
    ("filters", "passed", "right"),
    [(("-k test_fuzz",), 1, True), ((), 1, False), (("-k test_fuzz",), 0, False)],
    ids=["asked for", "whole", "nothing ran"],
)
def test_a_run_of_other_tests_alone_passes_where_they_were_asked_for(
    filters: tuple[str, ...], passed: int, right: bool
) -> None:
    tests = OtherTests(passed=passed)
    nothing = run(filters=filters, tests=tests, outcomes=(), selected=0, executed=0, perplexity=(), skipped=(LEFT_OUT,))
    found: Verdict = verdict(nothing)
    assert found.passed == right, found.first_line
    assert ("no check executed" in found.first_line) != right


def test_the_record_keeps_every_command_and_the_report_shows_it(tmp_path: Path) -> None:
    whole = run(
        fuzz=(FuzzRow("gemm", planned=1, examples=1, command="again random"),),
        faults=({"name": "swap", "caught": True, "command": "again fault"},),
        perplexity=({**PERPLEXITY, "command": "again model"},),
        tests=OtherTests(failed=1, failures=(Failure("a.py::t", "no", "again test"),)),
    )
    record.save(whole, tmp_path / "run.json")
    assert record.load(tmp_path / "run.json") == whole
    assert baseline.perplexity_entries(whole) == baseline.perplexity_entries(run()), "a command is no experiment"
    lines = Page(report.render(whole)).lines
    assert {f"again {what}" for what in ("random", "fault", "model", "test")} <= set(lines)
