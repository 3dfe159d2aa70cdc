"""One check as a reader meets it: its address in the page, its message part by part, the command that repeats it."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass

from mxharness.op import Outcome
from mxharness.record import RunRecord, is_right
from mxharness.repeat import expression

_REPLAY = "mxharness replay "


@dataclass(frozen=True)
class Message:
    """What a failing check says, in parts."""

    what: str
    """Which elements, and by which rule."""
    worst: str
    """The worst element: where, what it is, what it should be."""
    pattern: str
    """What the failing elements have in common."""
    rest: tuple[str, ...]
    replay: str
    """The command that judges the saved tensors again; empty where nothing was saved."""


def message(text: str) -> Message:
    """`text` taken apart; what does not look like a part of the judge's messages is kept in `rest`."""
    parts = clauses(text)
    first, *others = parts or ["no message"]

    def take(start: str) -> str:
        found = [part for part in others if part.startswith(start)]
        others[:] = [part for part in others if not part.startswith(start)]
        return "; ".join(part.removeprefix(start).strip() for part in found)

    replay = take(_REPLAY)
    worst, pattern = take("worst "), take("pattern:")
    return Message(first, worst, pattern, tuple(others), f"{_REPLAY}{replay}" if replay else "")


def clauses(text: str) -> list[str]:
    """`text` cut at every "; " that stands in no bracket."""
    found, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth = max(0, depth + (character in "([") - (character in ")]"))
        if not depth and text.startswith("; ", place):
            found.append(text[start:place])
            start = place + 2
    return [part for part in (*found, text[start:]) if part.strip()]


def anchor(case: str, gate: str) -> str:
    """The address of a check in the page: no space, the same in every report."""
    return f"{case}:{gate}"


def repeat(outcome: Outcome) -> str:
    """What to type to run this one check again."""
    name = expression(f"[{outcome.case}-{outcome.gate}]")
    return f"{narrowed(outcome.device, shlex.quote(outcome.op))} -k {shlex.quote(name)}"


def repeat_test(device_class: str, node_id: str) -> str:
    """What to type to run a test of the suites again."""
    return f"{_run(device_class)} -k {shlex.quote(expression(node_id.rpartition('::')[2]))}"


def narrowed(device_class: str, op: str) -> str:
    """`repeat` up to its -k."""
    return f"{_run(device_class)} --op {op}"


def _run(device_class: str) -> str:
    return f"mxharness run --device {'host' if device_class == 'host' else 'cuda'} --no-perplexity"


def severity(outcome: Outcome) -> tuple[bool, float, str]:
    """Sorts NaN first, then by how far past the gate."""
    ratio = math.inf if math.isnan(outcome.ratio) else outcome.ratio
    return outcome.nan + outcome.inf == 0, -ratio, outcome.case


def short(value: object, digits: int = 4) -> str:
    """A number with few significant digits, anything else as it is."""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def smallest(record: RunRecord) -> list[Outcome]:
    """Per operator, the failed check with the fewest elements: where to start."""
    failures = [outcome for outcome in record.outcomes if not is_right(outcome)]
    first: dict[str, Outcome] = {}
    for outcome in sorted(failures, key=lambda outcome: (outcome.elements, severity(outcome))):
        first.setdefault(outcome.op, outcome)
    return list(first.values())
