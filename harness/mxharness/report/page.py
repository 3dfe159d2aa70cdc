"""One run as one HTML page: its first line the verdict, then why, then where to start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mxharness import fuzz, paths
from mxharness.drift import Comparison
from mxharness.op import GATES, Outcome
from mxharness.record import RunRecord, is_right, verdict
from mxharness.report import checks, head, model, moved, operators, skips, trend
from mxharness.report.table import Column, Detail, Table, payload

if TYPE_CHECKING:
    from jinja2 import Template

    from mxharness.report.sensitivity import Section
    from mxharness.report.speed import Section as Times

_MOST_FAILURES = 50
_STARTS = 3
_CLOSEST = 10
_ARITHMETIC = {
    "tensor-core": "tensor-core, bit for bit",
    "float32": "float32, the host's fast mode: other bits than a tensor core's, no baseline can be made from it",
}


def render(
    record: RunRecord,
    comparison: Comparison | None = None,
    history: trend.History | None = None,
    sensitivity: Section | None = None,
    speed: Times | None = None,
) -> str:
    """The report as HTML text.

    comparison: what drift.compare found, where a baseline was asked for. history: the versions to draw, where there are
    some. sensitivity: what was measured of the model's parts. speed: what was measured of the kernels.
    """
    result = verdict(record)
    passed = result.passed and (comparison is None or comparison.passed)
    failures = sorted((outcome for outcome in record.outcomes if not is_right(outcome)), key=checks.severity)
    return template("report.html.j2").render(
        record=record,
        passed=passed,
        word="PASS" if passed else "FAIL",
        headline=head.headline(record, comparison),
        reasons=head.reasons(result, comparison),
        tiles=head.tiles(record, comparison),
        comparison=comparison,
        age=head.age(comparison, record),
        device=_device(record),
        arithmetic=_ARITHMETIC.get(record.arithmetic, record.arithmetic),
        duration=f"{record.seconds:.1f} s" if record.seconds < 60 else f"{record.seconds / 60:.1f} min",
        sections=_sections(record, comparison, history, sensitivity, speed),
        failures=failures[:_MOST_FAILURES],
        starts=checks.smallest(record)[:_STARTS],
        failures_left=max(0, len(failures) - _MOST_FAILURES),
        moved=moved.table(comparison),
        grave=moved.grave(comparison),
        families=operators.families(record),
        suites=operators.suites(record),
        gates=GATES,
        closest=_closest(record),
        demand=_demand(record),
        fuzz_total=fuzz.sentence(record.fuzz) if record.fuzz else "",
        fault_seconds=sum(float(str(row.get("seconds", 0))) for row in record.faults or ()),
        models=model.models(record),
        left_out=skips.groups(record),
        narrowed=skips.narrowed(record),
        history=history,
        sensitivity=sensitivity,
        speed=speed,
        table=_table(record),
        wrong=len(failures),
    )


def template(name: str) -> Template:
    """One of reports/, with the style, the script and what every page uses at hand."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = paths.reports()
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    environment.filters |= {
        "short": checks.short,
        "right": is_right,
        "message": checks.message,
        "repeat": checks.repeat,
        "payload": lambda table: Markup(payload(table)),  # noqa: S704  escaped there
        "svg": Markup,  # our own drawing, its labels escaped
    }
    environment.tests["hash_name"] = lambda name: name.startswith("kernels/")
    environment.globals |= {
        "css": Markup((folder / "report.css").read_text(encoding="utf-8").strip()),  # noqa: S704  our own file
        "script": Markup((folder / "report.js").read_text(encoding="utf-8").strip()),  # noqa: S704  our own file
        "anchor": checks.anchor,
        "repeat_test": checks.repeat_test,
    }
    return environment.get_template(name)


def _device(record: RunRecord) -> str:
    known = record.environment
    unit = known.get("cpu") if record.device_class == "host" else known.get("gpu")
    kind = "the kernels compiled for the CPU" if record.device_class == "host" else "GPU"
    return f"{record.device_class} ({kind}{f', {unit}' if unit else ''})"


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


def _sections(
    record: RunRecord,
    comparison: Comparison | None,
    history: trend.History | None,
    sensitivity: Section | None,
    speed: Times | None,
) -> list[tuple[str, str]]:
    failed = record.tests.failures or any(not is_right(outcome) for outcome in record.outcomes)
    present = {
        "failures": bool(failed),
        "baseline": comparison is not None,
        "history": history is not None,
        "faults": record.faults is not None,
        "closest": bool(_closest(record)),
        "known": bool(record.known),
        "random": bool(record.fuzz),
        "suites": bool(operators.suites(record)),
        "sensitivity": sensitivity is not None,
        "speed": speed is not None,
    }
    titles = {
        "failures": "What failed",
        "every": "Every check",
        "known": "Known failures",
        "baseline": "Baseline",
        "history": "Over versions",
        "operators": "By operator",
        "suites": "By suite",
        "closest": "Closest to the bound",
        "perplexity": "Perplexity",
        "sensitivity": "Sensitivity",
        "speed": "Speed",
        "faults": "Planted faults",
        "random": "Random cases",
        "skipped": "Not run",
        "environment": "Environment",
        "words": "Words",
    }
    return [(anchor, title) for anchor, title in titles.items() if present.get(anchor, True)]


def _closest(record: RunRecord) -> list[Outcome]:
    passing = (outcome for outcome in record.outcomes if outcome.gate == "bound" and is_right(outcome))
    return sorted(passing, key=lambda outcome: (-outcome.ratio, outcome.case))[:_CLOSEST]


def _table(record: RunRecord) -> Table:
    """Every check, the failed ones first."""
    outcomes = sorted(record.outcomes, key=lambda outcome: not outcome.message and is_right(outcome))
    right = [is_right(outcome) for outcome in outcomes]
    details = {
        place: Detail(tuple(checks.clauses(outcome.message)), (checks.repeat(outcome),))
        for place, outcome in enumerate(outcomes)
        if outcome.message
    }
    return Table(
        noun="checks",
        columns=(
            Column("verdict", "mark", ["pass" if one else "FAIL" for one in right]),
            Column("case", "name", [outcome.case for outcome in outcomes]),
            Column("gate", "text", [outcome.gate for outcome in outcomes], chosen=True),
            Column("error / bound", "number", [outcome.ratio for outcome in outcomes]),
            Column("elements", "number", [outcome.elements for outcome in outcomes]),
            Column("wrong", "number", [outcome.bad for outcome in outcomes]),
            Column("NaN", "number", [outcome.nan for outcome in outcomes]),
            Column("Inf", "number", [outcome.inf for outcome in outcomes]),
            Column("max ulp", "number", [outcome.max_ulp for outcome in outcomes]),
            Column("NMSE", "number", [outcome.nmse for outcome in outcomes]),
            Column("operator", "text", [outcome.op for outcome in outcomes], chosen=True),
            Column("digest", "bits", [outcome.digest for outcome in outcomes]),
        ),
        anchors=[checks.anchor(outcome.case, outcome.gate) for outcome in outcomes],
        bad=[not one for one in right],
        details=details,
        repeat=f"{checks.narrowed(record.device_class, '{0}')} -k '{{1}}'" if outcomes else "",
        repeated=(10, 1, 2),
    )
