"""A run as JUnit XML, CSV and Markdown, for the machines and pages around a CI job."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from xml.etree import ElementTree

from mxharness.drift import PASSING, Comparison
from mxharness.op import Outcome
from mxharness.record import RunRecord, is_right, perplexity_holds, verdict
from mxharness.report import checks, head, operators
from mxharness.report.pair import Pair

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MOST_FAILURES = 10
_MOST_PAIRS = 30
_COLUMNS = ("verdict", "case", "op", "shape", "dtype", "regime", "device", "gate", "elements", "bad", "nan", "inf")
_NUMBERS = ("ratio", "max_ulp", "nmse", "cosine", "ties", "digest", "inputs", "message")


def junit(record: RunRecord, comparison: Comparison | None = None) -> str:
    """JUnit XML: a suite an operator, then the verdict, the other tests that failed or were skipped, the model, faults.

    Of the other tests that passed only the number is known; it is a property. What is wrong is a failure there as here.
    """
    root = ElementTree.Element("testsuites", name="mxharness", time=f"{record.seconds:.3f}")
    by_op: dict[str, list[Outcome]] = {}
    for outcome in record.outcomes:
        by_op.setdefault(outcome.op, []).append(outcome)
    result = verdict(record)
    _suite(root, "verdict", [(result.first_line if result.passed else "verdict", "\n".join(result.reasons), "")])
    for op, outcomes in by_op.items():
        cases = [
            (f"{one.case} {one.gate}", "" if is_right(one) else one.message or "no message", "") for one in outcomes
        ]
        _suite(root, op, cases)
    tests = [(failure.id, failure.message or "no message", "") for failure in record.tests.failures]
    tests += [(skip.what, "", skip.why) for skip in record.skipped]
    _suite(root, "other tests", tests, {"passed": str(record.tests.passed)})
    _suite(
        root,
        "perplexity",
        [
            (str(row.get("name", "?")), "" if perplexity_holds(row) else str(row.get("message") or "no message"), "")
            for row in record.perplexity
        ],
    )
    faults = [
        (str(row.get("name", "?")), "" if row.get("caught") else str(row.get("message") or "not caught"), "")
        for row in record.faults or ()
    ]
    _suite(root, "planted faults", faults)
    if comparison is not None:
        moved = [change for change in comparison.changes if change.status not in PASSING]
        _suite(
            root, f"baseline {comparison.baseline}", [(one.key, f"{one.status}: {one.message}", "") for one in moved]
        )
    for count in ("tests", "failures", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _suite(
    root: ElementTree.Element, name: str, cases: list[tuple[str, str, str]], properties: dict[str, str] | None = None
) -> None:
    """A suite of (name, failure or "", reason for a skip or ""); none where there are no cases."""
    if not cases and not properties:
        return
    failed, skipped = (sum(bool(case[place]) for case in cases) for place in (1, 2))
    counts = {"tests": str(len(cases)), "failures": str(failed), "errors": "0", "skipped": str(skipped)}
    suite = ElementTree.SubElement(root, "testsuite", {"name": _clean(name), **counts})
    if properties:
        held = ElementTree.SubElement(suite, "properties")
        for key, value in properties.items():
            ElementTree.SubElement(held, "property", {"name": key, "value": value})
    for title, failure, skip in cases:
        case = ElementTree.SubElement(suite, "testcase", {"classname": _clean(name), "name": _clean(title)})
        if failure:
            first = checks.clauses(failure)[0]
            ElementTree.SubElement(case, "failure", {"message": _clean(first)}).text = _clean(failure)
        elif skip:
            ElementTree.SubElement(case, "skipped", {"message": _clean(skip)})


def _clean(text: str) -> str:
    """`text` without what XML 1.0 cannot hold."""
    return _NO_XML.sub("\ufffd", text)


def csv_text(record: RunRecord) -> str:
    """Every check as a row of CSV (RFC 4180): verdict, what it was, its numbers, and the command that repeats it."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow((*_COLUMNS, *_NUMBERS, "command"))
    for outcome in record.outcomes:
        said = {
            "verdict": "pass" if is_right(outcome) else "fail",
            "shape": "x".join(map(str, outcome.shape)),
        }
        values = (said.get(name, getattr(outcome, name, "")) for name in (*_COLUMNS, *_NUMBERS))
        rows.writerow((*values, checks.repeat(outcome)))
    return text.getvalue()


def markdown(record: RunRecord, comparison: Comparison | None = None) -> str:
    """A page for a CI job: the verdict, why, where to start, and a line for each operator."""
    result = verdict(record)
    passed = result.passed and (comparison is None or comparison.passed)
    lines = [f"## {'✅ PASS' if passed else '❌ FAIL'}: {_inline(head.headline(record, comparison))}", ""]
    lines += [f"- {_inline(reason)}" for reason in head.reasons(result, comparison)]
    tiles = head.tiles(record, comparison)
    signs = {True: "✅", False: "❌", None: ""}
    lines += ["", *_table(("", "", ""), [(one.title, f"{one.value} {signs[one.good]}", one.note) for one in tiles])]
    starts = checks.smallest(record)[:_MOST_FAILURES]
    if starts:
        lines += ["", "### Start here", ""]
    for outcome in starts:
        said = checks.message(outcome.message)
        lines += [f"**{_inline(outcome.case)}** ({outcome.gate}): {_inline(said.what)}", ""]
        lines += [f"worst {_inline(said.worst)}", ""] if said.worst else []
        lines += [f"where: {_inline(said.pattern)}", ""] if said.pattern else []
        lines += _code(said.replay or checks.repeat(outcome))
    for failure in record.tests.failures[:_MOST_FAILURES]:
        lines += [f"**{_inline(failure.id)}**", "", *_code(failure.message)]
    lines += ["", "<details><summary>By operator</summary>", ""]
    lines += _table(
        ("operator", "right", "of", "largest error / bound"),
        [
            (
                row.op,
                sum(r for r, _ in row.cells),
                sum(t for _, t in row.cells),
                checks.short(row.ratio) if row.ratio else "-",
            )
            for row in operators.rows(record)
        ],
    )
    lines += ["", "</details>", "", *_code(record.command)]
    return "\n".join(lines) + "\n"


def pair_markdown(pair: Pair) -> str:
    """Two runs for a CI job's page."""
    lines = [f"## {_inline(pair.headline)}", "", *(f"- {_inline(line)}" for line in pair.notes), ""]
    rows = [
        (one.op, one.case, one.gate, one.status, checks.short(one.before), checks.short(one.after))
        for one in pair.changes[:_MOST_PAIRS]
        if one.status != "same"
    ]
    if rows:
        lines += _table(("operator", "case", "gate", "status", f"in {pair.names[0]}", f"in {pair.names[1]}"), rows)
    return "\n".join(lines) + "\n"


def _table(columns: tuple[str, ...], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield _line(columns)
    yield _line(["---"] * len(columns))
    yield from (_line(row) for row in rows)


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(_inline(str(cell)) for cell in cells)} |"


def _inline(text: str) -> str:
    """Text that Markdown and the HTML in it leave as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|&~!])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> list[str]:
    """A code block whose fence is longer than any within."""
    longest = max((len(found) for found in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, text, fence, ""]
