"""The pytest plugin: options, what is collected against the manifest, and a record of what ran.

A run that executed less than the manifest demands, or less than it selected, fails, whatever pytest would have said.
Its fixtures are in fixtures.py.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest

from mxharness.commands.running import DIARY, RECORD
from mxharness.errors import UserError
from mxharness.plugin import fixtures, known, options
from mxharness.plugin.options import device_of, parameter
from mxharness.plugin.session import Session

if TYPE_CHECKING:
    from mxharness.manifest import Manifest

_SESSION = pytest.StashKey[Session]()
_ENDED = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Take the fixtures and the known failures along."""
    for module in (fixtures, known):
        pluginmanager.register(module, module.__name__)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--device, --op, --quick, --fuzz, --shard, --report and others."""
    options.add(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a device, an operator or a shard that does not exist before anything runs."""
    if _is_worker(config):
        if gpu := config.workerinput.get("gpu"):  # type: ignore[attr-defined]  # xdist adds it
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before anything has started CUDA in this process
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # for torch in the processes that tests start
        import torch

        torch.set_num_threads(1)  # the workers share the cores
    config.addinivalue_line("markers", "gates(*names): run once for every (op, case, gate) under one of these gates")
    config.stash[_SESSION] = Session(shard=config.getoption("--shard"))
    if not _is_worker(config):
        config.pluginmanager.register(config.stash[_SESSION], "mxharness-session")
    config.stash[_SESSION].whole = options.whole(config) and not options.limits(config)
    try:
        options.settle(config)
        if config.getoption("--device") != "auto":
            device_of(config)
        config.stash[_SESSION].known = known.of(config)
    except UserError as error:
        raise pytest.UsageError(str(error)) from error


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workeroutput")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:  # noqa: ANN401  xdist's WorkerController, which has no stubs
    """Give each worker a GPU of its own where there are several."""
    gpus = _gpus(node.config)
    if len(gpus) > 1:
        node.workerinput["gpu"] = gpus[int(node.gateway.id.removeprefix("gw")) % len(gpus)]


def _gpus(config: pytest.Config) -> list[str]:
    """The GPUs that workers share, as CUDA_VISIBLE_DEVICES names them; none on the host device."""
    if device_of(config).name == "host":
        return []
    import torch

    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[: torch.cuda.device_count()] or [str(index) for index in range(torch.cuda.device_count())]


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Where kernels run, which ones, and which gates cannot judge that device."""
    from mxharness import facts
    from mxharness.device.source import shipped

    try:
        device = device_of(config)
        options.require(config, device.device_class)
    except UserError as error:
        raise pytest.UsageError(str(error)) from error
    hashes = " ".join(f"{name} {shipped().digest(name)[:8]}" for name in shipped().names())
    gpus = _gpus(config) if getattr(config.option, "numprocesses", None) else []
    shared = f", workers share GPUs {', '.join(gpus)}" if len(gpus) > 1 else ""
    where = f"mxharness: {device.device_class} ({device.arithmetic} arithmetic){shared}; kernels {hashes}"
    lacking = facts.lacking(device.device_class)
    return [where, f"mxharness: {lacking}"] if lacking else [where]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Leave a record that says the run did not end, for whoever looks after it was killed."""
    config = session.config
    if _is_worker(config) or config.option.collectonly or not config.getoption("--report"):
        return
    found = config.stash[_SESSION]
    _save(config, incomplete="the run did not end")
    found.diary = Path(config.getoption("--report")) / DIARY


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise over operators: `op` alone, or (op, case, gate) under the gates that a mark `gates` names."""
    from mxharness import fuzz
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
        if "random_check" in metafunc.fixturenames:
            option = metafunc.config.option
            metafunc.parametrize("part", fuzz.parts(option.fuzz, option.fuzz_seed), ids=str)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    """Hold what was collected against the manifest, then apply --op, --quick, pytest's own filters and --shard."""
    from mxharness import manifest
    from mxharness.ops import select

    _hold(config, [item.nodeid for item in items])
    wanted = {op.name for name in config.getoption("--op") for op in select(name)}
    seen: Counter[tuple[str, str]] = Counter()  # by operator and gate, so that --quick leaves none out

    def keep(item: pytest.Item) -> bool:
        op = str(parameter(item, "op"))
        if wanted and op not in wanted:
            return False
        gate = parameter(item, "gate")
        if gate is None or not config.getoption("--quick"):
            return True
        seen[op, str(gate)] += 1
        return seen[op, str(gate)] % options.QUICK == 1

    _deselect(config, items, {item.nodeid for item in items if keep(item)})
    yield
    if shard := config.getoption("--shard"):
        _deselect(config, items, manifest.shard([item.nodeid for item in items], *manifest.shard_of(shard)))


