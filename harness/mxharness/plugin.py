"""The pytest plugin: options, the device, the one `check` fixture, and a record of what ran.

A run that executed fewer checks than it selected fails, whatever pytest would have said.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest

from mxharness.errors import UserError

if TYPE_CHECKING:
    from mxharness.device import Device
    from mxharness.faults import Fault, FaultResult
    from mxharness.op import Case, Gate, Op, Outcome, Tensors
    from mxharness.record import RunRecord

    Check = Callable[[Op, Case, Gate], Outcome]

QUICK = 4
"""--quick keeps one check in this many."""


@dataclass
class Session:
    """What the controller knows about the run."""

    started: float = field(default_factory=time.time)
    selected: set[str] = field(default_factory=set)
    """Keys "case gate" of the checks that must leave a verdict."""
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The verdicts by the same key; of several on one check a failing one is kept."""
    passed: int = 0
    failed: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(test function, reason) -> how many of its cases."""
    faults: list[dict[str, Any]] = field(default_factory=list)
    device: Device | None = None


_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--device, --op, --quick, --report."""
    group = parser.getgroup("mxharness", "MXFP4 kernels")
    group.addoption("--device", default="auto", help="where kernels run: auto, host or cuda (default: auto)")
    group.addoption("--op", action="append", default=[], metavar="NAME", help="only this operator; repeatable")
    group.addoption("--quick", action="store_true", help=f"one check in {QUICK} of every operator and gate")
    group.addoption("--report", metavar="DIR", help="write run.json, the record of this run, into DIR")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a device or operator that does not exist before anything runs."""
    from hypothesis import HealthCheck, settings

    from mxharness.ops import find

    if _is_worker(config):
        import torch

        torch.set_num_threads(1)  # the workers share the cores
    config.addinivalue_line("markers", "gates(*names): run once for every (op, case, gate) under one of these gates")
    config.stash[_SESSION] = Session()
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
            find(name)
        if config.getoption("--device") != "auto":
            _device(config)
    except UserError as error:
        raise pytest.UsageError(str(error)) from error


def _device(config: pytest.Config) -> Device:
    from mxharness.device import open_device

    session = config.stash[_SESSION]
    if session.device is None:
        session.device = open_device(config.getoption("--device"))
    return session.device


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
    wanted = set(config.getoption("--op"))
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
    from mxharness.execution import execute
    from mxharness.judge import judge

    recorded = _is_check(request.node)

    def run(op: Op, case: Case, gate: Gate) -> Outcome:
        __tracebackhide__ = True
        inputs = op.make_inputs(case)
        outcome = judge(op, case, gate, device.device_class, inputs, execute(op, case, device, inputs))
        if recorded:
            request.node.user_properties.append(("outcome", asdict(outcome)))
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


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect verdicts; under xdist reports arrive at the controller."""
    session = _current
    if session is None:
        return
    called = report.when == "call"
    outcomes = [
        value for name, value in report.user_properties if called and name == "outcome" and isinstance(value, dict)
    ]
    for row in outcomes:
        key = f"{row['case']} {row['gate']}"
        if key not in session.outcomes or session.outcomes[key]["passed"]:
            session.outcomes[key] = row
    session.faults += [
        value for name, value in report.user_properties if called and name == "fault" and isinstance(value, dict)
    ]
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        session.skipped[report.nodeid.partition("[")[0], str(reason).removeprefix("Skipped: ")] += 1
    elif report.failed and all(row["passed"] for row in outcomes):
        session.failed += 1
        session.failures.append((report.nodeid, _reason(report)))
    elif report.passed and called and not outcomes:
        session.passed += 1


def _reason(report: pytest.TestReport) -> str:
    """What a test failed with, without the traceback."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longreprtext).strip()


_current: Session | None = None
"""The controller's session; the report hook gets no config."""


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remember the controller's session for the report hook."""
    global _current  # noqa: PLW0603  pytest_runtest_logreport receives neither session nor config
    _current = None if _is_worker(session.config) else session.config.stash[_SESSION]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that executed less than it selected, and write the record."""
    config = session.config
    if _is_worker(config) or config.option.collectonly:
        return
    mine = config.stash[_SESSION]
    failing = any(not row["passed"] for row in mine.outcomes.values())
    if (failing or mine.selected - set(mine.outcomes)) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if config.getoption("--report") and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        from mxharness import record

        record.save(_record(config, mine), Path(config.getoption("--report")) / "run.json")


def _record(config: pytest.Config, session: Session) -> RunRecord:
    from mxharness import environment
    from mxharness.device import cuda, host
    from mxharness.op import Outcome
    from mxharness.ops import OPS
    from mxharness.record import Failure, OtherTests, RunRecord, Skip

    device = _device(config)
    flags = host.FLAGS if device.name == "host" else cuda.FLAGS
    return RunRecord(
        device_class=device.device_class,
        arithmetic=device.arithmetic,
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(session.started)),
        seconds=time.time() - session.started,
        command=" ".join(("pytest", *map(str, config.invocation_params.args))),
        selected=len(session.selected),
        executed=len(session.outcomes),
        outcomes=tuple(Outcome(**{**row, "shape": tuple(row["shape"])}) for row in session.outcomes.values()),
        environment=environment.describe(device, flags=flags),
        axes={op.name: op.axes for op in OPS},
        filters=(
            *(f"--op {name}" for name in config.getoption("--op")),
            *(["--quick"] if config.getoption("--quick") else []),
        ),
        skipped=tuple(Skip(what, why, count=count) for (what, why), count in session.skipped.items()),
        faults=tuple(session.faults) or None,
        tests=OtherTests(
            passed=session.passed,
            failed=session.failed,
            failures=tuple(Failure(name, message) for name, message in session.failures),
        ),
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """Coverage by operator and gate, what did not happen and why, and missing checks."""
    session = config.stash[_SESSION]
    if not session.selected and not session.skipped:
        return
    terminalreporter.section("mxharness")
    missing = session.selected - set(session.outcomes)
    if missing and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        counts = f"{len(missing)} of {len(session.selected)}"
        terminalreporter.write_line(f"FAIL: {counts} selected checks did not execute, as {min(missing)}", red=True)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in session.outcomes.values():
        groups.setdefault((row["op"], row["gate"]), []).append(row)
    for (op, gate), rows in sorted(groups.items()):
        good = sum(row["passed"] for row in rows)
        elements = sum(row["elements"] for row in rows)
        worst = f", largest error {max(row['ratio'] for row in rows):.3g} of the bound" if gate == "bound" else ""
        terminalreporter.write_line(
            f"{op:10} {gate:17} {good:4} of {len(rows):4} checks, {elements:9,} elements{worst}"
        )
    for (what, why), count in session.skipped.items():
        terminalreporter.write_line(f"did not happen: {why} ({what}{f', {count} cases' if count > 1 else ''})")
