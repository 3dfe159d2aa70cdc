"""What the terminal shows at a run's end: a line an operator, what is wrong and what repeats it."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Literal, cast

import pytest
from mxharness.changes import Change
from mxharness.fuzz import FuzzRow
from mxharness.plugin.against import Against
from mxharness.plugin.session import _reason
from mxharness.plugin.summary import Look, rows, sections
from mxharness.record import Failure, OtherTests, RunRecord, Skip

from .made import outcome, run

WHAT = "gemm 3x33x64: 1 of 99 elements past the bound (K products summed in float32)"
MESSAGE = (
    f"{WHAT}; worst [0, 0]: got -8, should be -7, 51x the bound; paste into gemm.CASES: Case(); mxharness replay f/x"
)
WRONG = outcome(5, message=MESSAGE, ratio=51.0)
FAULTS = (
    {"name": "swap", "caught": True},
    {"name": "drop", "caught": False, "symptom": "gone", "command": "plant drop"},
)
TESTS = OtherTests(passed=1, failed=1, failures=(Failure("a.py::t", "\n\nAssertionError: no\nmore", "pytest a.py::t"),))
DRAWN = (FuzzRow("gemm", planned=9, examples=7, rejected=2), FuzzRow("dequant", planned=9, examples=9))


def moved(status: Literal["drifted", "failed", "new"], key: str, op: str = "gemm") -> Change:
    return Change(key, op, status, None, None, f"{status} it has; and more")


def shown(
    record: RunRecord,
    against: Against | None = None,
    *,
    width: int = 120,
    colour: bool = False,
    brief: bool = False,
) -> dict[str, str]:
    seconds = {"gemm": 12.34}
    found = dict(sections(record, against, seconds, Look(width, colour=colour, brief=brief)))
    return {title: text for title, text in found.items() if text}


def compared(*changes: Change, update: bool = False) -> Against:
    return Against(
        "host", "main", None, update, held=True, moved=changes, title="Moved from host/main", advice="bless it: so"
    )


def test_an_operator_is_a_line_with_its_worst_case() -> None:
    record = run(outcome(0), outcome(1, ratio=0.5), outcome(1, "exact"), outcome(2, op="dequant"), WRONG, fuzz=DRAWN)
    table = shown(record, compared(moved("drifted", "gemm-1 bound"), moved("new", "gemm-2 bound")))["what ran"]
    lines = [re.split(r"  +", line) for line in table.splitlines()[:3]]
    assert lines == [
        ["operator", "cases", "right", "wrong", "error/bound", "worst case", "random", "drift", "seconds"],
        ["dequant", "1", "1", "-", "0.312", "3x33x64-bf16-normal-s2", "9", "same", "0.0"],
        ["gemm", "3", "3", "1", "51", "3x33x64-bf16-normal-s5", "7 (2 rejected)", "1 drifted, 1 new", "12.3"],
    ]


def test_what_nobody_asked_for_has_no_column_and_no_line() -> None:
    text = shown(run(outcome(0, "exact")))
    assert list(text) == ["what ran"]
    assert text["what ran"].split() == ["operator", "cases", "right", "wrong", "seconds", "gemm", "1", "1", "-", "12.3"]
    assert shown(replace(run(), outcomes=())) == {}
    assert shown(run(), brief=True) == {}


def test_a_known_failure_is_counted_and_is_not_wrong() -> None:
    record = run(outcome(0), WRONG, known=({"check": f"{WRONG.case} bound"},))
    (row,) = rows(record, None, {})
    assert (row.right, row.wrong, row.known) == (1, 0, 1)
    assert "what is wrong" not in shown(record)


@pytest.mark.parametrize("brief", [False, True])
def test_each_thing_that_is_wrong_says_why_and_what_repeats_it(brief: bool) -> None:
    larger = outcome(6, message="gemm 9x9: all of it", elements=1000)
    record = run(larger, WRONG, outcome(0), tests=TESTS, faults=FAULTS)
    text = shown(record, width=200, brief=brief)["what is wrong"]
    assert text.splitlines() == [
        f"{WRONG.case} bound",
        "    1 of 99 elements past the bound (K products summed in float32); worst [0, 0]: got -8, should be -7, "
        "51x the bound",
        "    mxharness replay f/x",
        "a.py::t",
        "    AssertionError: no",
        "    pytest a.py::t",
        "planted fault drop",
        "    not caught: gone",
        "    plant drop",
        f"{larger.case} bound",
        "    all of it",
        "    mxharness run --device host --no-perplexity --op gemm -k '[gemm-3x33x64-bf16-normal-s6-bound]'",
    ]


def test_a_random_failure_has_its_saved_tensors_too() -> None:
    failure = Failure("a.py::test_fuzz[gemm]", f"AssertionError: {MESSAGE}\nFalsifying example: ...", "pytest a.py")
    text = shown(run(tests=OtherTests(failed=1, failures=(failure,))), width=200)["what is wrong"]
    assert text.splitlines() == [
        "a.py::test_fuzz[gemm]",
        f"    AssertionError: {WHAT}; worst [0, 0]: got -8, should be -7, 51x the bound",
        "    mxharness replay f/x",
        "    pytest a.py",
    ]


def test_of_many_failures_a_few_are_shown_and_all_are_counted() -> None:
    many = [outcome(seed, message=MESSAGE) for seed in range(25)]
    text = shown(run(*many))["what is wrong"]
    assert text.count("mxharness replay") == 10
    assert text.endswith("and 15 more\n")


def test_what_is_wrong_is_not_told_again_as_moved() -> None:
    against = compared(moved("failed", f"{WRONG.case} bound"), moved("drifted", "gemm-1 bound"))
    text = shown(run(outcome(0), WRONG), against)["Moved from host/main"]
    assert text.splitlines()[1:] == ["drifted  gemm-1 bound  drifted it has", "bless it: so"]
    assert "Moved from host/main" not in shown(run(WRONG), compared(moved("failed", f"{WRONG.case} bound")))
    many = compared(*(moved("drifted", f"gemm-{seed} bound") for seed in range(50)))
    assert "and 10 others" in shown(run(), many)["Moved from host/main"]
    assert "Moved from host/main" not in shown(run(), many, brief=True)
    blessing = replace(many, update=True)
    assert "bless it: so" in shown(run(), blessing, brief=True)["Moved from host/main"], "-q shows what is blessed, too"


def test_skips_that_nobody_asked_for_are_told() -> None:
    skips = (Skip("a.py::t", "no GPU", count=3), Skip("b.py::u", "no time"), Skip("perplexity", "left out", asked=True))
    text = shown(run(skipped=skips))["what ran"]
    assert "did not happen: no GPU (a.py::t, 3 cases)\ndid not happen: no time (b.py::u)\n" in text
    assert "left out" not in text


@pytest.mark.parametrize("width", [1, 8, 20, 40, 69, 70, 79, 100, 300])
@pytest.mark.parametrize("colour", [False, True])
def test_every_width_has_its_lines(width: int, colour: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")  # pytest decides about colour, nobody else
    against = compared(moved("drifted", "gemm-1 bound"), update=True)
    text = shown(run(outcome(0), WRONG, tests=TESTS, faults=FAULTS, fuzz=DRAWN), against, width=width, colour=colour)
    assert list(text) == ["what ran", "what is wrong", "Moved from host/main"]
    assert ("\x1b[" in "".join(text.values())) == colour
    assert "    mxharness replay f/x" in text["what is wrong"].splitlines(), "a command is never broken"
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text["what ran"].splitlines()]
    assert max(map(len, plain)) <= width
    if width >= 40:
        assert plain[0].split()[0] == "operator"
        assert [line.split()[0] for line in plain if line.startswith(("dequant", "gemm"))] == ["dequant", "gemm"]


def test_the_less_room_the_fewer_columns() -> None:
    record = run(outcome(0), outcome(1, op="lm_head_forward_temperature"), fuzz=DRAWN)
    heads = []
    for width in range(149, 44, -1):
        head = re.sub(" +", " ", shown(record, compared(), width=width)["what ran"].partition("\n")[0]).strip()
        heads += [head] if head not in heads else []
    assert heads == [
        "operator cases right wrong error/bound worst case random drift seconds",
        "operator cases right wrong error/bound worst case drift seconds",
        "operator right wrong error/bound worst case drift seconds",
        "operator right wrong error/bound drift seconds",
        "operator right wrong error/bound drift",
        "operator right wrong error/bound",
        "operator right wrong",
    ]


def test_brackets_in_names_and_messages_are_no_markup() -> None:
    hostile = outcome(0, message="gemm 1: [bold red]x[/] :smile: [/nothing]")
    assert "[bold red]x[/] :smile: [/nothing]" in shown(run(hostile))["what is wrong"]
    against = compared(moved("new", "a.py::t[b] [red]"))
    assert "a.py::t[b] [red]" in shown(run(), against)["Moved from host/main"]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("SystemError: no reason", "SystemError: no reason (inspect.py, line 7)"),
        ("AssertionError: no\nmore", "AssertionError: no\nmore"),
        ("assert 1 == 2", "assert 1 == 2"),
        ("Failed: as told", "Failed: as told"),
    ],
)
def test_what_is_no_failed_assertion_says_where_it_was_raised(message: str, said: str) -> None:
    crash = SimpleNamespace(message=message, path="/some/where/inspect.py", lineno=7)
    report = SimpleNamespace(longrepr=SimpleNamespace(reprcrash=crash))
    assert _reason(cast("pytest.TestReport", report)) == said