def _deselect(config: pytest.Config, items: list[pytest.Item], kept: set[str] | frozenset[str]) -> None:
    dropped = [item for item in items if item.nodeid not in kept]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item.nodeid in kept]


def _hold(config: pytest.Config, node_ids: list[str]) -> None:
    """Compare what was collected with the manifest of the project that the suites are in."""
    from mxharness import manifest

    collected = _collected(node_ids)
    if path := config.getoption("--manifest-to"):
        Path(path).write_text(manifest.render(collected), encoding="utf-8")
    found: dict[str, Any] = {"collected": hashlib.sha256("\n".join(sorted(node_ids)).encode()).hexdigest()[:16]}
    named = options.places(config)
    if named:
        try:
            committed = manifest.load(config.rootpath)
        except UserError as error:
            found |= {"lost": (str(error),)}
        else:
            demanded = manifest.within(committed, named, options.ignored(config))
            difference = manifest.compare(demanded, collected)
            new = difference.unknown() if options.whole(config) else ()  # a new test of a file that is worked on
            found |= {"manifest": committed.digest, "demanded": len(demanded.ids), "lost": difference.lost()}
            found |= {"unknown": new}
    config.stash[_SESSION].collection = found


def _collected(node_ids: list[str]) -> Manifest:
    """What was collected, as a manifest; tests of the harness itself (suites/meta) are in none."""
    from mxharness.coverage import is_check
    from mxharness.manifest import Manifest, canonical
    from mxharness.ops import OPS

    names = {op.name for op in OPS}
    ids = {canonical(one) for one in node_ids if not one.startswith(options.META)}
    checks = frozenset(one for one in ids if is_check(one, names))
    return Manifest(checks, frozenset(ids) - checks)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note what must be executed; a worker passes on what it found."""
    found = session.config.stash[_SESSION]
    found.selected |= {item.nodeid for item in session.items}
    if _is_worker(session.config):
        session.config.workeroutput["collection"] = found.collection  # type: ignore[attr-defined]  # xdist adds it


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:  # noqa: ANN401  as above
    """Note what a worker selected, before it runs anything: it may crash."""
    node.config.stash[_SESSION].selected |= set(ids)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:  # noqa: ANN401  as above
    """Take over what a worker found in the manifest: all workers collect the same."""
    found = node.config.stash[_SESSION]
    found.collection = found.collection or getattr(node, "workeroutput", {}).get("collection", {})


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that executed less than it should have, and write the record."""
    config = session.config
    if _is_worker(config) or config.option.collectonly:
        return
    found = config.stash[_SESSION]
    if found.errors and session.exitstatus == pytest.ExitCode.INTERRUPTED:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    ended = session.exitstatus in _ENDED
    if ended and found.problems():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if config.getoption("--report"):
        _save(config, incomplete="" if ended else f"the suites were interrupted (pytest's code {session.exitstatus:d})")
        if found.diary:
            found.diary.unlink(missing_ok=True)


def _save(config: pytest.Config, incomplete: str) -> None:
    """Write the record of what ran up to now."""
    from mxharness import record

    command = " ".join(("pytest", *map(str, config.invocation_params.args)))
    try:
        device = device_of(config)
    except UserError as error:
        raise pytest.UsageError(str(error)) from error
    made = config.stash[_SESSION].record(device, command, options.limits(config), incomplete=incomplete)
    record.save(made, Path(config.getoption("--report")) / RECORD)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> Generator[None]:
    """First the verdict; last what ran, what did not and why."""
    found = config.stash[_SESSION]
    told = not config.option.collectonly and exitstatus != pytest.ExitCode.USAGE_ERROR
    if told:
        terminalreporter.section("mxharness")
        line = found.first_line(device_of(config), exitstatus, options.limits(config))
        terminalreporter.write_line(line, red=line.startswith("FAIL"), green=line.startswith("PASS"))
    yield
    lines = list(found.lines()) if told else []
    if lines:
        terminalreporter.section("what ran")
    for line in lines:
        terminalreporter.write_line(line)
