"""Planted faults: real bugs of other projects, as data, applied to the kernel text or to the layouts before a run.

A suite that stays green on one of these proves nothing. Each names the project it was seen in, what to change, the
operator whose cases must fail, and the check that must notice first.
"""

from __future__ import annotations

import inspect
import json
import textwrap
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import CodeType
from typing import Any
from unittest import mock

from mxharness import mxfp4
from mxharness.device import Device, open_device
from mxharness.device.source import shipped
from mxharness.errors import UserError
from mxharness.faults.detectors import (
    CHECKED,
    CHECKED_CASES,
    DETECTORS,
    OF_AN_EXECUTION,
    Finding,
    Search,
    agreed_on,
    search,
    search_all,
    spent,
)
from mxharness.faults.planted import FAULTS
from mxharness.faults.planted.fault import Fault, FunctionChange, KernelChange
from mxharness.op import Case, Op
from mxharness.ops import cheapest, find
from mxharness.sandbox import Lost, Sandbox, spread
from mxharness.wording import closest

Matrix = dict[str, tuple[str, ...]]
"""Fault name -> the detectors that see it."""
LIMIT = 900.0
"""Seconds after which a fault's process counts as hung; a kernel that hangs has a limit of its own."""


@dataclass(frozen=True)
class FaultResult:
    """What the harness made of one planted fault."""

    name: str
    caught: bool
    detector: str
    """The check that failed first; empty when none did."""
    expected_detector: str
    seen_in: str
    symptom: str
    message: str
    """Of the failing check."""
    checks: int
    """Run until one failed."""
    seconds: float
    device: str
    """Class of the device it was planted on."""


def select(names: Sequence[str] | None) -> tuple[Fault, ...]:
    """The faults called `names`, all of them for None; UserError for another name."""
    if names is None:
        return FAULTS
    known = {fault.name: fault for fault in FAULTS}
    for name in names:
        if name not in known:
            near = " or ".join(closest(name, known))
            hint = f"there is {near}; " if near else ""
            raise UserError(f"no fault '{name}'; {hint}`mxharness faults --list` lists all {len(known)}")
    return tuple(known[name] for name in names)


@contextmanager
def planted(fault: Fault, device_name: str) -> Iterator[Device]:
    """A device whose kernels have the fault, or the healthy device while the layouts or a function have it."""
    sources = shipped()
    with ExitStack() as stack:
        for change in (fault.change, *((fault.also,) if fault.also else ())):
            if isinstance(change, KernelChange):
                sources = sources.replaced(change.file, change.old, change.new)
            elif isinstance(change, FunctionChange):
                stack.enter_context(_function(change))
            else:
                field: dict[str, Any] = {change.field: change.value}
                broken = replace(mxfp4.LAYOUTS[change.layout], **field)
                stack.enter_context(mock.patch.dict(mxfp4.LAYOUTS, {change.layout: broken}))
        yield open_device(device_name, sources=sources)


@contextmanager
def _function(change: FunctionChange) -> Iterator[None]:
    """The function has the change, wherever it was imported to."""
    function = getattr(import_module(change.module), change.function)
    healthy, function.__code__ = function.__code__, _changed(function, change)
    try:
        yield
    finally:
        function.__code__ = healthy


def _changed(function: Any, change: FunctionChange) -> CodeType:  # noqa: ANN401  any function of the package
    """The code of the function with the change in its text."""
    text = textwrap.dedent(inspect.getsource(function))
    if text.count(change.old) != 1:
        where = f"{change.module}.{change.function}"
        raise UserError(f"the text to replace occurs {text.count(change.old)} times in {where}, it must occur once")
    namespace: dict[str, Any] = {}
    future = "from __future__ import annotations\n"
    exec(compile(future + text.replace(change.old, change.new), change.module, "exec"), function.__globals__, namespace)  # noqa: S102  our own text
    code: CodeType = namespace[change.function].__code__
    return code


def seek(fault: Fault, device_name: str) -> Search:
    """Plant one fault in this process and run the operator's checks until one fails.

    A case that has the healthy kernel's bits is not judged: it passes. While the layouts or a function have the fault,
    there is no healthy one to compare with. A fault that only a checked run shows is not seen before it, and what
    executes cases once more tries a few.
    """
    kernels_alone = isinstance(fault.change, KernelChange) and isinstance(fault.also, KernelChange | None)
    agreed = agreed_on(device_name) if kernels_alone else None
    with planted(fault, device_name) as device:
        cases = [(find(fault.op), case) for case in find(fault.op).cases]
        return search(cases, device, agreed=agreed, again=CHECKED_CASES if fault.detector in CHECKED else None)


