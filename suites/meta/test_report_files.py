"""What lies beside the page: JUnit XML, CSV, Markdown, the schema of the record; and two runs side by side."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from mxharness import drift, record, report
from mxharness.cli import main
from mxharness.coverage import Coverage
from mxharness.document import json_ready
from mxharness.fuzz import FuzzRow
from mxharness.op import Outcome
from mxharness.record import Failure, OtherTests, RunRecord, Skip
from mxharness.report import formats, pair

from .made import outcome, run

SCHEMA = Path(record.__file__).parent / "data" / "run.schema.json"


UGLY = 'a | b `c` <img src=x> \x00 "quoted", and a\nline; pattern: last | block'
BAD = replace(
    run(outcome(0), outcome(1, message=UGLY, ratio=math.nan), outcome(2, op="dequant")),
    tests=OtherTests(7, 1, 0, (Failure("suites/test_a.py::test_b", "assert\x0b ```1```"),)),
    skipped=(Skip("peer gguf", "not installed"),),
    faults=({"name": "swap", "caught": False}, {"name": "nibble", "caught": True}),
    fuzz=(FuzzRow("gemm", 2, 2, 2, 0, 0, math.inf),),
    coverage=Coverage("0", 3, selected=("a", "b")),
    known=({"check": "x", "reason": "y", "expires": "2027-01-01", "where": "z"},),
)


def test_junit_counts_what_it_holds_and_every_failure_is_one() -> None:
    root = ElementTree.fromstring(formats.junit(BAD).encode())  # noqa: S314  our own text
    cases = root.findall(".//testcase")
    failed = [case.get("name") for case in cases if case.find("failure") is not None]
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    assert failed == ["verdict", f"{BAD.outcomes[1].case} bound", "suites/test_a.py::test_b", "swap"]
    assert skipped == ["peer gguf"]
    assert [root.get(name) for name in ("tests", "failures", "skipped")] == [str(len(cases)), "4", "1"]
    for suite in root:
        assert int(suite.get("tests", "")) == len(suite.findall("testcase"))
        assert int(suite.get("failures", "")) == len(suite.findall(".//failure"))
    text = root.find(".//testsuite[@name='gemm']//failure")
    assert text is not None
    assert text.text == UGLY.replace("\x00", "\ufffd")
    assert not ElementTree.fromstring(formats.junit(run(outcome(0))).encode()).findall(".//failure")  # noqa: S314


def test_junit_names_what_moved_from_the_baseline() -> None:
    change = drift.Change("gemm-x bound", "gemm", "drifted", None, None, "other bits")
    comparison = drift.Comparison(
        "host/main", "host", "2026", (change, replace(change, status="same")), (), (), "bless"
    )
    root = ElementTree.fromstring(formats.junit(run(outcome(0)), comparison).encode())  # noqa: S314  our own text
    (failure,) = root.findall(".//testsuite[@name='baseline host/main']/testcase/failure")
    assert failure.text == "drifted: other bits"


def test_csv_has_a_row_a_check_that_reads_back() -> None:
    rows = list(csv.DictReader(formats.csv_text(BAD).splitlines(keepends=True)))
    assert [row["verdict"] for row in rows] == ["pass", "fail", "pass"]
    assert rows[1]["message"] == UGLY
    assert rows[1]["ratio"] == "nan"
    assert rows[0]["shape"] == "3x33x64"
    assert rows[2]["command"].endswith("--op dequant -k '[dequant-3x33x64-bf16-normal-s0-bound]'".replace("s0", "s2"))


def test_the_summary_begins_with_the_verdict_and_nothing_in_it_becomes_markup() -> None:
    text = formats.markdown(BAD)
    assert text.startswith("## ❌ FAIL: 2 of 3 checks right on host, 2 operators; compared with no baseline\n")
    assert "- 1 check failed: gemm 1" in text
    assert r"\<img src=x\>" in text
    assert "where: last \\| block" in text
    assert "````\nassert\x0b ```1```\n````" in text
    assert "| gemm | 1 | 2 |" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in {4, 5}
    assert formats.markdown(run(outcome(0))).startswith("## ✅ PASS: 1 of 1 checks right")


def test_the_summary_is_appended_to_the_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "job.md"
    job.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(job))
    report.write(run(outcome(0)), tmp_path / "out")
    assert job.read_text() == "before\n" + (tmp_path / "out" / "summary.md").read_text()


# The schema of run.json


def test_the_schema_takes_what_is_written_and_refuses_what_is_not() -> None:
    schema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    document = json.loads(SCHEMA.read_text(encoding="utf-8"))
    validator = schema.Draft202012Validator(document)
    validator.check_schema(document)
    good = json.loads(json.dumps({"api_version": 1, **json_ready(asdict(BAD))}))  # type: ignore[dict-item]  # a mapping
    validator.validate(good)
    for wrong in (
        {**good, "other": 1},
        {**good, "selected": -1},
        {**good, "started": "yesterday"},
        {**good, "outcomes": [{**good["outcomes"][0], "gate": "allclose"}]},
        {**good, "outcomes": [{**good["outcomes"][0], "ratio": "large"}]},
        {name: value for name, value in good.items() if name != "outcomes"},
    ):
        assert not validator.is_valid(wrong)


def test_the_schema_names_every_field() -> None:
    document = json.loads(SCHEMA.read_text(encoding="utf-8"))["properties"]
    assert set(document) == {"api_version", *(field.name for field in fields(RunRecord))}
    assert set(document["outcomes"]["items"]["properties"]) == {field.name for field in fields(Outcome)}
    assert set(document["coverage"]["anyOf"][1]["properties"]) == {field.name for field in fields(Coverage)}
    assert set(document["fuzz"]["items"]["properties"]) == {field.name for field in fields(FuzzRow)}
    assert set(document["tests"]["properties"]) == {field.name for field in fields(OtherTests)}


# Two runs


FIRST = run(
    outcome(0),
    outcome(1, message="wrong", ratio=4.0),
    outcome(2),
    outcome(3, message="wrong", ratio=4.0),
    outcome(4),
    outcome(5, ratio=0.1),
    outcome(6),
    outcome(7, op="dequant"),
)
SECOND = replace(
    run(
        outcome(0, message="broken now; pattern: last K block", ratio=9.0),
        outcome(1),
        outcome(3, message="wrong", ratio=4.0),
        outcome(4, digest="f" * 16, ratio=0.31),
        outcome(5, digest="f" * 16, ratio=0.9),
        outcome(6, ratio=0.4),
        outcome(7, op="dequant"),
        outcome(8),
    ),
    environment={"kernels/gemm.cu": "2"},
)


def test_two_runs_are_told_apart_check_by_check_the_gravest_and_largest_first() -> None:
    found = pair.compare(FIRST, SECOND, ("A", "B"))
    assert [(change.status, change.case[-1]) for change in found.changes] == [
        ("broken", "0"),
        ("still wrong", "3"),
        ("vanished", "2"),
        ("new", "8"),
        ("fixed", "1"),
        ("other bits", "5"),
        ("other bits", "4"),
        ("judged otherwise", "6"),
        ("same", "7"),
    ]
    assert found.worse
    assert "1 kernel file changed: gemm.cu" in found.notes
    gemm, dequant = found.rows
    assert (gemm.op, gemm.counts, gemm.ratios) == ("gemm", ((5, 7), (5, 7)), (4.0, 9.0))
    assert dequant.statuses == ()
    same = pair.compare(FIRST, FIRST, ("A", "B"))
    assert dict(same.counts) == {"same": 6, "still wrong": 2}


def test_other_inputs_prove_nothing_about_bits_and_are_said_first() -> None:
    other = run(replace(outcome(0, digest="f" * 16), inputs="1" * 16))
    found = pair.compare(run(outcome(0)), other, ("A", "B"))
    assert [change.status for change in found.changes] == ["other inputs"]
    assert not found.worse
    narrow = replace(other, device_class="sm_90", filters=("--op gemm",))
    notes = " ".join(pair.compare(run(outcome(0)), narrow, ("A", "B")).notes)
    assert "two device classes: host in A, sm_90 in B" in notes
    assert "B was limited by --op gemm: what it left out" in notes
    assert pair.compare(narrow, narrow, ("A", "B")).notes[0] == "both were limited by --op gemm"


def test_the_command_sets_two_records_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, one in (("old", FIRST), ("new", SECOND)):
        record.save(one, tmp_path / name / "run.json")
    paths = [str(tmp_path / name / "run.json") for name in ("old", "new")]
    with pytest.raises(SystemExit) as ended:
        main(["report", *paths, "--out", str(tmp_path / "two")])
    assert ended.value.code == 1
    assert capsys.readouterr().out.startswith("from old to new: 1 broken, 1 still wrong, 1 vanished, 1 new, 1 fixed")
    text = (tmp_path / "two" / "report.html").read_text(encoding="utf-8")
    assert "<h1><strong>WORSE:</strong> from old to new: 1 broken" in text
    assert "broken now" in text
    assert (tmp_path / "two" / "summary.md").read_text(encoding="utf-8").startswith("## from old to new: 1 broken")
    with pytest.raises(SystemExit) as ended:
        main(["report", paths[0], paths[0], "--out", str(tmp_path / "two")])
    assert ended.value.code == 1, "what is still wrong is no pass"
    with pytest.raises(SystemExit) as ended:
        main(["report", *paths, "--baseline", "main"])
    assert ended.value.code == 2
