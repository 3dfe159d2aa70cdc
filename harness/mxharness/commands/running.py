"""What `run` and `baseline` share: the suites in a pytest of their own, a model, the record, the report."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mxharness import paths
from mxharness.commands import common
from mxharness.errors import UserError

if TYPE_CHECKING:
    from mxharness.baseline import Root
    from mxharness.device import Device
    from mxharness.document import Labelled
    from mxharness.drift import Comparison
    from mxharness.record import RunRecord, Skip

RECORD = "run.json"
FAILURES = "failures"
DIARY = "running.txt"
"""Beside the suites' record while they run: the test that began last."""
HOST_WINDOWS = 8
"""Windows of text on the host device: seconds of the embedded model, minutes of SmolLM2, on two cores."""
FUZZ = 40
"""Random cases of every operator in a whole run."""
REGRESSION = "test_regression.py"
"""The suite that holds bits against the newest baseline: a run that becomes the next one is not asked for the same."""
MOST_WORKERS = 8
"""Each holds a torch of its own."""

_USAGE = 4  # pytest's exit code for bad arguments


class NothingSelectedError(UserError):
    """A selection that leaves no test: a run that fails, as it proves nothing."""


@dataclass(frozen=True)
class Request:
    """What one run is asked to do."""

    device: str = "auto"
    out: Path = Path("mxharness-out")
    ops: tuple[str, ...] = ()
    """Names of operators; empty: all."""
    expression: str = ""
    """pytest's -k."""
    quick: bool = False
    shard: str = ""
    """"I/N": part I of N; empty: everything."""
    fuzz: int | None = None
    """Random cases of every operator; None: the plugin's default."""
    fuzz_seed: str = ""
    """A number or "random"; empty: the plugin's default."""
    workers: str = ""
    """pytest-xdist's -n; empty: one process for a part of the suites, one a core, MOST_WORKERS at most, for all."""
    known_failures: Path | None = None
    """A ledger of its own; None: the one that came with this version."""
    model: str | None = common.DEFAULT_MODEL
    """None: no perplexity."""
    windows: int | None = None
    """None: HOST_WINDOWS on the host device, perplexity.py's default on a GPU."""
    blessing: bool = False
    """The run becomes a baseline: it is not compared with the one before, which holds other cases and other bits."""
    quiet: bool = False
    """Progress goes to standard error, because standard output carries JSON."""


def execute(request: Request, *checks: Callable[[str], None]) -> RunRecord:
    """Run the suites and the model, write run.json and return what it holds.

    checks: called with the device class before anything long, to refuse what would be refused at the end.

    Raises NothingSelectedError for an empty selection, UserError for an unknown operator or model and for a device that
    is not there.
    """
    from mxharness import ledger, record
    from mxharness.commands.perplexity import require_model
    from mxharness.device import open_device
    from mxharness.manifest import shard_of
    from mxharness.ops import select

    for name in request.ops:
        select(name)
    if request.shard:
        shard_of(request.shard)
    if request.model is not None:
        require_model(request.model)
    ledger.load(request.known_failures)
    opened = open_device(request.device)
    for check in checks:
        check(opened.device_class)
    common.folder(request.out)
    started = time.monotonic()
    found = dataclasses.replace(
        _suites(request, opened.name), command=shlex.join(("mxharness", *sys.argv[1:])), filters=_filters(request)
    )
    record.save(found, request.out / RECORD)  # an interrupt while the model is read loses no check
    if found.incomplete:
        return found
    found = dataclasses.replace(measured(found, request, opened), seconds=time.monotonic() - started)
    record.save(found, request.out / RECORD)
    return found


def measured(found: RunRecord, request: Request, opened: Device) -> RunRecord:
    """The suites' record with what they do not measure: a model's perplexity, what the compiler spent on kernels."""
    rows, skipped = _perplexity(request, opened.name)
    return dataclasses.replace(found, perplexity=rows, kernels=_kernels(opened), skipped=(*found.skipped, *skipped))


def require_device(wanted: str) -> Callable[[str], None]:
    """A check for `execute` that the device is of class `wanted`."""

    def check(device_class: str) -> None:
        if wanted != device_class:
            raise UserError(f"this run requires {wanted} and the device is {device_class}")

    return check


def require_baseline(name: str, root: Root = None) -> Callable[[str], None]:
    """A check for `execute` that baseline NAME or CLASS/NAME exists and can be read."""

    def check(device_class: str) -> None:
        from mxharness import baseline

        named, _, plain = name.rpartition("/")
        baseline.load(named or device_class, plain, root)

    return check


def write_report(found: RunRecord, out: Path, comparison: Comparison | None = None) -> Path:
    """Write report.html and what goes beside it into `out` and return the page's path."""
    from mxharness import report

    return report.write(found, out, comparison)


