"""What moved between two baselines, or a baseline and a run: one line for everything that either holds.

A check that still holds its bound but has other bits, another error or another distribution of errors has drifted.
Between device classes nothing may move at all, because every kernel's arithmetic is modelled bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from mxharness.baseline import Baseline, Entry
from mxharness.errors import UserError

Status = Literal["same", "better", "drifted", "failed", "new", "vanished", "not run"]
Finding = tuple[Status, str]
"""A status and the sentence that explains it, empty for "same"."""

PASSING: frozenset[Status] = frozenset({"same", "better", "not run"})
"""What does not fail a comparison. "not run" is what the caller left out on purpose."""

NATS = 1e-3
"""How far log perplexity may be from the stored value; what a re-ordered attention in torch moves it by is smaller."""

KL = 1.25
"""By what factor a mean KL divergence may differ: it is 1e-5 and less, and a re-ordered sum moves its last digits."""

_NUMBERS = ("ratio", "high_ratio", "line", "max_ulp", "nmse")
_RELATIVE = 1e-2
_FLOOR = {"ratio": 1e-6, "high_ratio": 1e-6, "line": 1e-6, "max_ulp": 1e-6, "nmse": 1e-20}
_KL_FLOOR = 1e-6


@dataclass(frozen=True)
class Change:
    """One check, or one perplexity, in the baseline and in the run."""

    key: str
    op: str
    """The operator, or "perplexity", "faults", "kernels"."""
    status: Status
    before: Entry | None
    """What the baseline says; None where the check is new."""
    after: Entry | None
    """What the run says; None where the check vanished or was not run."""
    message: str
    """What moved, with the numbers; empty when the same."""


@dataclass(frozen=True)
class Judged:
    """What the judges of a run said, where one side is a run."""

    wrong: Mapping[str, str] = field(default_factory=dict)
    """By the key of a check, a perplexity or a fault that failed: why."""
    filtered: bool = False
    """The run was narrowed on purpose: what it lacks was not asked for."""
    perplexity_left_out: bool = False


def between(before: Baseline, after: Baseline, judged: Judged | None = None) -> tuple[Change, ...]:
    """Everything that two baselines hold, by operator and key; across device classes bit for bit."""
    judged = judged or Judged()
    cross = before.device_class != after.device_class
    asked = partial(_one_sided, left_out=judged.filtered)
    found = _section("", before.checks, after.checks, judged, partial(_check_status, cross=cross), asked)
    read = partial(_one_sided, left_out=judged.filtered or judged.perplexity_left_out)
    on_one = _on_one_class if cross else read
    found += _section("perplexity", before.perplexity, after.perplexity, judged, _perplexity_status, on_one)
    found += _tolerances(before, after)
    if before.faults and after.faults and not cross:  # before 0.5 none were kept, and a narrowed run plants none
        found += _section("faults", before.faults, after.faults, judged, _fault_status, asked)
    if before.kernels and after.kernels and not cross:  # nor these; the host has no registers to count
        found += _section("kernels", before.kernels, after.kernels, Judged(), _kernel_status, _one_sided)
    return tuple(sorted(found, key=lambda change: (change.op, change.key)))


def _section(
    op: str,
    before: Mapping[str, Entry],
    after: Mapping[str, Entry],
    judged: Judged,
    both: Callable[[Entry, Entry], Finding],
    one: Callable[[Entry | None], Finding],
) -> list[Change]:
    """A change for every row: what its judge said, `both` where both sides have it, else `one` of the baseline's."""
    changes = []
    for name in before.keys() | after.keys():
        old, new = before.get(name), after.get(name)
        found: Finding
        if name in judged.wrong:
            found = "failed", judged.wrong[name]
        else:
            found = one(old) if old is None or new is None else both(old, new)
        changes.append(Change(name, op or str((old or new or {})["op"]), found[0], old, new, found[1]))
    return changes


