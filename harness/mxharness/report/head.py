"""The head of the page: the verdict with coverage, device and the baseline's age; why; the numbers looked for first."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from mxharness import fuzz
from mxharness.drift import Change, Comparison
from mxharness.record import RunRecord, Verdict, is_right, perplexity_holds
from mxharness.report import checks, model, operators, skips
from mxharness.wording import counted

_STATUS_ORDER = ("failed", "drifted", "vanished", "new", "better")


@dataclass(frozen=True)
class Tile:
    """One number that a reader looks for first."""

    title: str
    value: str
    good: bool | None
    """None: neither right nor wrong."""
    note: str
    anchor: str
    """The section that tells more."""


def headline(record: RunRecord, comparison: Comparison | None) -> str:
    """What follows PASS or FAIL: coverage, device, the baseline's age."""
    right = sum(is_right(outcome) for outcome in record.outcomes)
    ops = len({outcome.op for outcome in record.outcomes})
    parts = [f"{right:,} of {record.selected:,} checks right on {record.device_class}, {counted(ops, 'operator')}"]
    if record.filters:
        parts.append(f"limited by {' '.join(record.filters)}")
    if comparison is None:
        parts.append("compared with no baseline")
    else:
        parts.append(f"baseline {comparison.baseline}{_days(comparison, record)}: {comparison.summary}")
    return "; ".join(parts)


def reasons(result: Verdict, comparison: Comparison | None) -> list[str]:
    """Why the run failed, wrong results before what did not run; empty where it passed."""
    found = sorted(result.reasons, key=lambda reason: " failed" not in reason)
    if comparison is not None:
        if comparison.moved:
            found.append(f"moved from baseline {comparison.baseline}: {comparison.summary}")
        found += comparison.damaged
    return found


def tiles(record: RunRecord, comparison: Comparison | None) -> list[Tile]:
    """What there is of: checks, other tests, perplexity, faults, random cases, baseline, and what did not run."""
    right = sum(is_right(outcome) for outcome in record.outcomes)
    wrong = max(record.selected, len(record.outcomes)) - right
    gates = ", ".join(f"{gate} {good:,} of {total:,}" for gate, (good, total) in operators.totals(record).items())
    found = [Tile("Checks", f"{right:,} of {record.selected:,}", not wrong, gates, "operators")]
    tests = record.tests
    if tests.passed or tests.failed:
        whole = tests.passed + tests.failed
        note = "invariance, memory, format, models"
        found.append(Tile("Other tests", f"{tests.passed:,} of {whole:,}", not tests.failed, note, "suites"))
    for row in record.perplexity[:1]:
        gate = (
            f"gate: {row['gate']}" if "gate" in row else "within tolerance" if row.get("passed") else "past tolerance"
        )
        change = model.bounds(row, "change", model.percent)
        note = f"{gate}; {change} beside float32" if change else gate
        found.append(
            Tile("Perplexity", checks.short(row.get("perplexity", "none")), perplexity_holds(row), note, "perplexity")
        )
    if record.faults is not None:
        caught = sum(bool(row.get("caught")) for row in record.faults)
        good = 0 < caught == len(record.faults)
        found.append(Tile("Planted faults", f"{caught} of {len(record.faults)}", good, "caught", "faults"))
    if record.fuzz:
        examples = sum(row.examples for row in record.fuzz)
        found.append(Tile("Random cases", f"{examples:,}", not fuzz.reasons(record.fuzz), "judged right", "random"))
    if comparison is not None:
        other = sum(comparison.counts.values()) - comparison.counts["same"] - comparison.counts["not run"]
        value = f"{other:,} moved" if other else "nothing moved"
        found.append(Tile("Baseline", value, comparison.passed, comparison.baseline, "baseline"))
    skipped = sum(skip.count for skip in record.skipped) + record.tests.skipped
    left = skips.unselected(record)
    found.append(Tile("Skipped", f"{skipped:,}", None, f"{left:,} not selected" if left else "and why", "skipped"))
    return found


def moved(comparison: Comparison | None) -> list[Change]:
    """What is worth a look, the gravest first."""
    changes = [change for change in comparison.changes if change.status in _STATUS_ORDER] if comparison else []
    return sorted(changes, key=lambda change: _STATUS_ORDER.index(change.status))


def _days(comparison: Comparison, record: RunRecord) -> str:
    """How old the baseline was when the run started."""
    try:
        days = (datetime.fromisoformat(record.started) - datetime.fromisoformat(comparison.created)).days
    except (ValueError, TypeError):
        return ""
    return f", {counted(days, 'day')} old" if days else ", less than a day old"


def age(comparison: Comparison | None, record: RunRecord) -> str:
    """Which baseline, when it was blessed and how old it was; empty where there is none."""
    return f"{comparison.baseline}, blessed {comparison.created}{_days(comparison, record)}" if comparison else ""
