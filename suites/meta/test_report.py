"""The report: one file, the verdict first, nothing fetched, nothing executed that a message carries."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark.expression import Expression
from mxharness import baseline, drift, environment, plot, report
from mxharness.coverage import Coverage
from mxharness.device import toolchain
from mxharness.fuzz import FuzzRow
from mxharness.op import Case, Gate, Outcome
from mxharness.record import Failure, OtherTests, RunRecord, Skip
from mxharness.report import checks, operators, trend

HOSTILE = "<script>alert(1)</script><img src=http://example.org/x onerror=alert(2)>\" ' & {{ 7 * 7 }}"


def outcome(seed: int, gate: Gate = "bound", *, op: str = "gemm", ratio: float = 0.3, message: str = "") -> Outcome:
    case = Case(op, (3, 33, 64), seed=seed)
    return Outcome(
        case=str(case),
        op=op,
        shape=case.shape,
        dtype=case.dtype,
        regime=case.regime,
        device="host",
        gate=gate,
        passed=not message,
        elements=99,
        bad=int(bool(message)),
        nan=int(math.isnan(ratio)),
        inf=0,
        ratio=ratio,
        max_ulp=0.75,
        nmse=1e-6,
        digest=f"{seed:016x}",
        inputs="0" * 16,
        message=message,
    )


def run(*outcomes: Outcome) -> RunRecord:
    return RunRecord(
        device_class="host",
        arithmetic="tensor-core",
        started="2026-11-21T22:40:00Z",
        seconds=100.0,
        command="mxharness run --device host",
        selected=len(outcomes),
        executed=len(outcomes),
        outcomes=outcomes,
        environment={"gpu": "absent", "kernels/gemm.cu": "0123456789abcdef"},
        axes={"gemm": "M N K"},
        skipped=(Skip("peer gguf", "package not installed"),),
        perplexity=(
            {
                "name": "tiny",
                "text": "64 kB of prose (not WikiText-2)",
                "protocol": "windows of 512",
                "perplexity": 59.753712,
                "text_sha256": "173c87a5",
                "passed": True,
                "message": "1.6e-3 relative, 5e-3 allowed",
            },
        ),
    )


GOOD = run(outcome(0), outcome(1), outcome(0, "exact", op="dequant", ratio=0.0))
BAD = run(
    outcome(0, message="51x the bound", ratio=51.0),
    outcome(1, message=HOSTILE, ratio=math.nan),
    outcome(2, "exact", op="dequant", ratio=math.inf, message="3 codes differ"),
    outcome(3),
)


class Page(HTMLParser):
    """What a browser would make of the page: its text, its tags, every address it would fetch."""

    VOID = frozenset({"meta", "link", "input", "br", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element begins."""
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element that has no content."""
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        """An element ends, and it is the one that began last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Text, kept where a reader sees it."""
        if not {"style", "script", "title"} & set(self.open):
            self.words.append(data)

    @property
    def lines(self) -> list[str]:
        """What a reader sees, in order."""
        return [word.strip() for word in self.words if word.strip()]


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
    assert "other bits (0000000000000000 -> ffffffffffffffff), ratio 0.3 -> 0.4" in text
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
        "64 kB of prose (not WikiText-2)",
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
    page = Page(report.render(replace(run(), perplexity=(), skipped=())))
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
    assert columns["error / bound"]["values"] == [51.0, "nan", "inf", 0.3]
    assert columns["verdict"]["words"] == ["FAIL", "pass"]
    assert [columns["operator"]["words"][at] for at in columns["operator"]["values"]] == [
        "gemm",
        "gemm",
        "dequant",
        "gemm",
    ]
    assert found["details"]["2"] == [["3 codes differ"], [checks.repeat(BAD.outcomes[2])]]
    assert found["anchors"][0] == "gemm-3x33x64-bf16-normal-s0:bound"


def test_suites_are_counted_by_file() -> None:
    ids = (
        "suites/test_a.py::test_x",
        "suites/test_a.py::test_y",
        f"suites/test_accuracy.py::t[{BAD.outcomes[0].case}-bound]",
    )
    record = replace(
        BAD,
        coverage=Coverage("0", 3, selected=ids, missing=ids[:1]),
        tests=OtherTests(0, 1, 0, (Failure(ids[1], "no"),)),
    )
    assert operators.suites(record) == [
        operators.Suite("test_a.py", 2, 1, 1),
        operators.Suite("test_accuracy.py", 1, 1, 1),
    ]


def test_sensitivity_is_a_section_only_where_it_was_measured() -> None:
    loss = {"group": "roles", "format": "MXFP4", "same_word": 0.9}
    measured = [
        {**loss, "name": name, "kl": {"mean": mean, "lower": -1.0, "upper": 2 * mean}}
        for name, mean in (("cheap", 0.01), ("dear", 0.5))
    ]
    found = {"model": "m", "text": "t", "windows": 2, "losses": [*measured, {**loss, "name": "unread", "kl": None}]}
    lines = Page(report.render(GOOD, sensitivity=found)).lines
    part = lines[lines.index("Sensitivity of roles and layers") :]
    assert part.index("dear") < part.index("cheap")
    assert part[part.index("dear") + 2 :][:4] == ["0.5", "0", "1", "90.0 %"]
    assert "unread" not in part
    assert "Sensitivity" not in Page(report.render(GOOD)).lines


def test_the_baselines_of_a_device_class_are_drawn_over_versions(tmp_path: Path) -> None:
    first = replace(GOOD, started="2026-11-01T00:00:00Z")
    baseline.create("v1", first, root=tmp_path)
    assert trend.of("host", tmp_path) is None, "one version shows no movement"
    moved = (replace(GOOD.outcomes[0], digest="f" * 16, ratio=0.9), *GOOD.outcomes[1:])
    baseline.create("v2", replace(first, started="2026-11-02T00:00:00Z", outcomes=moved), root=tmp_path)
    baseline.create("v3", replace(first, started="2026-11-03T00:00:00Z", outcomes=moved), root=tmp_path)
    found = trend.of("host", tmp_path)
    assert found is not None
    assert [name for name, _, _ in found.versions] == ["v1", "v2", "v3"]
    assert {(note.key, note.quantity) for note in found.notes} >= {
        (f"{GOOD.outcomes[0].case} bound", "bits"),
        (f"{GOOD.outcomes[0].case} bound", "ratio"),
    }
    assert next(note.what for note in found.notes if note.quantity == "bits") == "other bits at v2"
    assert "3 panels over v1, v2, v3" in found.drawing
    lines = Page(report.render(GOOD, history=found)).lines
    assert "other bits at v2" in lines
    assert "Over versions" in lines
    assert trend.of("sm_90", tmp_path) is None


def test_a_line_is_not_drawn_over_a_break() -> None:
    values = {"v1": 1.0, "v2": 1.1, "v3": 0.9}
    whole, broken = (
        plot.lines_svg("t", list(values), [plot.Line("gemm", values, frozenset(breaks))]) for breaks in ((), ("v2",))
    )
    assert _strokes(whole) == [3]
    assert _strokes(broken) == [1, 2]
    assert re.findall(r"<text[^>]*>gemm</text>", whole)


def _strokes(svg: str) -> list[int]:
    """Points of every data line."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--series-1\)[^>]*>', svg)
    return [len(re.findall("[ML]", path)) for path in paths if "C" not in path]


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


