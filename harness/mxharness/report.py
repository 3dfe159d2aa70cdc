"""The report of a run: one HTML file that needs nothing else, its first line the verdict.

Template, style and script lie in reports/; plots come from plot.py as inline SVG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from mxharness import fuzz, paths, plot
from mxharness.baseline import LABELS
from mxharness.document import Labelled, write_atomically
from mxharness.drift import Change, Comparison
from mxharness.op import GATES, Outcome
from mxharness.record import RunRecord, Verdict, is_right, verdict

_MOST_FAILURES = 50
_FEW = 5
_MOST_CHANGES = 200
_CLOSEST = 10
_PERPLEXITY = (*LABELS, "perplexity", "tokens_per_second")
_VERDICT = ("passed", "message")
_STATUS_ORDER = ("failed", "drifted", "vanished", "new", "better")
_ARITHMETIC = {
    "tensor-core": "tensor-core, bit for bit",
    "float32": "float32, the host's fast mode: other bits than a tensor core's, no baseline can be made from it",
}


def write(record: RunRecord, path: Path, comparison: Comparison | None = None) -> None:
    """Write the report to `path`, whole or not at all."""
    write_atomically(path, render(record, comparison))


def render(record: RunRecord, comparison: Comparison | None = None) -> str:
    """The report as HTML text. comparison: what drift.compare found, where a baseline was asked for."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = paths.reports()
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    environment.filters |= {"short": short, "right": is_right}
    result = verdict(record)
    passed = result.passed and (comparison is None or comparison.passed)
    failures = sorted((outcome for outcome in record.outcomes if not is_right(outcome)), key=_severity)
    moved = _moved(comparison)
    return environment.get_template("report.html.j2").render(
        record=record,
        passed=passed,
        word="PASS" if passed else "FAIL",
        headline=_headline(result, comparison),
        comparison=comparison,
        age=_age(comparison, record),
        device=_device(record),
        arithmetic=_ARITHMETIC.get(record.arithmetic, record.arithmetic),
        duration=_duration(record.seconds),
        sections=_sections(record, comparison),
        failures=failures[:_MOST_FAILURES],
        smallest=smallest(record) if len(failures) > _FEW else [],
        failures_left=max(0, len(failures) - _MOST_FAILURES),
        moved=moved[:_MOST_CHANGES],
        moved_left=max(0, len(moved) - _MOST_CHANGES),
        families=_families(record),
        gates=GATES,
        closest=_closest(record),
        demand=_demand(record),
        fuzz_total=fuzz.sentence(record.fuzz) if record.fuzz else "",
        fault_seconds=sum(float(str(row.get("seconds", 0))) for row in record.faults or ()),
        perplexity=[_perplexity(row) for row in record.perplexity],
        perplexity_columns=[name for name in _PERPLEXITY if any(name in row for row in record.perplexity)],
        css=Markup(_asset(folder / "report.css")),  # noqa: S704  our own file
        script=Markup(_asset(folder / "report.js")),  # noqa: S704  our own file
    )


def short(value: object, digits: int = 4) -> str:
    """A number with few significant digits, anything else as it is."""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _headline(result: Verdict, comparison: Comparison | None) -> str:
    """What follows PASS or FAIL: the baseline first where only it failed."""
    line = result.first_line.partition(":")[2].strip()
    if comparison is None or comparison.passed or not result.passed:
        return line
    return f"moved from baseline {comparison.baseline}; {line}"


