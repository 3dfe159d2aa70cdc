"""The report's plots, the versions they are drawn over, and what it counts by operator and suite."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from mxharness import baseline, plot, report
from mxharness.coverage import Coverage
from mxharness.record import Failure, OtherTests
from mxharness.report import operators, trend

from .made import BAD, GOOD, Page, outcome, run


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


def test_a_changed_tolerance_hides_no_other_bits(tmp_path: Path) -> None:
    name = GOOD.outcomes[0].op
    first = replace(GOOD, started="2026-11-01T00:00:00Z", tolerances={name: {"why": "one rounding"}})
    baseline.create("v1", first, root=tmp_path)
    bits = tuple(replace(one, digest="f" * 16) if one.op == name else one for one in GOOD.outcomes)
    second = replace(first, started="2026-11-02T00:00:00Z", outcomes=bits, tolerances={name: {"why": "two roundings"}})
    baseline.create("v2", second, root=tmp_path)
    found = trend.of("host", tmp_path)
    assert found is not None
    assert {note.what for note in found.notes if note.quantity == "bits"} == {"other bits at v2"}


def test_a_line_is_not_drawn_over_a_break() -> None:
    values = {"v1": 1.0, "v2": 1.1, "v3": 0.9}
    whole, broken = (
        plot.lines_svg("t", list(values), [plot.Line("gemm", values, frozenset(breaks))]) for breaks in ((), ("v2",))
    )
    assert _strokes(whole) == [3]
    assert _strokes(broken) == [1, 2]
    assert re.findall(r"<text[^>]*>gemm</text>", whole)


def test_many_versions_and_long_titles_do_not_run_into_each_other() -> None:
    few, many = [f"v0.{i}.0" for i in range(4)], [f"v0.{i}.0" for i in range(5)]
    texts = [
        re.findall(
            r"<text[^>]*>(v[^<]*|perp[^<]*)</text>", plot.lines_svg("t", versions, [plot.Line(title, {"v0.1.0": 1})])
        )
        for versions, title in ((few, "perplexity: embedded"), (many, "perplexity: SmolLM2-135M-Instruct.Q4_1"))
    ]
    assert texts == [[*few, "perplexity: embedded"], ["v0.0.0", "v0.4.0", "perplexity: SmolLM2-135M-In…"]]


def _strokes(svg: str) -> list[int]:
    """Points of every data line."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--series-1\)[^>]*>', svg)
    return [len(re.findall("[ML]", path)) for path in paths if "C" not in path]


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
