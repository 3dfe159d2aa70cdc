"""A check in the report: its message in parts, the command that repeats it, its row, where to start."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from typing import Any

from _pytest.mark.expression import Expression
from mxharness import report
from mxharness.report import checks

from .made import BAD, Page, outcome, run


def test_a_message_is_taken_apart_and_nothing_of_it_is_lost() -> None:
    text = (
        "gemm 1x2: 3 of 9 elements of y past the bound (stages; each rounded once); worst [0, 1]: got 1, should be 2; "
        "pattern: last K block; paste into gemm.CASES: Case(\"gemm\", (1, 2)); mxharness replay 'a b'/x"
    )
    assert checks.message(text) == checks.Message(
        what="gemm 1x2: 3 of 9 elements of y past the bound (stages; each rounded once)",
        worst="[0, 1]: got 1, should be 2",
        pattern="last K block",
        rest=('paste into gemm.CASES: Case("gemm", (1, 2))',),
        replay="mxharness replay 'a b'/x",
    )
    lines = Page(report.render(run(outcome(0, message=text)))).lines
    assert lines[lines.index("Judge again") + 1] == "mxharness replay 'a b'/x"
    assert checks.message("").what == "no message"


def test_the_command_of_a_check_selects_it_and_no_other() -> None:
    one = replace(outcome(0), case="apply_rope-3x4-bf16-rope=half-s0", op="apply_rope")
    command = checks.repeat(one)
    assert command == (
        "mxharness run --device host --no-perplexity --op apply_rope -k '[apply_rope-3x4-bf16-rope and half-s0-bound]'"
    )
    chosen = Expression.compile(shlex.split(command)[-1])
    ids = [f"test_accuracy[apply_rope-3x4-bf16-rope=half-s{tail}]" for tail in ("0-bound", "0-predicted", "10-bound")]
    assert [chosen.evaluate(lambda word, id_=id_: word in id_) for id_ in ids] == [True, False, False]
    assert "--device cuda " in checks.repeat(replace(one, device="sm_90"))


def data(text: str) -> dict[str, Any]:
    """The first long table of a page."""
    found = re.search(r'<script type="application/json" data-table="[\w-]+">(.*?)</script>', text, re.DOTALL)
    assert found
    table: dict[str, Any] = json.loads(found[1])
    return table


def test_the_table_of_every_check_holds_all_numbers_as_data() -> None:
    found = data(report.render(BAD))
    columns = {column["title"]: column for column in found["columns"]}
    assert {len(column["values"]) for column in columns.values()} == {len(BAD.outcomes)}
    assert columns["error / bound"]["values"] == [51.0, "nan", "inf", 0.3123]
    assert columns["verdict"]["words"] == ["FAIL", "pass"]
    assert [columns["operator"]["words"][at] for at in columns["operator"]["values"]] == [
        "gemm",
        "gemm",
        "dequant",
        "gemm",
    ]
    assert found["details"]["2"] == [["3 codes differ"], [checks.repeat(BAD.outcomes[2])]]
    assert found["anchors"][0] == "gemm-3x33x64-bf16-normal-s0:bound"


def test_failures_past_the_limit_are_counted_and_all_are_in_the_table() -> None:
    many = run(*(outcome(seed, message="wrong", ratio=2.0) for seed in range(53)), outcome(60))
    text = report.render(many)
    assert text.count('<article class="failure"') == 50
    assert "3 more failed" in text
    found = data(text)
    assert found["bad"] == list(range(53)), "the failed ones stand first"
    assert len(found["anchors"]) == 54
    without_script = text[text.index("<noscript>") :]
    assert without_script.count("<td>FAIL</td>") == 53


def test_the_smallest_of_each_operator_stands_above_everything_else() -> None:
    small = replace(outcome(9, message="small", ratio=2.0), elements=3)
    many = [outcome(seed, message="wrong", ratio=9.0) for seed in range(6)]
    lines = Page(report.render(run(*many, small, outcome(8, op="attention", message="other", ratio=2.0)))).lines
    start = lines[lines.index("Start here") : lines.index("What failed")]
    assert [line for line in start if line.startswith("smallest of ")] == [
        "smallest of gemm, gate bound",
        "smallest of attention, gate bound",
    ]
    assert small.case in start
    assert "small" in start
