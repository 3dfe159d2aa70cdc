"""The report: one file, the verdict first, nothing fetched, nothing executed that a message carries."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
from mxharness import baseline, drift, report
from mxharness.coverage import Coverage
from mxharness.fuzz import FuzzRow
from mxharness.record import Failure, OtherTests, RunRecord, Skip

from .made import BAD, GOOD, HOSTILE, Page, outcome, run


@pytest.mark.parametrize(("record", "word"), [(GOOD, "PASS:"), (BAD, "FAIL:")])
def test_the_first_words_are_the_verdict_with_its_coverage(record: RunRecord, word: str) -> None:
    page = Page(report.render(record))
    assert page.lines[0] == word
    good = sum(one.passed for one in record.outcomes)
    ops = len({one.op for one in record.outcomes})
    assert page.lines[1] == (
        f"{good} of {len(record.outcomes)} checks right on host, {ops} operators; compared with no baseline"
    )
    assert page.open == []


def test_wrong_results_stand_before_what_did_not_run() -> None:
    page = Page(report.render(replace(BAD, coverage=Coverage("0", 7, selected=("a", "b"), missing=("b",)))))
    assert page.lines[2:4] == [
        "3 checks failed: dequant 1, gemm 2",
        "1 of 2 selected tests did not run, as b",
    ]


def test_a_moved_baseline_turns_the_report_to_fail(tmp_path: Path) -> None:
    baseline.create("main", GOOD, root=tmp_path)
    moved = replace(
        GOOD,
        outcomes=(replace(GOOD.outcomes[0], digest="f" * 16, ratio=0.4), *GOOD.outcomes[1:]),
        started="2026-11-24T22:40:00Z",
    )
    page = Page(report.render(moved, drift.compare("main", moved, root=tmp_path)))
    assert page.lines[0] == "FAIL:"
    assert page.lines[1].startswith(
        "3 of 3 checks right on host, 2 operators; baseline host/main, 3 days old: 1 drifted"
    )
    assert page.lines[2] == "moved from baseline host/main: 1 drifted, 3 same"
    text = " ".join(page.lines)
    assert "host/main, blessed 2026-11-21T22:40:00Z, 3 days old" in text
    same_day = Page(report.render(GOOD, drift.compare("main", GOOD, root=tmp_path)))
    assert "; baseline host/main, less than a day old: " in same_day.lines[1]
    assert "other bits (0000000000000000 -> ffffffffffffffff), ratio 0.3123 -> 0.4" in text
    assert "mxharness baseline create main --replace" in text
    assert Page(report.render(GOOD, drift.compare("main", GOOD, root=tmp_path))).lines[0] == "PASS:"


def test_nothing_is_fetched_and_no_message_becomes_markup() -> None:
    failing = replace(
        BAD,
        command=HOSTILE,
        environment={HOSTILE: HOSTILE},
        skipped=(Skip(HOSTILE, HOSTILE),),
        perplexity=({"name": HOSTILE, "perplexity": 1.0, "passed": True, "message": HOSTILE, HOSTILE: HOSTILE},),
        faults=({"name": HOSTILE, "caught": True, "detector": HOSTILE},),
        tests=OtherTests(0, 1, 0, (Failure(HOSTILE, HOSTILE),)),
        outcomes=(*BAD.outcomes, replace(outcome(4, op=HOSTILE), case=HOSTILE, dtype=HOSTILE)),
    )
    text = report.render(failing)
    page = Page(text)
    assert page.tags.count("script") == 2, "the script, and the table's data"
    assert text.count("</script>") == 2
    assert "img" not in page.tags
    assert "iframe" not in page.tags
    addresses = [value for _, name, value in page.attributes if name in {"src", "href", "xlink:href", "action", "data"}]
    assert addresses
    assert all(address.startswith("#") or address == "data:," for address in addresses)
    assert not re.search(r"@import|url\((?!#)", text)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert not [
        value
        for _, name, value in page.attributes
        if "example.org" in value and name not in {"href", "id", "aria-label"}
    ]
    assert "{{ 7 * 7 }}" in " ".join(page.words)
    assert HOSTILE in page.words


def test_everything_a_reader_needs_is_there() -> None:
    text = " ".join(Page(report.render(replace(BAD, faults=({"name": "swap", "caught": False},)))).lines)
    for part in (
        "51x the bound",
        "3 codes differ",
        "peer gguf",
        "package not installed",
        "prose (not WikiText-2)",
        "59.7537",
        "5e-3 allowed",
        "173c87a5",
        "swap",
        "Not caught: 1 of 1",
        "kernels/gemm.cu",
        "mxharness run --device host",
        "nan",
        "inf",
    ):
        assert part in text
    lines = Page(report.render(BAD)).lines
    failures = lines[lines.index("What failed", 30) : lines.index("Every check", lines.index("What failed", 30))]
    said = [line for line in failures if line in {one.message for one in BAD.outcomes if one.message}]
    assert said == [HOSTILE, "3 codes differ", "51x the bound"], "NaN first, then by how far past the gate"


def test_a_run_without_anything_still_makes_a_page() -> None:
    page = Page(report.render(run(outcomes=(), selected=0, executed=0, perplexity=())))
    assert page.lines[0] == "FAIL:"
    assert page.lines[2].startswith("no check executed")
    assert "Nothing was skipped." in page.lines


def test_random_cases_the_manifest_the_faults_time_and_known_failures_are_shown() -> None:
    record = replace(
        GOOD,
        fuzz=(FuzzRow("dequant", 40, 40, 40, 40, 0), FuzzRow("gemm", 1000, 999, 2500, 700, 1, 0.75, seed=5)),
        coverage=Coverage("0123456789abcdef", 7, selected=("a", "b", "c"), missing=("c",)),
        faults=({"name": "swap", "caught": True, "seconds": 1.5}, {"name": "nibble", "caught": True, "seconds": 2.5}),
        known=({"check": "gemm-x bound", "reason": HOSTILE, "expires": "2027-01-01", "where": "example.org/7"},),
    )
    page = Page(report.render(record))
    for line in (
        "1,039 random cases right, smallest margin 0.25 of the bound (gemm)",
        "7 tests demanded (0123456789abcdef): nothing vanished, nothing is new; 3 selected, 2 of them ran",
        "Caught: 2 of 2, in 4 s of one processor",
        "1 failed as the ledger says",
        HOSTILE,
    ):
        assert line in page.lines
    assert page.lines[0] == "FAIL:"
    assert page.lines[2] == "1 of 3 selected tests did not run, as c"
    gemm = page.lines.index("gemm", page.lines.index("of them on bits"))
    assert page.lines[gemm : gemm + 8] == ["gemm", "999", "1,000", "1", "2,500", "700", "0.25", "5"]
    assert {"#random", "#known"} <= {value for tag, name, value in page.attributes if name == "href"}


def test_every_table_has_a_caption_every_column_a_scope_and_every_id_is_its_own() -> None:
    page = Page(report.render(run(*BAD.outcomes, outcome(5, op="attention"))))
    assert page.tags.count("table") == page.tags.count("caption") >= 3
    scopes = [value for tag, name, value in page.attributes if tag == "th" and name == "scope"]
    assert len(scopes) == page.tags.count("th")
    headings = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(headings))
    anchors = {value[1:] for _, name, value in page.attributes if name == "href" and re.match("#[a-z]", value)}
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert anchors <= set(ids)
    assert len(ids) == len(set(ids))


def test_all_files_are_written_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    report.write(GOOD, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "junit.xml",
        "report.html",
        "run.csv",
        "summary.md",
    ]
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
