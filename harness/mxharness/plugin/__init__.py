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
from typing import TYPE_CHECKING, Any

import pytest

from mxharness.commands.running import DIARY, RECORD, REGRESSION
from mxharness.errors import UserError
from mxharness.plugin import against, fixtures, known, options, parameters, sharing, starting, watch
from mxharness.plugin.options import device_of, parameter
from mxharness.plugin.session import Session
from mxharness.wording import counted

if TYPE_CHECKING:
    from mxharness.manifest import Manifest
    from mxharness.record import RunRecord

_SESSION = pytest.StashKey[Session]()
_ENDED = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Take the fixtures, the parameters, the known failures, the quick start and the sharing of tests along."""
    for module in (fixtures, parameters, known, starting, sharing):
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
        if config.getoption("--device") != "auto" or config.getoption("--require-device"):
            options.require(config, device_of(config).device_class)
        config.stash[_SESSION].known = known.of(config)
        if not _is_worker(config):
            against.settle(config)
    except UserError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[_SESSION].redrawn = ("--fuzz", str(config.option.fuzz), "--fuzz-seed", str(config.option.fuzz_seed))


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
    """Where kernels run, which ones, what is compared and demanded, and which gates cannot judge that device."""
    from mxharness.plugin import header

    try:
        return header.lines(config, _gpus(config) if getattr(config.option, "numprocesses", None) else [])
    except UserError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile, watch long tests, and leave a record that says the run did not end, should it be killed."""
    config = session.config
    if _is_worker(config) or config.option.collectonly:
        return
    if config.stash[_SESSION].whole and getattr(config.option, "numprocesses", None):
        starting.compile_kernels(device_of(config))
    if seen := watch.of(config):
        config.pluginmanager.register(seen, "mxharness-watch")
    if not config.getoption("--report"):
        return
    found = config.stash[_SESSION]
    _save(config, incomplete="the run did not end")
    found.diary = Path(config.getoption("--report")) / DIARY


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


def _left_out(config: pytest.Config, selected: set[str]) -> tuple[str, ...]:
    """A sentence about tests of the manifest that were collected and then left out, though no option asked for that."""
    from mxharness import manifest

    demanded = manifest.within(manifest.load(config.rootpath), options.places(config), options.ignored(config))
    left = demanded.ids - {manifest.canonical(one) for one in selected}
    if not left:
        return ()
    return (f"{counted(len(left), 'test')} of the manifest left out by no option, as {manifest.label(min(left))}",)


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


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The suite that asks for the newest baseline's bits is not asked of a run that becomes the next one."""
    own = config.rootpath / "suites" / REGRESSION
    return True if config.getoption("--update-baseline") and collection_path == own else None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that executed less than it should have or moved from its baseline, and write the record."""
    config = session.config
    if _is_worker(config) or config.option.collectonly:
        return
    found, baseline = config.stash[_SESSION], against.of(config)
    if found.errors and session.exitstatus == pytest.ExitCode.INTERRUPTED:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    ended = session.exitstatus in _ENDED
    if found.whole and found.selected and found.collection.get("manifest") and not found.collection["lost"]:
        found.collection["lost"] = _left_out(config, found.selected)
    if baseline and ended:
        record = _record(config)
        if baseline.update:
            right = session.exitstatus == pytest.ExitCode.OK and not found.problems()
            record = against.bless(baseline, record, config, right=right)
        else:
            against.compare(baseline, record)
        found.kept = record
    if ended and (found.problems() or (baseline and baseline.reasons)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if config.getoption("--report"):
        _save(config, incomplete="" if ended else f"the suites were interrupted (pytest's code {session.exitstatus:d})")
        if found.diary:
            found.diary.unlink(missing_ok=True)


def _record(config: pytest.Config, *, incomplete: str = "", facts: bool = True) -> RunRecord:
    """What ran up to now."""
    command = " ".join(("pytest", *map(str, config.invocation_params.args)))
    try:
        device = device_of(config)
    except UserError as error:
        raise pytest.UsageError(str(error)) from error
    found, limits = config.stash[_SESSION], options.limits(config)
    return found.record(device, command, limits, incomplete=incomplete, facts=facts)


def _save(config: pytest.Config, incomplete: str) -> None:
    """Write the record of what ran up to now, or the one that was compared."""
    from mxharness import record

    made = config.stash[_SESSION].kept or _record(config, incomplete=incomplete)
    record.save(made, Path(config.getoption("--report")) / RECORD)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> Generator[None]:
    """First the verdict; last what ran, what is wrong and what moved."""
    from mxharness.plugin import summary

    if config.option.collectonly or exitstatus == pytest.ExitCode.USAGE_ERROR:
        yield
        return
    found, baseline = config.stash[_SESSION], against.of(config)
    record = found.kept or _record(config, facts=False)
    terminalreporter.section("mxharness")
    said = (baseline.reasons, baseline.found) if baseline else ()
    line = found.first_line(record, exitstatus, *said)
    terminalreporter.write_line(line, red=line.startswith("FAIL"), green=line.startswith("PASS"))
    yield
    writer = config.get_terminal_writer()
    look = summary.Look(writer.fullwidth, colour=writer.hasmarkup, brief=config.get_verbosity() < 0)
    for title, text in summary.sections(record, baseline, found.seconds, look):
        if text:
            terminalreporter.section(title)
            terminalreporter.write(text)
