"""Planted faults: real bugs of other projects, as data, applied to the kernel text or to the layouts before a run.

A suite that stays green on one of these proves nothing. Each names the project it was seen in, what to change, the
operator whose cases must fail, and the check that must notice first.
"""

from __future__ import annotations

import inspect
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from types import CodeType
from typing import Any
from unittest import mock

from mxharness import mxfp4
from mxharness.device import Device, open_device
from mxharness.device.source import shipped
from mxharness.errors import UserError
from mxharness.execution import Execution, execute
from mxharness.judge import gates, judge
from mxharness.op import Case, Op
from mxharness.ops import find
from mxharness.planted import FAULTS
from mxharness.planted.fault import Fault, FunctionChange, KernelChange


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
    """The faults called `names`, all of them for None; UserError, listing what exists, for another name."""
    if names is None:
        return FAULTS
    known = {fault.name: fault for fault in FAULTS}
    for name in names:
        if name not in known:
            raise UserError(f"no fault '{name}'; there are {', '.join(known)}")
    return tuple(known[name] for name in names)


@contextmanager
def planted(fault: Fault, device_name: str) -> Iterator[Device]:
    """A device whose kernels have the fault, or the healthy device while the layouts have it."""
    change = fault.change
    if isinstance(change, KernelChange):
        yield open_device(device_name, sources=shipped().replaced(change.file, change.old, change.new))
        return
    if isinstance(change, FunctionChange):
        function = getattr(import_module(change.module), change.function)
        healthy, function.__code__ = function.__code__, _changed(function, change)  # wherever it was imported to
        try:
            yield open_device(device_name)
        finally:
            function.__code__ = healthy
        return
    field: dict[str, Any] = {change.field: change.value}
    broken = replace(mxfp4.LAYOUTS[change.layout], **field)
    with mock.patch.dict(mxfp4.LAYOUTS, {change.layout: broken}):
        yield open_device(device_name)


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


def run_fault(fault: Fault, device_name: str) -> FaultResult:
    """Plant one fault and run the operator's checks until one fails; the healthy kernel must pass that case."""
    started = time.monotonic()
    device_name = "host" if fault.undefined else device_name
    op = find(fault.op)
    count, detector, message = 0, "", ""
    with planted(fault, device_name) as device:
        for case in op.cases:
            inputs = op.make_inputs(case)
            execution = execute(op, case, device, inputs)
            for gate in gates(op, case):
                count += 1
                outcome = judge(op, case, gate, device.device_class, inputs, execution)
                if not outcome.passed:
                    detector, message = _detector(gate, execution), outcome.message
                    break
            if detector:
                break
    if detector and (failing := _failing(op, case, open_device(device_name))):
        detector, message = "", f"without the fault the same case fails too, which proves nothing: {failing}"
    return FaultResult(
        name=fault.name,
        caught=bool(detector),
        detector=detector,
        expected_detector=fault.detector,
        seen_in=fault.seen_in,
        symptom=fault.symptom,
        message=message,
        checks=count,
        seconds=round(time.monotonic() - started, 3),
        device=device.device_class,
    )


def _detector(gate: str, execution: Execution) -> str:
    if not execution.outputs:
        return "crash"
    return "memory" if execution.violations else gate


def _failing(op: Op, case: Case, device: Device) -> str:
    """The message of the first gate that the healthy kernel fails; empty when it passes all."""
    inputs = op.make_inputs(case)
    execution = execute(op, case, device, inputs)
    outcomes = [judge(op, case, gate, device.device_class, inputs, execution) for gate in gates(op, case)]
    return next((outcome.message for outcome in outcomes if not outcome.passed), "")


def run_faults(device_name: str = "auto", names: Sequence[str] | None = None) -> list[FaultResult]:
    """Plant each fault in turn, all of FAULTS or those named. UserError for a name that does not exist."""
    return [run_fault(fault, device_name) for fault in select(names)]
