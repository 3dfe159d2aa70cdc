"""How far a run has moved from a baseline, check by check.

A check that still holds its bound but has other bits has drifted: the comparison fails until somebody looks and
blesses it. Between device classes nothing may move at all, because every kernel's arithmetic is modelled bit for bit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mxharness import baseline
from mxharness.baseline import Baseline, Entry
from mxharness.errors import UserError
from mxharness.record import RunRecord, is_right, perplexity_holds, perplexity_left_out, verdict

Status = Literal["same", "better", "drifted", "failed", "new", "vanished", "not run"]

PASSING: frozenset[Status] = frozenset({"same", "better", "not run"})
"""What does not fail a comparison. "not run" is what the caller left out on purpose."""

NATS = 1e-3
"""How far log perplexity may be from the stored value; what a re-ordered attention in torch moves it by is smaller."""

_NUMBERS = ("ratio", "max_ulp", "nmse")
_RELATIVE = 1e-2
_FLOOR = {"ratio": 1e-6, "max_ulp": 1e-6, "nmse": 1e-20}


@dataclass(frozen=True)
class Change:
    """One check, or one perplexity, in the baseline and in the run."""

    key: str
    op: str
    """The operator, or "perplexity"."""
    status: Status
    before: Entry | None
    """What the baseline says; None where the check is new."""
    after: Entry | None
    """What the run says; None where the check vanished or was not run."""
    message: str
    """What moved, with the numbers; empty when the same."""


@dataclass(frozen=True)
class Comparison:
    """A run against a baseline."""

    baseline: str
    """"sm_90/main"."""
    device_class: str
    """Of the run."""
    created: str
    """UTC, ISO 8601: when the blessed run started."""
    changes: tuple[Change, ...]
    environment: tuple[tuple[str, str, str], ...]
    """What differs between the two environments: (what, in the baseline, in the run)."""
    incomplete: tuple[str, ...]
    """Why the run itself does not count, whatever the baseline says; empty when it does."""
    command: str
    """What to type, after looking, to bless the run."""

    @property
    def counts(self) -> Mapping[str, int]:
        """How many changes have each status."""
        return Counter(change.status for change in self.changes)

    @property
    def passed(self) -> bool:
        """Nothing failed, drifted, vanished or is new, and the run itself passed, so it compared something."""
        return not self.incomplete and all(change.status in PASSING for change in self.changes)

    @property
    def summary(self) -> str:
        """How many checks have which status, the gravest first."""
        order: tuple[Status, ...] = ("failed", "drifted", "vanished", "new", "better", "same", "not run")
        return ", ".join(f"{self.counts[status]} {status}" for status in order if self.counts[status])

    @property
    def first_line(self) -> str:
        """One sentence that begins with PASS or FAIL."""
        word = "PASS" if self.passed else "FAIL"
        return "; ".join((f"{word}: {self.device_class} against {self.baseline}: {self.summary}", *self.incomplete))


def compare(name: str, record: RunRecord, device_class: str | None = None, root: Path | None = None) -> Comparison:
    """Compare a run with baseline `name`, or `device_class`/`name`; "sm_90/main" as `name` says both.

    root: the folder of all baselines, by default as in baseline.load.

    Another device class than the run's is compared only when named, and then bit for bit: any other digest fails.
    Raises UserError where the baseline is missing or damaged, and for a run in the host's float32 mode.
    """
    named, _, plain = name.rpartition("/")
    stored = baseline.load(device_class or named or record.device_class, plain, root)
    if record.arithmetic != "tensor-core":
        raise UserError(f"baselines hold tensor-core bits and this run used {record.arithmetic} arithmetic")
    cross = stored.device_class != record.device_class
    checks = _check_changes(stored, record, cross=cross)
    perplexity = _perplexity_changes(stored, record, cross=cross)
    tolerances = _tolerance_changes(stored, record)
    command = f"mxharness baseline create {stored.name} --replace"
    return Comparison(
        baseline=f"{stored.device_class}/{stored.name}",
        device_class=record.device_class,
        created=stored.created,
        changes=tuple(sorted((*checks, *perplexity, *tolerances), key=lambda change: (change.op, change.key))),
        environment=_environment_changes(stored, record),
        incomplete=verdict(record).reasons,
        command=f"{command}    (on a {stored.device_class} device)" if cross else command,
    )


def _check_changes(stored: Baseline, record: RunRecord, *, cross: bool) -> list[Change]:
    found = baseline.entries(record)
    wrong = dict.fromkeys(
        baseline.unstable(record), "ran twice with different bits; the kernel is not deterministic"
    ) | {
        baseline.key(outcome.case, outcome.gate): outcome.message or "failed without a message"
        for outcome in record.outcomes
        if not is_right(outcome)
    }
    changes = []
    for name in stored.checks.keys() | found.keys():
        before, after = stored.checks.get(name), found.get(name)
        status: Status
        if name in wrong:
            status, message = "failed", wrong[name]
        elif before is not None and after is not None:
            status, message = _check_status(before, after, cross=cross)
        else:
            status, message = _one_sided(before, left_out=bool(record.filters))
        changes.append(Change(name, str((before or after or {})["op"]), status, before, after, message))
    return changes


def _tolerance_changes(stored: Baseline, record: RunRecord) -> list[Change]:
    """A line of its own for every tolerance that is not what it was, whatever the verdicts say."""
    changes = []
    for op in sorted(stored.tolerances.keys() & record.tolerances.keys()):
        before, after = dict(stored.tolerances[op]), dict(record.tolerances[op])
        moved = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        if moved:
            what = "; ".join(f"{name}: {before.get(name, 'none')} -> {after.get(name, 'none')}" for name in moved)
            message = f"tolerance of {op} changed: {what}"
            changes.append(Change(f"{op} tolerance", op, "drifted", before, dict[str, object](after), message))
    return changes


def _one_sided(before: Entry | None, *, left_out: bool) -> tuple[Status, str]:
    """The status of what only one side has. left_out: the run was narrowed on purpose."""
    if before is None:
        return "new", "in this run, not in the baseline"
    if left_out:
        return "not run", "left out of this run on request"
    return "vanished", "in the baseline, not in this run"


def _check_status(before: Entry, after: Entry, *, cross: bool) -> tuple[Status, str]:
    """The status of a right check that is on both sides, and the sentence that explains it."""
    if before["inputs"] != after["inputs"]:
        other = f"other inputs ({before['inputs']} -> {after['inputs']}), so the bits cannot be compared"
        return ("failed" if cross else "drifted"), other
    moved = [name for name in _NUMBERS if _moved(name, _number(before, name), _number(after, name))]
    numbers = ", ".join(f"{name} {before[name]:g} -> {after[name]:g}" for name in moved) or "error as before"
    if before["digest"] == after["digest"] and before["elements"] == after["elements"]:
        if cross or not moved:
            return "same", ""
        return "drifted", f"the same bits, judged otherwise (reference or tolerance changed): {numbers}"
    bits = f"other bits ({before['digest']} -> {after['digest']}), {numbers}"
    if cross:
        return "failed", f"{bits}; two device classes must agree bit for bit"
    if moved and all(_number(after, name) <= _number(before, name) for name in _NUMBERS):
        return "better", bits
    return "drifted", f"{bits}; every element within its gate"


def _moved(name: str, before: float, after: float) -> bool:
    """True where the number differs by more than the jitter of a float64 reference on another machine."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return str(before) != str(after)
    return abs(after - before) > _FLOOR[name] + _RELATIVE * abs(before)


