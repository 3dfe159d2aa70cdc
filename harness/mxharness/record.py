"""The run record: everything one run selected, executed, skipped and found, as one JSON file.

The pytest plugin and the command line fill it; the verdict, the baseline and the report only read it. A run
that did less than it set out to do does not pass: `verdict` is the one place that decides.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mxharness import coverage, fuzz
from mxharness.coverage import Coverage
from mxharness.document import API_VERSION, Labelled, json_ready, read_document, revived, write_atomically
from mxharness.errors import UserError
from mxharness.fuzz import FuzzRow
from mxharness.op import Outcome
from mxharness.wording import counted, named


@dataclass(frozen=True)
class Skip:
    """Something that did not run."""

    what: str
    """A suite, a comparison or "perplexity"."""
    why: str
    asked: bool = False
    """True where the caller left it out on purpose (a flag), False where the machine lacks something."""
    count: int = 1
    """Tests that this line stands for."""


@dataclass(frozen=True)
class Failure:
    """A test outside the case-by-case judging that failed."""

    id: str
    """pytest node id."""
    message: str
    command: str = ""
    """What to type to run it again; none in records of before 0.6."""


@dataclass(frozen=True)
class OtherTests:
    """Suite tests that are not outcomes: exhaustive format tests, memory tests, the harness's own."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class RunRecord:
    """One run on one device."""

    device_class: str
    """"host" or "sm_90": the key of a baseline."""
    arithmetic: str
    """"tensor-core" (bit for bit) or "float32" (the host's fast mode, other bits)."""
    started: str
    """UTC, ISO 8601, for example "2026-11-21T22:40:00Z"."""
    seconds: float
    command: str
    """What to type to repeat the run."""
    selected: int
    """Checks (cases x gates) the run set out to do."""
    executed: int
    """Checks that reached a verdict."""
    outcomes: tuple[Outcome, ...] = ()
    environment: Labelled = field(default_factory=dict)
    """See environment.describe."""
    axes: Mapping[str, str] = field(default_factory=dict)
    """Operator to the names of its shape's sizes, Op.axes, for example {"gemm": "M N K"}."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Operator to the file of its kernels, Op.source: operators of one file are shown together."""
    tolerances: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Operator to what its tolerance is made of, Tolerance.provenance; empty in records of before 0.3."""
    filters: tuple[str, ...] = ()
    """What narrowed the selection on purpose, for example ("--op gemm",). Empty: everything there is."""
    skipped: tuple[Skip, ...] = ()
    perplexity: tuple[Labelled, ...] = ()
    """Per model and text: name, text, protocol, weights, activations, perplexity, tokens_per_second, hashes;
    kl, same_word and gate are what the gate found; `passed` (bool) and `message` the verdict; command repeats it."""
    faults: tuple[Labelled, ...] | None = None
    """Per planted fault: name, caught (bool), detector, command. None: not run."""
    kernels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By "file kernel", what the compiler spent on it: see device.resources; empty on the host and before 0.5."""
    tests: OtherTests = OtherTests()
    coverage: Coverage | None = None
    """What the manifest demanded and what ran; None in records of before there was one."""
    fuzz: tuple[FuzzRow, ...] = ()
    """What the random cases of each operator showed."""
    incomplete: str = ""
    """Why the run did not come to its end; such a record passes never."""
    known: tuple[Labelled, ...] = ()
    """Failures that the ledger lists (ledger.py): check, reason, expires, where."""
    ledger: tuple[str, ...] = ()
    """What the ledger itself gets wrong, a sentence each; any fails the run."""


@dataclass(frozen=True)
class Verdict:
    """What a run proved."""

    passed: bool
    first_line: str
    """One sentence that begins with PASS or FAIL and carries the coverage."""
    reasons: tuple[str, ...]
    """Why it failed, the heaviest first; empty when passed."""


