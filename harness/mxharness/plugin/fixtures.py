"""The fixtures that suites use: the device, checks, random cases, bare outputs, planted faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from mxharness.plugin.options import device_of, failures_of, is_check
from mxharness.progress import counting
from mxharness.repeat import of_fault

if TYPE_CHECKING:
    from mxharness.device import Device
    from mxharness.faults import FaultResult
    from mxharness.faults.planted.fault import Fault
    from mxharness.op import Case, Gate, Op, Outcome, Tensors

    Check = Callable[[Op, Case, Gate], Outcome]


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> Device:
    """Where kernels run."""
    return device_of(pytestconfig)


@pytest.fixture
def check(device: Device, request: pytest.FixtureRequest) -> Check:
    """Run a case, judge it, record the verdict, and fail with the judge's message."""
    from hypothesis import reject

    from mxharness import facts, repro
    from mxharness.execution import execute
    from mxharness.judge import gates, judge

    recorded = is_check(request.node)

    def run(op: Op, case: Case, gate: Gate) -> Outcome:
        __tracebackhide__ = True
        if gate not in gates(op, case, facts.find(device.device_class)):
            reason = facts.lacking(device.device_class)
            request.node.user_properties.append(("beyond", {"why": reason}))
            pytest.skip(reason)
        inputs = op.make_inputs(case)
        execution = execute(op, case, device, inputs)
        outcome = judge(op, case, gate, device.device_class, inputs, execution, device)
        if not outcome.passed and (recorded or not outcome.refused):  # of a random case the last, smallest one stays
            name = f"{case}-{gate}" if recorded else request.node.nodeid
            place = failures_of(request.config)
            outcome = repro.keep(place, name, op, case, gate, device, inputs, execution.outputs, outcome)
        if recorded:
            request.node.user_properties.append(("outcome", asdict(outcome)))
        if outcome.refused and not recorded:  # a random case without evidence; Hypothesis fails where most are so
            reject()
        if not outcome.passed:
            raise AssertionError(outcome.message)
        return outcome

    return run


@pytest.fixture
def random_check(device: Device, request: pytest.FixtureRequest) -> Iterator[Callable[[Op, Case], None]]:
    """Run a random case once, judge it under every gate, and count it; for tests that Hypothesis draws for."""
    from hypothesis import reject

    from mxharness import facts, repro
    from mxharness.execution import execute
    from mxharness.fuzz import Tally
    from mxharness.judge import gates, judge

    tally = Tally(request.node, device.name)

    def run(op: Op, case: Case) -> None:
        __tracebackhide__ = True
        inputs = op.make_inputs(case)
        execution = execute(op, case, device, inputs)
        known = gates(op, case, facts.find(device.device_class))
        outcomes = [judge(op, case, gate, device.device_class, inputs, execution, device) for gate in known]
        wrong = next((one for one in outcomes if not one.passed and not one.refused), None)
        if wrong:  # while Hypothesis shrinks, each overwrites the one before; the smallest is run last
            place = failures_of(request.config), request.node.nodeid
            kept = repro.keep(*place, op, case, wrong.gate, device, inputs, execution.outputs, wrong)
            raise AssertionError(kept.message)
        refused = any(one.refused for one in outcomes)
        tally.add(outcomes, refused=refused)
        advance(1)
        if refused:  # without evidence; Hypothesis fails where most are so, and so does the run
            reject()

    with counting("random cases", tally.planned) as advance:
        yield run


@pytest.fixture
def outputs(device: Device) -> Callable[..., Tensors]:
    """Run a case on given inputs and return its outputs; fails for a kernel that leaves none or writes elsewhere."""
    from mxharness.execution import execute

    def run(op: Op, case: Case, inputs: Tensors, *, poison: int = 0xFF) -> Tensors:
        __tracebackhide__ = True
        execution = execute(op, case, device, inputs, poison=poison)
        if execution.violations or not execution.outputs:
            raise AssertionError(f"{case}: {'; '.join(execution.violations) or 'no output'}: {case!r}")
        return execution.outputs

    return run


@pytest.fixture
def plant(device: Device, request: pytest.FixtureRequest) -> Callable[[Fault], FaultResult]:
    """Plant a fault, run its operator's checks until one fails, and record what became of it."""
    from mxharness.faults import run_fault

    def run(fault: Fault) -> FaultResult:
        result = run_fault(fault, device.name)
        row = {**asdict(result), "command": of_fault(result.device, fault.name)}
        request.node.user_properties.append(("fault", row))
        return result

    return run