def _tolerances(before: Baseline, after: Baseline) -> list[Change]:
    """A line of its own for every tolerance that is not what it was, whatever the verdicts say."""
    changes = []
    for op in sorted(before.tolerances.keys() & after.tolerances.keys()):
        old, new = before.tolerances[op], after.tolerances[op]
        moved = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if moved:
            what = "; ".join(f"{name}: {old.get(name, 'none')} -> {new.get(name, 'none')}" for name in moved)
            message = f"tolerance of {op} changed: {what}"
            changes.append(Change(f"{op} tolerance", op, "drifted", old, new, message))
    return changes


def _one_sided(before: Entry | None, *, left_out: bool = False) -> Finding:
    """The status of what only one side has. left_out: the run was narrowed on purpose."""
    if before is None:
        return "new", "not in the baseline"
    if left_out:
        return "not run", "left out of this run on request"
    return "vanished", "in the baseline only"


def _on_one_class(_before: Entry | None) -> Finding:
    return "not run", "measured on one of the two device classes only"


def _check_status(before: Entry, after: Entry, *, cross: bool) -> Finding:
    """The status of a right check that is on both sides, and the sentence that explains it."""
    if before["inputs"] != after["inputs"]:
        other = f"other inputs ({before['inputs']} -> {after['inputs']}), so the bits cannot be compared"
        return ("failed" if cross else "drifted"), other
    known = [name for name in _NUMBERS if name in before and name in after]  # before 0.5 there were three
    moved = [name for name in known if _moved(name, _number(before, name), _number(after, name))]
    numbers = ", ".join(f"{name} {before[name]:g} -> {after[name]:g}" for name in moved) or "error as before"
    if before["digest"] == after["digest"] and before["elements"] == after["elements"]:
        if cross or not moved:
            return "same", ""
        return "drifted", f"the same bits, judged otherwise (reference or tolerance changed): {numbers}"
    what = f"other bits ({before['digest']} -> {after['digest']})"
    if before["digest"] == after["digest"]:
        what = f"the same outputs, another part of them judged ({before['elements']} -> {after['elements']} elements)"
    bits = f"{what}, {numbers}"
    if cross:
        return "failed", f"{bits}; two device classes must agree bit for bit"
    if moved and all(_number(after, name) <= _number(before, name) for name in known):
        return "better", bits
    return "drifted", f"{bits}; every element within its gate"


def _moved(name: str, before: float, after: float) -> bool:
    """True where the number differs by more than the jitter of a float64 reference on another machine."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return str(before) != str(after)
    return abs(after - before) > _FLOOR[name] + _RELATIVE * abs(before)


def _perplexity_status(before: Entry, after: Entry) -> Finding:
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
    old_kl, new_kl = (float(str(entry.get("kl", 0))) for entry in (before, after))
    if min(old_kl, new_kl) > 0 and abs(new_kl - old_kl) > _KL_FLOOR and max(old_kl / new_kl, new_kl / old_kl) > KL:
        return (
            "drifted",
            f"KL {old_kl:g} -> {new_kl:g} nats (a factor of {KL:g} allowed); perplexity {old:g} -> {new:g}",
        )
    if abs(nats) <= NATS:
        return "same", ""
    return "drifted", f"perplexity {old:g} -> {new:g} ({nats:+.2e} nats per token, {NATS:g} allowed)"


def _fault_status(before: Entry, after: Entry) -> Finding:
    if before["caught"] != after["caught"]:
        return ("better", "caught now") if after["caught"] else ("failed", "caught before, not now")
    if before.get("detector") != after.get("detector"):
        return "drifted", f"caught by {after.get('detector')} and no longer by {before.get('detector')}"
    return "same", ""


def _kernel_status(before: Entry, after: Entry) -> Finding:
    """Drift where a kernel takes more of anything, better where it takes less and nothing more."""
    moved = [column for column in sorted(before.keys() & after.keys()) if before[column] != after[column]]
    grown = any(_number(after, column) > _number(before, column) for column in moved)
    message = ", ".join(f"{column} {before[column]} -> {after[column]}" for column in moved)
    return ("drifted" if grown else "better" if moved else "same"), message


def _number(entry: Entry, name: str) -> float:
    value = entry[name]
    if not isinstance(value, int | float):
        raise UserError(f"the baseline's {name} is '{value}', which is no number")
    return float(value)