# The plot


def _markers(svg: str, variable: str) -> list[tuple[float, float]]:
    """(x, y) of every marker of one colour, top left is (0, 0)."""
    found = re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: var\((--[\w-]+)\)', svg)
    return [(float(x), float(y)) for x, y, colour in found if colour == variable]


def test_the_plot_places_every_case_and_draws_what_is_not_finite_on_the_edge() -> None:
    points = [
        plot.Point(64, 0.5, "bf16", passed=True),
        plot.Point(2880, 0.05, "bf16", passed=True),
        plot.Point(64, 0.0, "fp16", passed=True),
        plot.Point(64, math.inf, "bf16", passed=False),
        plot.Point(2880, math.nan, "bf16", passed=False),
    ]
    svg = plot.ratio_svg("gemm", points, "K")
    (x1, half), (x2, small) = _markers(svg, "--series-1")
    assert x1 < x2
    assert half < small, "a larger ratio is drawn higher"
    ((_, lowest),) = _markers(svg, "--series-2")
    (left, top), (right, also_top) = _markers(svg, "--fail")
    assert top == also_top < half < small < lowest
    assert (left, right) == (x1, x2)
    assert "5 cases over K, 2 failed" in svg


def test_the_plot_takes_its_colours_from_the_page_and_nothing_from_elsewhere() -> None:
    svg = plot.ratio_svg("gemm", [plot.Point(64, 0.5, "fp32", passed=True)], "K")
    assert svg.startswith("<svg ")
    assert "http" not in svg
    assert not re.search(r"#[0-9a-f]{6}\b(?!\w)", re.sub(r'xlink:href="#\w+"|url\(#\w+\)', "", svg))
    assert svg == plot.ratio_svg("gemm", [plot.Point(64, 0.5, "fp32", passed=True)], "K")


