"""Every way in which the harness can notice that a kernel is wrong, tried on a device whose kernels may be broken.

The order is the one of a run: what an execution leaves behind and the gates over all cases first, then the detectors
that execute the cases again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from mxharness import facts
from mxharness.device import Device, open_device
from mxharness.device.host import HostDevice
from mxharness.errors import Hung, KernelFailure, UserError
from mxharness.execution import Execution, execute
from mxharness.faults.invariance import Run, differs_alone, differs_between_runs
from mxharness.faults.launched import launched
from mxharness.judge import digest, gates, judge
from mxharness.op import GATES, Case, Gate, Op, Tensors
from mxharness.ops import costs, find

OF_AN_EXECUTION = ("crash", "contract", "memory", *GATES)
"""crash: no outputs, or the process died. contract: outputs that no kernel made, or of another name, shape or dtype,
or arguments that the operator itself refuses. memory: writes and reads outside, inputs changed. And the gates."""
_BREAKING = frozenset({"crash", "memory"})
CHECKED = {"race": "racecheck", "uninitialised": "initcheck", "undefined": "undefined"}
"""Detectors that run the kernels with a check before every access, on the host device, and what the check is called."""
CHECKED_CASES = 6
"""Cases of an operator that these run: they take long."""
CHECKED_ROWS = 512
CHECKED_SECONDS = 300.0
"""For one of their launches."""
DETECTORS = (*OF_AN_EXECUTION, "repeatability", "invariance", *CHECKED)
"""All, in the order of a search."""

Agreed = Callable[[Op, Case], str]
"""The digest of the healthy kernel's outputs, which pass every gate."""


@cache
def agreed_on(device_name: str) -> Agreed:
    """What the kernels in kernels/ give on a device; a case is executed once in a process."""
    device = open_device(device_name)

    @cache
    def of(op_name: str, case: Case) -> str:
        op = find(op_name)
        return digest(execute(op, case, device, op.make_inputs(case)).outputs)

    return lambda op, case: of(op.name, case)


@dataclass(frozen=True)
class Finding:
    """One detector saw something."""

    detector: str
    case: Case | None
    """None where the process died before it could say."""
    message: str


@dataclass(frozen=True)
class Search:
    """What became of it."""

    finding: Finding | None
    checks: int
    """Run until something was found."""


def spent(seen: Collection[str], device_name: str) -> bool:
    """Whether a process in which these detectors saw something may be broken: an error on a GPU stays with its process.

    The host device ends a launch that goes wrong and its process lives on.
    """
    return device_name == "cuda" and not _BREAKING.isdisjoint(seen)


def cheapest_first(ops: Iterable[Op]) -> list[tuple[Op, Case]]:
    """All cases of the operators, in the order that answers soonest."""
    return sorted(((op, case) for op in ops for case in op.cases), key=_cost)


def _cost(pair: tuple[Op, Case]) -> int:
    op, case = pair
    return costs(op)[case]


def search(
    cases: Sequence[tuple[Op, Case]],
    device: Device,
    only: Sequence[str] = DETECTORS,
    agreed: Agreed | None = None,
    again: int | None = None,
    *,
    told: bool = True,
) -> Search:
    """Run detectors until one sees something.

    agreed: where the outputs are the healthy kernel's bit for bit, the gates are known to pass and are not run.
    again: how many cases of an operator are executed once more by the detectors that do; None: all.
    told: whether a message says where the elements are wrong and what would explain it.
    """
    checks = 0
    for op, case in cases:
        for finding in _of_an_execution(op, case, device, only, agreed, told=told):
            checks += 1
            if finding is not None:
                return Search(finding, checks)
    for name in only:
        for op, case in _chosen(name, cases, again) if name not in OF_AN_EXECUTION else ():
            checks += 1
            if finding := _again(name, op, case, device, strict=True):
                return Search(finding, checks)
    return Search(None, checks)