def verdict(record: RunRecord) -> Verdict:
    """Decide a run. Fails when anything failed, when nothing ran, and when less ran than it should have.

    Perplexity that is missing fails too, unless the caller left it out (a Skip of "perplexity" with asked=True).
    """
    reasons = (*_coverage_reasons(record), *fuzz.reasons(record.fuzz), *_failure_reasons(record))
    parts = achieved(record)
    if reasons:
        return Verdict(False, f"FAIL: {'; '.join((*reasons, *parts))}", reasons)
    return Verdict(True, f"PASS: {'; '.join(parts)}", ())


def achieved(record: RunRecord) -> list[str]:
    """What a run covered, in parts of a sentence; the device and what limited the run are among them."""
    arithmetic = "bit-exact tensor-core" if record.arithmetic == "tensor-core" else record.arithmetic
    right = sum(is_right(outcome) for outcome in record.outcomes)
    checks = f"{right} of {record.selected} checks right " if record.selected or record.outcomes else ""
    parts = [f"{checks}on {record.device_class} ({arithmetic} arithmetic)"]
    if record.outcomes:
        parts.append(counted(len({outcome.op for outcome in record.outcomes}), "operator"))
    if record.filters:
        parts.append(f"limited by {' '.join(record.filters)}")
    if record.perplexity:
        good = sum(bool(row.get("passed")) for row in record.perplexity)
        parts.append(f"perplexity {good} of {len(record.perplexity)} within tolerance")
    elif perplexity_left_out(record):
        parts.append("perplexity left out on request")
    if record.tests.passed or record.tests.failed:
        parts.append(f"{record.tests.passed} of {record.tests.passed + record.tests.failed} other tests passed")
    if record.fuzz:
        parts.append(fuzz.sentence(record.fuzz))
    if record.faults is not None:
        caught = sum(bool(row.get("caught")) for row in record.faults)
        parts.append(f"{caught} of {len(record.faults)} planted faults caught")
    if record.known:
        parts.append(counted(len(record.known), "known failure"))
    skipped = sum(skip.count for skip in record.skipped) + record.tests.skipped
    if skipped:
        parts.append(f"{skipped} skipped")
    return parts


def is_right(outcome: Outcome) -> bool:
    """Passed, with numbers that do not contradict it."""
    return outcome.passed and outcome.bad == 0 and not math.isnan(outcome.ratio)


def _coverage_reasons(record: RunRecord) -> list[str]:
    """Every way in which the run did less than it set out to do."""
    reasons = [record.incomplete] if record.incomplete else []
    if record.coverage:
        reasons += coverage.reasons(record.coverage)
    other = record.filters and record.tests.passed and not record.selected  # what was asked for are no checks
    if min(record.selected, record.executed) <= 0 and not other:
        reasons.append("no check executed")
    elif record.executed < record.selected and record.coverage is None:  # which names them
        reasons.append(f"{record.selected - record.executed} of {record.selected} selected checks did not execute")
    if len(record.outcomes) < record.executed:
        reasons.append(f"{counted(record.executed - len(record.outcomes), 'executed check')} left no verdict")
    empty = sum(outcome.elements <= 0 for outcome in record.outcomes)
    if empty:
        reasons.append(f"{counted(empty, 'check')} compared no element")
    if not record.perplexity and not perplexity_left_out(record):
        why = next((skip.why for skip in record.skipped if skip.what == "perplexity"), "no result recorded")
        reasons.append(f"perplexity did not run ({why})")
    if record.coverage and record.coverage.manifest and not record.filters:
        judged, drawn = ({row.op for row in rows} for rows in (record.outcomes, record.fuzz))
        reasons += coverage.idle(judged, drawn, len(record.faults or ()))
    elif record.faults is not None and not record.faults:
        reasons.append("no planted fault was run")
    return reasons


