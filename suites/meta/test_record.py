"""The run record: what survives the file, and what a verdict is made of."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from mxharness import record
from mxharness.errors import UserError
from mxharness.record import OtherTests, Skip

from .made import LEFT_OUT, PERPLEXITY, crash_after, outcome, run


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


def test_a_crash_while_writing_a_file_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    record.save(run(), path)
    before = path.read_text()
    monkeypatch.setattr(Path, "replace", crash_after(0, Path.replace))
    with pytest.raises(KeyboardInterrupt):
        record.save(run(seconds=9.0), path)
    monkeypatch.undo()
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


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
        (
            {"outcomes": (outcome(message="51x the bound", ratio=51.0), outcome(1), outcome(2))},
            "1 check failed: gemm 1",
        ),
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
