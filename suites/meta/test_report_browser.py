"""The page in a real browser: Chromium, headless, where it and its driver (the package playwright) are installed."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mxharness import plot, report
from mxharness.op import GATES, Case, Outcome
from mxharness.record import RunRecord
from mxharness.report import checks, sensitivity

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
CASES = 20_000
LONGEST = 3000
"""Milliseconds to a page that can be used: one second, and what two busy processors make of it."""
WRONG = 137
PARTS = tuple(
    sensitivity.Part(name, "MXFP4 floor", 1000, sensitivity.Interval(*kl), sensitivity.Interval(0.1, 0.0, 0.2), 0.9, "")
    for name, kl in (("attention", (0.5, 0.4, 0.6)), ("head", (0.25, 0.2, 0.3)))
)


def section() -> sensitivity.Section:
    """With a plot, whose library takes long to import."""
    bars = plot.bars_svg("roles", [plot.Bar(one.name, one.kl.mean, one.kl.lower, one.kl.upper) for one in PARTS], "KL")
    groups = (sensitivity.Group("Roles", PARTS, bars),)
    return sensitivity.Section("tiny", "prose", "windows", "8 of 53", 2040, 9.5, groups, (), 0)


def outcome(number: int) -> Outcome:
    case = Case("gemm" if number % 2 else "apply_rope", (number % 130 + 1, 64), seed=number, options=("rope=half",))
    wrong = number == WRONG
    return Outcome(
        case=str(case),
        op=case.op,
        shape=case.shape,
        dtype=case.dtype,
        regime=case.regime,
        device="host",
        gate=GATES[number % 5],
        passed=not wrong,
        elements=number + 1,
        bad=int(wrong),
        nan=0,
        inf=0,
        ratio=float("nan") if wrong else number / CASES,
        max_ulp=0.75,
        nmse=1e-6,
        digest=f"{number:016x}",
        inputs="0" * 16,
        message="1 of 9 elements <b>past</b>; worst [0]: got 1; pattern: last K block; mxharness replay here"
        if wrong
        else "",
    )


@pytest.fixture(scope="module")
def outcomes() -> tuple[Outcome, ...]:
    return tuple(outcome(number) for number in range(CASES))


@pytest.fixture(scope="module")
def path(outcomes: tuple[Outcome, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 20,000 checks, one of them wrong."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: the page is not tried in a browser")
    record = RunRecord(
        device_class="host",
        arithmetic="tensor-core",
        started="2026-11-21T22:40:00Z",
        seconds=1.0,
        command="mxharness run",
        selected=CASES,
        executed=CASES,
        outcomes=outcomes,
        axes={"gemm": "M K", "apply_rope": "M K"},
        perplexity=({"name": "tiny", "perplexity": 9.5, "passed": True, "message": "fine"},),
    )
    page = tmp_path_factory.mktemp("browser") / "report.html"
    page.write_text(report.render(record, sensitivity=section()), encoding="utf-8")
    passing = replace(record, outcomes=tuple(one for one in outcomes if one.passed)[:50], selected=50, executed=50)
    page.with_name("pass.html").write_text(report.render(passing), encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def browser(path: Path) -> Iterator[Browser]:
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with driver.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser, path: Path) -> Iterator[Page]:
    """The report, opened anew; it may neither say anything on the console nor ask for anything."""
    context = browser.new_context()
    opened = context.new_page()
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
    opened.goto(path.as_uri())
    yield opened
    assert said == []
    context.close()


def test_20_000_checks_open_at_once_and_the_verdict_stands_first(page: Page, path: Path) -> None:
    ready = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    assert 0 < ready < LONGEST
    assert page.locator("h1").inner_text().startswith("FAIL: 19,999 of 20,000 checks right on host, 2 operators")
    assert page.locator("#checks-table tbody tr").count() == 50
    page.goto(path.with_name("pass.html").as_uri())
    assert page.locator("h1").inner_text().startswith("PASS: 50 of 50 checks right")


def test_the_failing_case_is_one_click_away_with_its_place_and_command(page: Page) -> None:
    start = page.locator(".start article")
    assert "last K block" in start.inner_text()
    assert "mxharness replay here" in start.inner_text()
    start.locator("a").click()
    shown = page.locator("article.failure:target")
    assert "1 of 9 elements <b>past</b>" in shown.inner_text()
    assert checks.repeat(outcome(WRONG)) in shown.inner_text()


def test_rows_are_filtered_by_words_lists_and_failure(page: Page) -> None:
    rows, count = page.locator("#checks-table tbody tr"), page.locator("#checks-table output")
    assert count.inner_text() == "20,000 of 20,000 checks"
    assert "FAIL" in rows.first.inner_text()
    page.get_by_label("1 failed only").check()
    assert count.inner_text() == "1 of 20,000 checks"
    page.get_by_label("1 failed only").uncheck()
    page.get_by_label("Filter").fill("gemm-12x64 s11-")
    assert count.inner_text() == "0 of 20,000 checks"
    page.get_by_label("Filter").fill("GEMM-12x64 -s11")
    assert rows.first.locator("th").inner_text() == outcome(11).case
    page.get_by_label("Filter").fill("")
    page.locator("#checks-table").get_by_label("gate").select_option(label="bound")
    assert count.inner_text() == "4,000 of 20,000 checks"
    page.locator("#checks-table").get_by_label("operator").select_option(label="gemm")
    assert count.inner_text() == "2,000 of 20,000 checks"


def test_a_column_is_sorted_by_mouse_and_by_keyboard(page: Page) -> None:
    head = page.locator("#checks-table thead th", has_text="error / bound")
    first = page.locator("#checks-table tbody tr").first
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert outcome(0).case in first.inner_text()
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert outcome(WRONG).case in first.inner_text(), "NaN is above every number"
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.locator("#checks-table thead th[aria-sort]").inner_text().startswith("elements")
    assert outcome(0).case in first.inner_text()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_a_link_to_a_case_opens_it_wherever_it_is(page: Page, path: Path) -> None:
    wanted = outcome(CASES - 1)
    page.get_by_label("Filter").fill("nothing of the kind")
    page.evaluate("(anchor) => { location.hash = anchor }", checks.anchor(wanted.case, wanted.gate))
    opened = page.locator("#checks-table tr.detail")
    opened.wait_for()
    assert opened.inner_text().removesuffix("Copy").strip() == checks.repeat(wanted), "as Python writes it"
    assert shlex.split(checks.repeat(wanted))[-1].count(" and ") == 1
    assert page.evaluate("document.activeElement.textContent") == wanted.case
    page.keyboard.press("Enter")
    assert opened.count() == 0
    page.goto("about:blank")
    page.goto(f"{path.as_uri()}#{checks.anchor(wanted.case, wanted.gate)}")
    assert opened.count() == 1


def test_the_parts_of_a_model_are_drawn_in_the_pages_colours_and_listed_below(page: Page) -> None:
    section = page.locator("#sensitivity")
    drawing = section.get_by_role("img", name="attention 0.5, 0.4 to 0.6; head 0.25, 0.2 to 0.3")
    bars = drawing.locator("path[style*='fill: var(--series-1)']")
    assert bars.count() == 2
    widths = [bar.bounding_box()["width"] for bar in bars.all()]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.02)
    fills = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        fills.append(bars.first.evaluate("bar => getComputedStyle(bar).fill"))
    assert fills == ["rgb(33, 102, 172)", "rgb(122, 180, 240)"]
    table = section.locator("table")
    assert not table.is_visible()
    section.locator("summary").focus()
    page.keyboard.press("Enter")
    assert table.is_visible()
    assert table.locator("tbody th").all_inner_texts() == ["attention", "head"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    contrasts = page.evaluate(
        """() => {
          const light = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
            .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
            .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
          const behind = (element) => {
            for (let one = element; one; one = one.parentElement) {
              const colour = getComputedStyle(one).backgroundColor;
              if (colour !== "rgba(0, 0, 0, 0)") return colour;
            }
          };
          const names = ["h1 strong", "h1", ".tiles small", ".tiles i", "a", ".about", "td.bad", "caption", "code"];
          return [...names, "button", "th button"].map((name) => {
            const element = document.querySelector(name);
            const pair = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => b - a);
            return [name, (pair[0] + 0.05) / (pair[1] + 0.05)];
          });
        }"""
    )
    assert {name: ratio for name, ratio in contrasts if ratio < 4.5} == {}, "WCAG 2.2, criterion 1.4.3"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (scheme == "dark")


def test_a_narrow_page_does_not_scroll_sideways_and_prints(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.emulate_media(media="print")
    assert not page.locator(".controls").first.is_visible()
    assert page.locator("#checks-table tbody tr").first.is_visible()


def test_without_scripts_the_failing_rows_are_there(browser: Browser, path: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(path.as_uri())
    rows = opened.locator("noscript tbody tr")
    assert rows.count() == 1
    assert outcome(WRONG).case in rows.inner_text()
    context.close()