def _failure_reasons(record: RunRecord) -> list[str]:
    """Every result that is wrong, grouped."""
    reasons = []
    known = {row.get("check") for row in record.known}
    failed = Counter(
        outcome.op
        for outcome in record.outcomes
        if not is_right(outcome) and f"{outcome.case} {outcome.gate}" not in known
    )
    if failed:
        by_op = ", ".join(f"{op} {count}" for op, count in sorted(failed.items()))
        reasons.append(f"{counted(failed.total(), 'check')} failed: {by_op}")
    reasons += record.ledger
    bad = [str(row.get("name", "?")) for row in record.perplexity if not perplexity_holds(row)]
    if bad:
        reasons.append(f"perplexity out of tolerance: {named(bad)}")
    if record.tests.failed:
        reasons.append(f"{counted(record.tests.failed, 'other test')} failed")
    missed = [str(row.get("name", "?")) for row in record.faults or () if not row.get("caught")]
    if missed:
        reasons.append(f"{counted(len(missed), 'planted fault')} not caught: {named(missed)}")
    return reasons


def perplexity_left_out(record: RunRecord) -> bool:
    """Whether the caller asked for a run without perplexity."""
    return any(skip.what == "perplexity" and skip.asked for skip in record.skipped)


def perplexity_holds(row: Labelled) -> bool:
    """Passed, and with a finite number behind it."""
    value = row.get("perplexity")
    return bool(row.get("passed")) and isinstance(value, int | float) and math.isfinite(value)


def save(record: RunRecord, path: Path) -> None:
    """Write `record` as JSON, whole or not at all. NaN and infinities become the strings "nan", "inf", "-inf"."""
    document = {"api_version": API_VERSION, **asdict(record)}
    write_atomically(path, json.dumps(json_ready(document), indent=1, allow_nan=False) + "\n")


def load(path: Path) -> RunRecord:
    """Read what `save` wrote. Raises UserError, one sentence, for a missing, damaged or newer file."""
    document = read_document(path, "run record")
    document = {
        "known": [],
        "ledger": [],
        "coverage": None,
        "fuzz": [],
        "incomplete": "",
        "kernels": {},
        **document,
    }  # which the first records did not have
    try:
        document = {"tolerances": {}, **document}
        values = {field.name: document[field.name] for field in fields(RunRecord)}
        values["seconds"] = float(values["seconds"])
        values["outcomes"] = tuple(outcome_of(row) for row in values["outcomes"])
        values["axes"] = dict(values["axes"])
        values["tolerances"] = {op: dict(rows) for op, rows in values["tolerances"].items()}
        values["skipped"] = tuple(Skip(**row) for row in values["skipped"])
        values["filters"] = tuple(values["filters"])
        values["perplexity"] = tuple(revived(row) for row in values["perplexity"])
        values["faults"] = None if values["faults"] is None else tuple(dict(row) for row in values["faults"])
        values["kernels"] = {name: dict(row) for name, row in values["kernels"].items()}
        values["coverage"] = coverage.read(values["coverage"])
        values["fuzz"] = tuple(FuzzRow(**{**row, "largest": float(row["largest"])}) for row in values["fuzz"])
        values["known"] = tuple(dict(row) for row in values["known"])
        values["ledger"] = tuple(map(str, values["ledger"]))
        tests = dict(values["tests"])
        values["tests"] = OtherTests(**{**tests, "failures": tuple(Failure(**row) for row in tests["failures"])})
        return RunRecord(**values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a complete run record ({type(error).__name__}: {error})") from error


def outcome_of(row: Mapping[str, Any]) -> Outcome:
    """A verdict read back; KeyError, TypeError or ValueError for what is none."""
    values = dict(row, shape=tuple(row["shape"]))
    for name in [one.name for one in fields(Outcome) if one.type == "float" and one.name in values]:
        values[name] = float(values[name])  # "inf" and "nan" are texts in JSON
    if not isinstance(values["passed"], bool):
        raise TypeError(f"passed of {row['case']} is no boolean")
    return Outcome(**values)