def pytest_arguments(request: Request, device: str) -> list[str]:
    """Arguments that run the suites with the same node ids in a checkout and from a wheel, in any working directory."""
    root = str(paths.root())
    arguments = ["-c", os.devnull, "--rootdir", root, "--confcutdir", root, "--import-mode=importlib"]
    arguments += ["-p", "mxharness.plugin", "-p", "no:cacheprovider", "--strict-markers", "-q"]
    arguments += ["--tb=no", "-rN"]  # the summary and the report say what failed
    arguments += ["--device", device, "--report", str(request.out.absolute())]
    arguments += [f"--op={name}" for name in request.ops]
    if request.quick:
        arguments.append("--quick")
    if request.expression:
        arguments += ["-k", request.expression]
    if request.shard:
        arguments += ["--shard", request.shard]
    if request.fuzz is not None:
        arguments += ["--fuzz", str(request.fuzz)]
    if request.fuzz_seed:
        arguments += ["--fuzz-seed", request.fuzz_seed]
    if request.known_failures:
        arguments += ["--known-failures", str(request.known_failures.absolute())]
    part = request.ops or request.expression or request.quick  # seconds, and each worker takes some to start
    arguments += ["-n", request.workers or ("0" if part else str(min(len(os.sched_getaffinity(0)), MOST_WORKERS)))]
    left_out = ["meta", *([REGRESSION] if request.blessing else [])]
    arguments += [part for name in left_out for part in ("--ignore", str(paths.suites() / name))]
    return [*arguments, str(paths.suites())]


def _suites(request: Request, device: str) -> RunRecord:
    """The suites' record, from a pytest in a process of its own that reads no configuration but ours."""
    from mxharness import record

    with tempfile.TemporaryDirectory() as folder:  # an earlier run's record stays until this one has ended
        path = Path(folder) / RECORD
        arguments = pytest_arguments(dataclasses.replace(request, out=path.parent), device)
        arguments += ["--failures", str((request.out / FAILURES).absolute())]
        done = subprocess.run(
            # -P keeps the working directory off sys.path
            (sys.executable, "-P", "-m", "pytest", *arguments),
            env=environment(),
            stdout=sys.stderr if request.quiet else None,
            check=False,
        )
        if done.returncode == _USAGE:
            given = f"-k {shlex.quote(request.expression)}" if request.expression else "its arguments"
            raise UserError(f"pytest refused {given}; its own message is above")
        if not path.is_file():
            raise UserError(
                f"the suites ended with code {done.returncode} and left no record; pytest's output says why"
            )
        found = record.load(path)
        held = found.coverage
        if held and not (held.selected or held.lost or held.errors or found.incomplete):
            raise NothingSelectedError(f"no test matches {' '.join(_filters(request)) or 'the selection'}")
        if done.returncode < 0:  # ended by a signal: what it left is the record of its start
            diary = path.with_name(DIARY)
            last = f" while running {diary.read_text(encoding='utf-8')}" if diary.is_file() else ""
            name = signal.Signals(-done.returncode).name
            found = dataclasses.replace(found, incomplete=f"the suites were killed by {name}{last}")
        return found


def environment() -> dict[str, str]:
    """Ours without another pytest's settings; hypothesis keeps its files in the cache, not in the working directory."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {"HYPOTHESIS_STORAGE_DIRECTORY": str(paths.cache() / "hypothesis"), **kept}


def _filters(request: Request) -> tuple[str, ...]:
    """What narrowed the run, as it was typed."""
    filters = [f"--op {name}" for name in request.ops]
    if request.quick:
        filters.append("--quick")
    if request.expression:
        filters.append(f"-k {shlex.quote(request.expression)}")
    if request.fuzz is not None and request.fuzz < FUZZ:
        filters.append(f"--fuzz {request.fuzz}")
    if request.shard:
        filters.append(f"--shard {request.shard}")
    return tuple(filters)


def _kernels(opened: Device) -> dict[str, dict[str, int]]:
    """What the compiler spent on every kernel; nothing on the host, which has no such numbers."""
    from mxharness.device import cuda

    if not isinstance(opened, cuda.CudaDevice):
        return {}
    return cuda.all_resources(opened.sources, opened.architecture)


def _perplexity(request: Request, device: str) -> tuple[tuple[Labelled, ...], tuple[Skip, ...]]:
    """The model's rows, or why there are none."""
    from mxharness.record import Skip

    if request.model is None:
        return (), (Skip("perplexity", "left out by --no-perplexity", asked=True),)
    from mxharness.commands.model_row import row_of_run

    windows = request.windows or (HOST_WINDOWS if device == "host" else None)
    try:
        return (row_of_run(request.model, device, windows),), ()
    except (UserError, ModuleNotFoundError) as error:
        why = str(error) if isinstance(error, UserError) else common.missing_package(error)
        return (), (Skip("perplexity", why),)
