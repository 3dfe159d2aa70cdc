"""The pytest options: what they are called, what they may hold, and how they narrow a run."""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mxharness.commands.running import FUZZ, REGRESSION
from mxharness.errors import UserError
from mxharness.manifest import shard_of

if TYPE_CHECKING:
    from mxharness.device import Device

OUT = "mxharness-out"
"""The folder in the working directory that results go to where none is named."""
QUICK = 4
"""--quick keeps one check in this many."""
QUICK_FUZZ = 10
"""Random cases of every operator under --quick."""
META = "suites/meta/"
"""Tests of the harness itself, which a wheel does not carry: the manifest has none of them."""

_OTHERS = {"lf": "lf", "stepwise": "stepwise"}
"""Options of pytest's own that leave tests out by what failed before, and where their values are kept."""

_DEVICE = pytest.StashKey["Device"]()


def add(parser: pytest.Parser) -> None:
    """Add them to pytest's own."""
    group = parser.getgroup("mxharness", "MXFP4 kernels")
    group.addoption("--device", default="auto", help="where kernels run: auto, host or cuda (default: auto)")
    group.addoption("--require-device", metavar="CLASS", help="refuse to run on another device class, as sm_90")
    only = "only this operator, or all of FILE.cu; repeatable"
    group.addoption("--op", action="append", default=[], metavar="NAME", help=only)
    fewer = f"one check in {QUICK} of every operator and gate, {QUICK_FUZZ} random cases of every operator"
    group.addoption("--quick", action="store_true", help=fewer)
    random = "random cases of every operator (default: of Hypothesis' profile, 40 in ci, 1000 in nightly)"
    group.addoption("--fuzz", type=int, metavar="N", help=random)
    seed = "seed of the random cases, a number or 'random' (default: 0, in nightly random)"
    group.addoption("--fuzz-seed", metavar="SEED", help=seed)
    part = "only part I of N, the same on every machine; `mxharness merge` puts the parts together"
    group.addoption("--shard", default="", metavar="I/N", help=part)
    compared = "fail on what moved from this baseline; CLASS/NAME of another device class is compared bit for bit"
    group.addoption("--baseline", metavar="[CLASS/]NAME", help=compared)
    rewritten = "make a run of all suites in which everything is right the new --baseline NAME, and fail all the same"
    group.addoption("--update-baseline", action="store_true", help=rewritten)
    record = (
        "write run.json, the record of this run, into DIR; where DIR is outside of this project and no suite is named "
        "beside it, pytest wants --report=DIR"
    )
    group.addoption("--report", metavar="DIR", help=record)
    kept = "save what fails below DIR (default: failures in --report's folder, or in mxharness-out)"
    group.addoption("--failures", metavar="DIR", help=kept)
    listed = "known failures (default: those of baselines/known_failures.toml)"
    group.addoption("--known-failures", metavar="FILE", help=listed)
    group.addoption("--manifest-to", metavar="FILE", help=argparse.SUPPRESS)  # for `mxharness manifest`