def _perplexity_changes(stored: Baseline, record: RunRecord, *, cross: bool) -> list[Change]:
    found = baseline.perplexity_entries(record)
    holds = {baseline.perplexity_key(row): perplexity_holds(row) for row in record.perplexity}
    messages = {baseline.perplexity_key(row): str(row.get("message", "")) for row in record.perplexity}
    changes = []
    for name in stored.perplexity.keys() | found.keys():
        before, after = stored.perplexity.get(name), found.get(name)
        status: Status
        if after is not None and not holds[name]:
            status, message = "failed", messages[name] or "out of tolerance"
        elif before is not None and after is not None:
            status, message = _perplexity_status(before, after)
        elif cross:
            status, message = "not run", "measured on one of the two device classes only"
        else:
            status, message = _one_sided(before, left_out=bool(record.filters) or perplexity_left_out(record))
        changes.append(Change(name, "perplexity", status, before, after, message))
    return changes


def _perplexity_status(before: Entry, after: Entry) -> tuple[Status, str]:
    """Another text, token ids or token count refuses the comparison; a moved value is drift in either direction."""
    other = [
        f"{name} {before.get(name)} -> {after.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if isinstance(before.get(name, after.get(name)), str | int) and before.get(name) != after.get(name)
    ]
    if other:
        return "failed", f"not the same experiment: {', '.join(other)}"
    old, new = _number(before, "perplexity"), _number(after, "perplexity")
    nats = math.log(new / old) if old > 0 and new > 0 else math.inf
    if abs(nats) <= NATS:
        return "same", ""
    return "drifted", f"perplexity {old:g} -> {new:g} ({nats:+.2e} nats per token, {NATS:g} allowed)"


def _number(entry: Entry, name: str) -> float:
    value = entry[name]
    if not isinstance(value, int | float):
        raise UserError(f"the baseline's {name} is '{value}', which is no number")
    return float(value)


def _environment_changes(stored: Baseline, record: RunRecord) -> tuple[tuple[str, str, str], ...]:
    names = dict.fromkeys((*record.environment, *stored.environment))
    pairs = ((name, str(stored.environment.get(name, "-")), str(record.environment.get(name, "-"))) for name in names)
    return tuple(pair for pair in pairs if pair[1] != pair[2])