def _asset(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()


def _severity(outcome: Outcome) -> tuple[bool, float, str]:
    """Sorts NaN first, then by how far past the gate."""
    ratio = math.inf if math.isnan(outcome.ratio) else outcome.ratio
    return outcome.nan + outcome.inf == 0, -ratio, outcome.case


def smallest(record: RunRecord) -> list[Outcome]:
    """Per operator, the failed check with the fewest elements: where to start."""
    failures = [outcome for outcome in record.outcomes if not is_right(outcome)]
    first: dict[str, Outcome] = {}
    for outcome in sorted(failures, key=lambda outcome: (outcome.elements, _severity(outcome))):
        first.setdefault(outcome.op, outcome)
    return list(first.values())


def _moved(comparison: Comparison | None) -> list[Change]:
    """What is worth a look, the gravest first."""
    changes = [change for change in comparison.changes if change.status in _STATUS_ORDER] if comparison else []
    return sorted(changes, key=lambda change: _STATUS_ORDER.index(change.status))


def _age(comparison: Comparison | None, record: RunRecord) -> str:
    """How old the baseline was when the run started."""
    if comparison is None:
        return ""
    try:
        days = (datetime.fromisoformat(record.started) - datetime.fromisoformat(comparison.created)).days
    except (ValueError, TypeError):
        return f"blessed {comparison.created}"
    return f"blessed {comparison.created}, {days} day{'' if days == 1 else 's'} before this run"


def _device(record: RunRecord) -> str:
    known = record.environment
    unit = known.get("cpu") if record.device_class == "host" else known.get("gpu")
    kind = "the kernels compiled for the CPU" if record.device_class == "host" else "GPU"
    return f"{record.device_class} ({kind}{f', {unit}' if unit else ''})"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def _demand(record: RunRecord) -> str:
    """What the manifest demands and what came of it."""
    coverage = record.coverage
    if coverage is None or not coverage.manifest:
        return "held against no manifest"
    selected, missing = len(coverage.selected), len(coverage.missing)
    whole = "; ".join((*coverage.lost, *coverage.unknown)) or "nothing vanished, nothing is new"
    return (
        f"{coverage.demanded:,} tests demanded ({coverage.manifest}): {whole}; {selected:,} selected, "
        f"{selected - missing:,} of them ran"
    )


def _sections(record: RunRecord, comparison: Comparison | None) -> list[tuple[str, str]]:
    failed = record.tests.failures or any(not is_right(outcome) for outcome in record.outcomes)
    present = {"failures": bool(failed), "baseline": comparison is not None, "faults": record.faults is not None}
    present |= {"closest": bool(_closest(record)), "known": bool(record.known), "random": bool(record.fuzz)}
    titles = {
        "failures": "What failed",
        "known": "Known failures",
        "baseline": "Baseline",
        "skipped": "Not run",
        "operators": "By operator",
        "closest": "Closest to the bound",
        "random": "Random cases",
        "perplexity": "Perplexity",
        "faults": "Planted faults",
        "every": "Every check",
        "environment": "Environment",
        "words": "Words",
    }
    return [(anchor, title) for anchor, title in titles.items() if present.get(anchor, True)]


def _families(record: RunRecord) -> list[Mapping[str, object]]:
    """One entry a kernel file: its operators' coverage and plots."""
    from markupsafe import Markup

    by_file: dict[str, dict[str, list[Outcome]]] = {}
    places = {op: place for place, op in enumerate(record.sources)}  # workers of a parallel run end in any order
    for outcome in sorted(record.outcomes, key=lambda outcome: places.get(outcome.op, len(places))):
        by_file.setdefault(record.sources.get(outcome.op, outcome.op), {}).setdefault(outcome.op, []).append(outcome)
    families: list[Mapping[str, object]] = []
    for name, operators in by_file.items():
        plots = [
            (op, Markup(_plot(op, record.axes.get(op, "").split(), bounded)))  # noqa: S704  our own SVG, labels escaped
            for op, outcomes in operators.items()
            if (bounded := [outcome for outcome in outcomes if outcome.gate == "bound"])
        ]
        rows = [_coverage(op, outcomes) for op, outcomes in operators.items()]
        families.append({"name": name, "anchor": f"operators-{len(families)}", "rows": rows, "plots": plots})
    return families


def _plot(op: str, axes: list[str], outcomes: list[Outcome]) -> str:
    """Error / bound as SVG; over the contraction length where the operator has one."""
    k = axes.index("K") if "K" in axes and all(len(outcome.shape) == len(axes) for outcome in outcomes) else None
    points = [
        plot.Point(
            x=max(1, outcome.elements if k is None else outcome.shape[k]),
            ratio=outcome.ratio,
            dtype=outcome.dtype,
            passed=is_right(outcome),
        )
        for outcome in outcomes
    ]
    return plot.ratio_svg(op, points, "elements" if k is None else "K, contraction length")


def _coverage(op: str, outcomes: list[Outcome]) -> Mapping[str, object]:
    cells = []
    for gate in GATES:
        judged = [is_right(outcome) for outcome in outcomes if outcome.gate == gate]
        cells.append((sum(judged), len(judged)))
    bounded = [outcome.ratio for outcome in outcomes if outcome.gate in ("bound", "composed")]
    return {
        "op": op,
        "cells": cells,
        "elements": sum(outcome.elements for outcome in outcomes),
        "ratio": max(bounded, key=lambda ratio: (math.isnan(ratio), ratio)) if bounded else None,
        "ties": sum(outcome.ties for outcome in outcomes),
    }


def _closest(record: RunRecord) -> list[Outcome]:
    passing = (outcome for outcome in record.outcomes if outcome.gate == "bound" and is_right(outcome))
    return sorted(passing, key=lambda outcome: (-outcome.ratio, outcome.case))[:_CLOSEST]


def _perplexity(row: Labelled) -> Mapping[str, object]:
    """The row, with what has no column of its own gathered under "more"."""
    more = [(name, value) for name, value in row.items() if name not in (*_PERPLEXITY, *_VERDICT)]
    return {**row, "more": more}