def settle(config: pytest.Config) -> None:
    """Check what was given and decide what was not; workers get the controller's choice. Raises UserError."""
    from hypothesis import HealthCheck, settings

    from mxharness.ops import select

    settings.register_profile(
        "ci",
        derandomize=True,
        max_examples=FUZZ,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settings.register_profile("nightly", settings.get_profile("ci"), derandomize=False, max_examples=1000)
    profile = os.environ.get("HYPOTHESIS_PROFILE", "ci")
    settings.load_profile(profile)
    for name in config.getoption("--op"):
        select(name)
    if shard := config.getoption("--shard"):
        shard_of(shard)
    option = config.option
    if option.fuzz is None:
        option.fuzz = QUICK_FUZZ if option.quick else settings.get_profile(profile).max_examples
    if option.fuzz < 1:
        raise UserError(f"--fuzz {option.fuzz} draws no random case; take 1 or more")
    if option.fuzz_seed is None:
        option.fuzz_seed = "random" if profile == "nightly" else 0
    if option.fuzz_seed == "random":
        option.fuzz_seed = secrets.randbelow(2**32)
    try:
        option.fuzz_seed = int(option.fuzz_seed)
    except ValueError as error:
        raise UserError(f"--fuzz-seed '{option.fuzz_seed}' is neither a whole number nor 'random'") from error


def device_of(config: pytest.Config) -> Device:
    """The one device of this process; UserError where it cannot be had."""
    from mxharness.device import open_device

    if _DEVICE not in config.stash:
        config.stash[_DEVICE] = open_device(config.getoption("--device"))
    return config.stash[_DEVICE]


def failures_of(config: pytest.Config) -> Path:
    """Where failing checks are saved (repro.py)."""
    named = config.getoption("--failures")
    return Path(named) if named else Path(config.getoption("--report") or OUT) / "failures"


def parameter(item: pytest.Item, name: str) -> object:
    """What a parametrised test got for `name`, None where it has no such parameter."""
    return item.callspec.params.get(name) if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None


def is_check(item: pytest.Item) -> bool:
    """Whether the item is one (operator, case, gate), which must leave an Outcome."""
    return None not in {parameter(item, "op"), parameter(item, "case"), parameter(item, "gate")}


def require(config: pytest.Config, device_class: str) -> None:
    """Raises UserError where --require-device names another class than this device's."""
    wanted = config.getoption("--require-device")
    if wanted and wanted != device_class:
        raise UserError(f"this run requires {wanted} and the device is {device_class}")


def places(config: pytest.Config) -> tuple[str, ...]:
    """What of the project's suites was named to be collected, relative to its root; empty: the suites of no project."""
    root = config.rootpath
    if not ((root / "kernels").is_dir() and (root / "suites").is_dir()):
        return ()
    found = []
    for argument in config.args:
        path, _, inside = str(argument).partition("::")
        place = (config.invocation_params.dir / path).resolve()
        if root.resolve().is_relative_to(place):
            found.append("suites")
        elif place.is_relative_to(root.resolve()):
            found.append("::".join(filter(None, (place.relative_to(root.resolve()).as_posix(), inside))))
    return tuple(place for place in found if f"{place}/".startswith("suites/") and not f"{place}/".startswith(META))


def ignored(config: pytest.Config) -> tuple[str, ...]:
    """What --ignore leaves out, relative to the root."""
    root = config.rootpath.resolve()
    folders = [(config.invocation_params.dir / Path(path)).resolve() for path in config.option.ignore or ()]
    folders += [root / "suites" / REGRESSION] if config.getoption("--update-baseline") else []
    return tuple(path.relative_to(root).as_posix() for path in folders if path.is_relative_to(root))


def whole(config: pytest.Config) -> bool:
    """Whether all suites of the project are collected, whatever is then left out."""
    return "suites" in places(config)


def limits(config: pytest.Config) -> tuple[str, ...]:
    """What narrowed the run on purpose, as it is typed."""
    option = config.option
    found = [] if whole(config) else list(places(config))
    found += [f"--op {name}" for name in option.op]
    found += ["--quick"] if option.quick else []
    for name, value in (("-k", option.keyword), ("-m", option.markexpr)):
        found += [f"{name} {shlex.quote(value)}"] if value else []
    found += [f"--deselect {name}" for name in option.deselect or ()]
    unasked = {f"suites/{REGRESSION}"} if option.update_baseline else set()
    left_out = (path for path in ignored(config) if not f"{path}/".startswith(META) and path not in unasked)
    found += [f"--ignore {path}" for path in left_out]
    found += [f"--{name}" for name, dest in _OTHERS.items() if getattr(option, dest, False)]
    found += [f"--shard {option.shard}"] if option.shard else []
    return tuple(found)