def _some(cases: Sequence[tuple[Op, Case]], count: int | None) -> list[tuple[Op, Case]]:
    """`count` cases of every operator, evenly from the cheapest on; all for None."""
    if count is None:
        return list(cases)
    groups: dict[str, list[tuple[Op, Case]]] = {}
    for op, case in sorted(cases, key=_cost):
        groups.setdefault(op.name, []).append((op, case))
    kept = []
    for group in groups.values():
        taken = min(count, len(group))
        kept += [group[i * len(group) // taken] for i in range(taken)]
    return kept


def _chosen(name: str, cases: Sequence[tuple[Op, Case]], again: int | None) -> list[tuple[Op, Case]]:
    """The cases of a detector that executes them once more; the checked ones do not have thousands of rows.

    Those are few, and the cheapest of all that launch from a file of kernels which the few do not reach.
    """
    if name not in CHECKED:
        return _some(cases, again)
    short = [(op, case) for op, case in cases if case.shape[0] <= CHECKED_ROWS]
    chosen = _some(short, CHECKED_CASES)
    reached = {(op.name, file) for op, case in chosen for file in launched(op.name, case, "host")}
    for op, case in sorted(short, key=_cost):
        files = {(op.name, file) for file in launched(op.name, case, "host")}
        if not files <= reached:
            chosen.append((op, case))
            reached |= files
    return chosen


def search_all(cases: Sequence[tuple[Op, Case]], device: Device) -> dict[str, Finding]:
    """What each detector sees, by its name: every one of them is tried on every case until it sees something.

    On a GPU nothing is tried after a crash, which leaves no context, or a kernel that runs on and on, to try it in.
    """
    found: dict[str, Finding] = {}
    for op, case in cases:
        left = [name for name in OF_AN_EXECUTION if name not in found]
        for finding in _of_an_execution(op, case, device, left, None, told=True):
            if finding is not None:
                found.setdefault(finding.detector, finding)
        if "crash" in found and device.name == "cuda":
            return found
    for name in (*_AGAIN, *CHECKED):
        for op, case in _chosen(name, cases, None):
            if finding := _again(name, op, case, device, strict=False):
                found[name] = finding
                break
    return found


def _of_an_execution(
    op: Op, case: Case, device: Device, only: Sequence[str], agreed: Agreed | None, *, told: bool
) -> Iterator[Finding | None]:
    """One entry a check: what it found, or None."""
    try:
        inputs = op.make_inputs(case)
        execution = execute(op, case, device, inputs)
        problem = "memory" if execution.memory else "crash" if not execution.outputs else ""
        if problem:
            yield Finding(problem, case, f"{op.name} {case}: {'; '.join(execution.violations)}; {case!r}")
        if not execution.outputs:
            return
        if agreed is not None and not problem and digest(execution.outputs) == agreed(op, case):
            yield None
            return
        clean = replace(execution, violations=(), memory=False)
        for gate in gates(op, case, facts.find(device.device_class)):
            if gate in only:
                yield _judged(op, case, gate, device, inputs, clean, told=told)
    except (AssertionError, UserError, RuntimeError, IndexError, ValueError) as error:
        if "contract" in only:
            yield Finding("contract", case, f"{op.name} {case}: {error}; {case!r}")


def _judged(
    op: Op, case: Case, gate: Gate, device: Device, inputs: Tensors, execution: Execution, *, told: bool
) -> Finding | None:
    outcome = judge(op, case, gate, device.device_class, inputs, execution, device if told else None)
    return None if outcome.passed else Finding(gate, case, outcome.message)


def _again(name: str, op: Op, case: Case, device: Device, *, strict: bool) -> Finding | None:
    """What the detector sees. strict: an execution that fails counts, which those of a single one may have told.

    An execution that only takes too long is no evidence: it did end when it was run alone.
    """
    try:
        if name in CHECKED:
            message = _checked(CHECKED[name], op, case, device)
        else:
            message = _AGAIN[name](op, case, _run_on(device))
    except Hung:
        return None
    except (KernelFailure, AssertionError, UserError, RuntimeError, IndexError, ValueError) as error:
        message = f"{op.name} {case}: executed again: {error}; {case!r}" if strict else ""
    return Finding(name, case, message) if message else None


def _checked(check: str, op: Op, case: Case, device: Device) -> str:
    """What a checked run of the case ends with, where an ordinary one ends well.

    Nothing on a GPU, whose tools run beside the process.
    """
    inputs = op.make_inputs(case)
    if not isinstance(device, HostDevice) or execute(op, case, device, inputs).violations:
        return ""
    execution = execute(op, case, device.configured(checks=frozenset({check}), seconds=CHECKED_SECONDS), inputs)
    if execution.hung:
        raise Hung(execution.violations[0])
    return f"{op.name} {case}: {'; '.join(execution.violations)}; {case!r}" if execution.violations else ""


def _run_on(device: Device) -> Run:
    def run(op: Op, case: Case, inputs: Tensors, *, poison: int = 0xFF) -> Tensors:
        execution = execute(op, case, device, inputs, poison=poison)
        if execution.violations or not execution.outputs:
            kind = Hung if execution.hung else KernelFailure
            raise kind("; ".join(execution.violations))
        return execution.outputs

    return run


def _alone(op: Op, case: Case, run: Run) -> str:
    return differs_alone(op, case, run)[0]


_AGAIN: Mapping[str, Callable[[Op, Case, Run], str]] = {
    "repeatability": differs_between_runs,
    "invariance": _alone,
}