def seek_all(fault: Fault, device_name: str) -> tuple[str, ...]:
    """Plant one fault in this process and try every detector: the names of those that see it."""
    with planted(fault, device_name) as device:
        seen = search_all([(find(fault.op), case) for case in find(fault.op).cases], device)
    return tuple(name for name in DETECTORS if name in seen)


def where(fault: Fault, device_name: str) -> str:
    """The device that a fault is planted on."""
    return "host" if fault.undefined else device_name


def run_fault(fault: Fault, device_name: str, sandbox: Sandbox | None = None) -> FaultResult:
    """Plant one fault in a process of its own, where it may crash or hang; the healthy kernel must pass that case.

    sandbox: the process to use; by default one that is kept for all faults.
    """
    started = time.monotonic()
    sandbox = sandbox or _sandbox()
    device_name = where(fault, device_name)
    healthy = open_device(device_name)
    try:
        found = sandbox.call(seek, fault, device_name)
    except Lost as lost:
        found = Search(None if lost.hung else Finding("crash", None, str(lost)), 1)  # silence is no evidence
    finding = found.finding
    if finding and spent({finding.detector}, healthy.name):
        sandbox.close()
    detector, message = (finding.detector, finding.message) if finding else ("", "")
    if finding and (failing := _failing(find(fault.op), finding.case, healthy, finding.detector)):
        detector, message = "", f"without the fault the same case fails too, which proves nothing: {failing}"
    return FaultResult(
        name=fault.name,
        caught=bool(detector),
        detector=detector,
        expected_detector=(fault.on_gpu if healthy.name == "cuda" else "") or fault.detector,
        seen_in=fault.seen_in,
        symptom=fault.symptom,
        message=message,
        checks=found.checks,
        seconds=round(time.monotonic() - started, 3),
        device=healthy.device_class,
    )


@cache
def _sandbox() -> Sandbox:
    return Sandbox(LIMIT)


def _failing(op: Op, case: Case | None, device: Device, detector: str) -> str:
    """What a healthy kernel fails with in a case, the cheapest where it is not known; empty when it passes."""
    case = case or cheapest(op, 1)[0]
    only = OF_AN_EXECUTION if detector in OF_AN_EXECUTION else DETECTORS
    finding = search([(op, case)], device, only).finding
    return finding.message if finding else ""


def run_faults(device_name: str = "auto", names: Sequence[str] | None = None) -> list[FaultResult]:
    """Plant each fault in turn, all of FAULTS or those named. UserError for a name that does not exist."""
    return [run_fault(fault, device_name) for fault in select(names)]


def matrix(device_name: str = "auto", names: Sequence[str] | None = None, processes: int = 1) -> Matrix:
    """Every detector tried on every fault: fault name -> the detectors that see it."""
    device_name = open_device(device_name).name
    tasks = [(fault, where(fault, device_name)) for fault in select(names)]
    rows: Matrix = {}
    for (fault, _), seen in spread(_row, tasks, processes, LIMIT, lambda seen: spent(seen, device_name)):
        rows[fault.name] = (() if seen.hung else ("crash",)) if isinstance(seen, Lost) else seen
    return dict(sorted(rows.items()))


def _row(task: tuple[Fault, str]) -> tuple[str, ...]:
    return seek_all(*task)


def alone(rows: Matrix, without: Collection[str] = ()) -> dict[str, tuple[str, ...]]:
    """For each detector the faults that no other one sees; `without`: detectors that are not there at all."""
    left = {name: set(seen) - set(without) for name, seen in rows.items()}
    return {
        detector: tuple(name for name, seen in left.items() if seen == {detector})
        for detector in DETECTORS
        if detector not in without
    }


def matrix_text(rows: Matrix, device_class: str) -> str:
    """The table as committed: JSON, sorted, one fault a line."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(list(seen))}" for name, seen in sorted(rows.items()))
    return f'{{"device": {json.dumps(device_class)}, "faults": {{\n{lines}\n}}}}\n'


def read_matrix(path: Path) -> Matrix:
    """A table that `matrix_text` wrote. UserError for what is none."""
    try:
        return {name: tuple(seen) for name, seen in json.loads(path.read_text())["faults"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"no table of faults: {path}; `mxharness faults --matrix --out FILE` writes one") from error
