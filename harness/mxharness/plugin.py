"""The pytest plugin: options, the device, the one `check` fixture, and a record of what ran.

A run that executed fewer checks than it selected fails, whatever pytest would have said.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest

from mxharness.errors import UserError
from mxharness.session import Session

if TYPE_CHECKING:
    from mxharness.device import Device
    from mxharness.faults import FaultResult
    from mxharness.op import Case, Gate, Op, Outcome, Tensors
    from mxharness.planted.fault import Fault

    Check = Callable[[Op, Case, Gate], Outcome]

OUT = "mxharness-out"
"""The folder in the working directory that results go to where none is named."""
QUICK = 4
"""--quick keeps one check in this many."""


_SESSION = pytest.StashKey[Session]()
_DEVICE = pytest.StashKey["Device"]()
_RAN = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--device, --op, --quick, --report, --failures."""
    group = parser.getgroup("mxharness", "MXFP4 kernels")
    group.addoption("--device", default="auto", help="where kernels run: auto, host or cuda (default: auto)")
    only = "only this operator, or all of FILE.cu; repeatable"
    group.addoption("--op", action="append", default=[], metavar="NAME", help=only)
    group.addoption("--quick", action="store_true", help=f"one check in {QUICK} of every operator and gate")
    group.addoption("--report", metavar="DIR", help="write run.json, the record of this run, into DIR")
    kept = "save what fails below DIR (default: failures in --report's folder, or in mxharness-out)"
    group.addoption("--failures", metavar="DIR", help=kept)


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a device or operator that does not exist before anything runs."""
    from hypothesis import HealthCheck, settings

    from mxharness.ops import select

    if _is_worker(config):
        import torch

        torch.set_num_threads(1)  # the workers share the cores
    config.addinivalue_line("markers", "gates(*names): run once for every (op, case, gate) under one of these gates")
    config.stash[_SESSION] = Session()
    if not _is_worker(config):
        config.pluginmanager.register(config.stash[_SESSION], "mxharness-session")
    settings.register_profile(
        "ci",
        derandomize=True,
        max_examples=40,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settings.register_profile("nightly", settings.get_profile("ci"), derandomize=False, max_examples=1000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
    try:
        for name in config.getoption("--op"):
            select(name)
        if config.getoption("--device") != "auto":
            _device(config)
    except UserError as error:
        raise pytest.UsageError(str(error)) from error


def _device(config: pytest.Config) -> Device:
    from mxharness.device import open_device

    if _DEVICE not in config.stash:
        config.stash[_DEVICE] = open_device(config.getoption("--device"))
    return config.stash[_DEVICE]


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workeroutput")


def pytest_report_header(config: pytest.Config) -> str:
    """Where kernels run, and which ones."""
    from mxharness.device.source import shipped

    try:
        device = _device(config)
    except UserError as error:
        raise pytest.UsageError(str(error)) from error
    hashes = " ".join(f"{name} {shipped().digest(name)[:8]}" for name in shipped().names())
    return f"mxharness: {device.device_class} ({device.arithmetic} arithmetic); kernels {hashes}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise over operators: `op` alone, or (op, case, gate) under the gates that a mark `gates` names."""
    from mxharness.judge import gates
    from mxharness.op import Gate
    from mxharness.ops import OPS

    mark = metafunc.definition.get_closest_marker("gates")
    if mark is not None:
        unknown = set(mark.args) - set(get_args(Gate))
        if unknown or not mark.args:
            raise pytest.UsageError(
                f"{metafunc.definition.nodeid}: no gate {', '.join(sorted(unknown)) or 'named'}; there are "
                f"{', '.join(get_args(Gate))}"
            )
        checks = [
            pytest.param(op, case, gate, id=f"{case}-{gate}")
            for op in OPS
            for case in op.cases
            for gate in gates(op, case)
            if gate in mark.args
        ]
        metafunc.parametrize(("op", "case", "gate"), checks)
    elif "op" in metafunc.fixturenames:
        metafunc.parametrize("op", OPS, ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Apply --op and --quick to everything that is parametrised over operators."""
    from mxharness.ops import select

    wanted = {op.name for name in config.getoption("--op") for op in select(name)}
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    seen: Counter[tuple[str, str]] = Counter()  # by operator and gate, so that --quick leaves none out
    for item in items:
        op = _parameter(item, "op")
        drop = bool(wanted) and str(op) not in wanted
        if not drop and _is_check(item) and config.getoption("--quick"):
            group = (str(op), str(_parameter(item, "gate")))
            drop = seen[group] % QUICK != 0
            seen[group] += 1
        (dropped if drop else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def _parameter(item: pytest.Item, name: str) -> object:
    """What a parametrised test got for `name`, None where it has no such parameter."""
    return item.callspec.params.get(name) if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None


def _is_check(item: pytest.Item) -> bool:
    """Whether the item is one (operator, case, gate), which must leave an Outcome."""
    return None not in {_parameter(item, "op"), _parameter(item, "case"), _parameter(item, "gate")}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note what must be executed; a worker passes it on."""
    selected = {f"{_parameter(item, 'case')} {_parameter(item, 'gate')}" for item in session.items if _is_check(item)}
    session.config.stash[_SESSION].selected = selected
    if _is_worker(session.config):
        session.config.workeroutput["selected"] = sorted(selected)  # type: ignore[attr-defined]  # xdist adds it


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:  # noqa: ANN401  xdist's WorkerController, which has no stubs
    """Take over what a worker selected: all workers collect the same."""
    node.config.stash[_SESSION].selected |= set(getattr(node, "workeroutput", {}).get("selected", ()))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> Device:
    """Where kernels run."""
    return _device(pytestconfig)


@pytest.fixture
def check(device: Device, request: pytest.FixtureRequest) -> Check:
    """Run a case, judge it, record the verdict, and fail with the judge's message."""
    from hypothesis import reject

    from mxharness import repro
    from mxharness.execution import execute
    from mxharness.judge import judge

    config = request.config
    failures = Path(config.getoption("--failures") or Path(config.getoption("--report") or OUT) / repro.FOLDER)
    recorded = _is_check(request.node)

    def run(op: Op, case: Case, gate: Gate) -> Outcome:
        __tracebackhide__ = True
        inputs = op.make_inputs(case)
        execution = execute(op, case, device, inputs)
        outcome = judge(op, case, gate, device.device_class, inputs, execution)
        if not outcome.passed and (recorded or not outcome.refused):  # of a random case the last, smallest one stays
            name = f"{case}-{gate}" if recorded else request.node.nodeid
            outcome = repro.keep(failures, name, op, case, gate, device, inputs, execution.outputs, outcome)
        if recorded:
            request.node.user_properties.append(("outcome", asdict(outcome)))
        if outcome.refused and not recorded:  # a random case without evidence; Hypothesis fails where most are so
            reject()
        if not outcome.passed:
            raise AssertionError(outcome.message)
        return outcome

    return run


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
        request.node.user_properties.append(("fault", asdict(result)))
        return result

    return run


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that executed less than it selected, and write the record."""
    config = session.config
    if _is_worker(config) or config.option.collectonly:
        return
    found = config.stash[_SESSION]
    if (found.failing or found.missing) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if config.getoption("--report") and session.exitstatus in _RAN:
        from mxharness import record

        command = " ".join(("pytest", *map(str, config.invocation_params.args)))
        filters = [f"--op {name}" for name in config.getoption("--op")]
        if config.getoption("--quick"):
            filters.append("--quick")
        path = Path(config.getoption("--report")) / "run.json"
        record.save(found.record(_device(config), command, tuple(filters)), path)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """What ran, what did not and why; first of all, checks that are missing."""
    found = config.stash[_SESSION]
    if not found.selected and not found.skipped:
        return
    terminalreporter.section("mxharness")
    if found.missing and exitstatus in _RAN:
        counts = f"{len(found.missing)} of {len(found.selected)}"
        terminalreporter.write_line(
            f"FAIL: {counts} selected checks did not execute, as {min(found.missing)}", red=True
        )
    for line in found.lines():
        terminalreporter.write_line(line)