def test_operators_stand_by_kernel_file_in_their_own_order_however_they_ended() -> None:
    names = ("quantize", "gemm", "gemm_bias")
    outcomes = [replace(outcome(0, op=name), ties=3 if name == "gemm" else 0) for name in reversed(names)]
    sources = {"quantize": "quantize.cu", "gemm": "gemm.cu", "gemm_bias": "gemm.cu"}
    page = Page(report.render(replace(run(*outcomes), sources=sources)))
    lines = page.lines[page.lines.index("By operator", 20) :]
    assert [line for line in lines if line in (*names, "quantize.cu", "gemm.cu")][:10] == [
        *("quantize.cu", "quantize", "gemm.cu", "gemm", "gemm_bias"),  # the table
        *("quantize.cu", "quantize", "gemm.cu", "gemm", "gemm_bias"),  # the plots
    ]
    assert lines[lines.index("gemm") :][:9].count("3") == 1


def test_the_contraction_length_is_the_axis_where_the_operator_has_one() -> None:
    assert "K, contraction length" in report.render(GOOD)
    assert "K, contraction length" not in report.render(replace(GOOD, axes={}))


# The environment


def test_the_environment_names_what_is_absent_and_hashes_every_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "host").mkdir()
    (tmp_path / "gemm.cu").write_text("one")
    (tmp_path / "host" / "runtime.cpp").write_text("two")
    (tmp_path / "notes.txt").write_text("three")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain, "TOOLKIT", tmp_path)
    toolchain.compiler.cache_clear()
    facts = environment.describe(sources=tmp_path, flags=("-O2", "-I/somewhere"))
    assert [facts[name] for name in ("device", "gpu", "driver", "nvcc", "c++", "commit")] == ["absent"] * 6
    assert facts["compile flags"] == "-O2"
    hashed = {name: value for name, value in facts.items() if name.startswith("kernels/")}
    assert hashed == {"kernels/gemm.cu": "7692c3ad3540bb80", "kernels/host/runtime.cpp": "3fc4ccfe745870e2"}


def test_the_commit_says_when_the_tree_differs_from_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(("git", "-C", str(tmp_path), *identity, *arguments), check=True, capture_output=True)  # noqa: S607

    assert environment.commit(None) == "absent"
    git("init", "-q")
    assert environment.commit(tmp_path) == "absent"
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "first")
    clean = environment.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "a").write_text("2")
    assert environment.commit(tmp_path) == f"{clean}+dirty"
