"""Baselines: what a blessed run computed, as text that a reviewer can read in a diff.

    baselines/<device class>/<NAME>/environment.json   where the numbers come from
                                    <operator>.json    one line per case and gate
                                    perplexity.json    one line per model, text and precision
                                    tolerances.json    one line per operator: what its bounds are made of
                                    faults.json        one line per planted fault: whether and by what it was caught
                                    kernels.json       one line per kernel: registers, spills, shared memory
                                    speed.json         one line per row of `mxharness bench`

The last three where there are such. Only `create` blesses. stores/ says where all this lies and how it is written;
drift.py compares a run with it, history.py one version with the next.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mxharness import paths
from mxharness.bench.result import Bench
from mxharness.contents import (
    LABELS,
    Baseline,
    Entry,
    entries,
    fault_entries,
    files,
    key,
    of,
    parsed,
    perplexity_entries,
    perplexity_key,
    unstable,
)
from mxharness.errors import UserError
from mxharness.record import RunRecord, verdict
from mxharness.stores import open_store
from mxharness.stores.common import DEVICE_CLASS, NAME, exists

__all__ = (
    "ADDRESS",
    "LABELS",
    "Baseline",
    "Damaged",
    "Entry",
    "Root",
    "Summary",
    "Survey",
    "checked_name",
    "create",
    "digests",
    "entries",
    "fault_entries",
    "key",
    "list_baselines",
    "load",
    "of",
    "perplexity_entries",
    "perplexity_key",
    "places",
    "refuse_taken",
    "remove",
    "roots",
    "survey",
    "unstable",
)

Root = Path | str | None
"""A folder or URL that holds baselines; None: the first of `roots` that has what is asked for."""

ADDRESS = "MXHARNESS_BASELINES"
"""Environment variable: the folder or URL that a team keeps its baselines at."""


@dataclass(frozen=True)
class Summary:
    """One baseline that exists."""

    device_class: str
    name: str
    path: Path | str
    """Its folder, or the address of its pointer."""
    root: Path | str
    """Where it was found, as `load` takes it."""
    created: str
    """UTC, ISO 8601: when the blessed run started."""
    operators: tuple[str, ...]
    checks: int


@dataclass(frozen=True)
class Damaged:
    """One baseline that exists and cannot be read."""

    device_class: str
    name: str
    why: str
    """The sentence of `load`: which file, and what is wrong with it."""


@dataclass(frozen=True)
class Survey:
    """All baselines of a place, by device class and name."""

    summaries: tuple[Summary, ...]
    versions: tuple[Baseline, ...]
    """The same, whole."""
    damaged: tuple[Damaged, ...]


def create(
    name: str,
    record: RunRecord,
    *,
    replace: bool = False,
    root: Root = None,
    accepted: str = "",
    speed: Bench | None = None,
) -> Path | str:
    """Bless `record` as baseline `name` of its device class and return the baseline's place.

    root: by default the first of `roots`. accepted: why the growth that history.growth finds is right; it counts anew
    from here. speed: what `mxharness bench` measured of the same kernels.

    The baseline appears whole or not at all. Raises UserError where `name` is no plain name, where the baseline exists
    and replace is False, for a run that failed, was filtered, is not deterministic or used float32 arithmetic, and for
    a bench of another device class or with rows that failed.
    """
    store, device_class = open_store(root or roots()[0]), _checked_class(record.device_class)
    refuse_taken(device_class, name, root, replace=replace)
    _refuse_unfit(record)
    _refuse_bench(speed, device_class)
    return store.write(device_class, name, files(record, accepted, speed), replace=replace)


def refuse_taken(device_class: str, name: str, root: Root = None, *, replace: bool) -> None:
    """Raise UserError where `create` would: for a name that is none, or that is taken and not to be replaced."""
    pair = (device_class, checked_name(name))
    if not replace and pair in open_store(root or roots()[0]).names():
        raise exists(*pair)


def remove(device_class: str, name: str, root: Root = None) -> None:
    """Take a baseline away from the store it is written to; nothing where there is none."""
    open_store(root or roots()[0]).remove(_checked_class(device_class), checked_name(name))


def _refuse_unfit(record: RunRecord) -> None:
    """Raise UserError for a run that must not become the measure of others."""
    result = verdict(record)
    if not result.passed:
        raise UserError(f"a failing run cannot be a baseline: {'; '.join(result.reasons)}")
    if record.known:
        raise UserError(f"a run with known failures cannot be a baseline: {record.known[0]['check']} fails")
    twice = unstable(record)
    if twice:
        raise UserError(f"a baseline needs one truth, and {', '.join(twice)} ran twice with different bits")
    if record.filters:
        raise UserError(f"a baseline needs every operator; this run was limited by {' '.join(record.filters)}")
    if record.arithmetic != "tensor-core":
        raise UserError(f"a baseline needs tensor-core arithmetic; this run used {record.arithmetic}")


def _refuse_bench(speed: Bench | None, device_class: str) -> None:
    """Raise UserError for times that do not belong to the run."""
    if speed is None:
        return
    if speed.device_class != device_class:
        raise UserError(f"the bench was made on {speed.device_class} and the run on {device_class}")
    if not speed.sound:
        bad = [*speed.failed, *(key for key, row in speed.rows.items() if not row.sound)]
        raise UserError(f"a bench with rows that failed cannot be part of a baseline: {', '.join(bad)}")


def load(device_class: str, name: str, root: Root = None) -> Baseline:
    """The baseline `device_class`/`name`.

    root: by default the first of `roots` that has it.

    Raises UserError, naming what exists, where it is missing, and naming the file where one is damaged or newer.
    """
    for base in (root,) if root else roots():
        store = open_store(base)
        texts = store.read(_checked_class(device_class), checked_name(name))
        if texts is not None:
            return parsed(device_class, name, store.place(device_class, name), texts)
    raise UserError(_missing(device_class, name, root))


def digests(device_class: str, name: str, root: Root = None) -> dict[str, str]:
    """The recorded bits of every check, by `key(case, gate)`. Raises as `load`."""
    return {name: str(entry["digest"]) for name, entry in load(device_class, name, root).checks.items()}


def list_baselines(root: Root = None) -> list[Summary]:
    """Every baseline that exists, by device class and name. Raises UserError where one is damaged."""
    found = survey(root=root)
    if found.damaged:
        raise UserError(found.damaged[0].why)
    return list(found.summaries)


def survey(device_class: str | None = None, root: Root = None) -> Survey:
    """Every baseline, or all of one device class: a damaged one hides no other.

    Raises UserError where a place itself cannot be read.
    """
    summaries, versions, damaged = [], [], []
    for (held, name), base in sorted(places(root).items()):
        if held != (device_class or held):
            continue
        try:
            loaded = load(held, name, base)
        except UserError as error:
            damaged.append(Damaged(held, name, str(error)))
            continue
        operators = tuple(sorted({str(entry["op"]) for entry in loaded.checks.values()}))
        path = open_store(base).place(held, name)
        summaries.append(Summary(held, name, path, base, loaded.created, operators, len(loaded.checks)))
        versions.append(loaded)
    return Survey(tuple(summaries), tuple(versions), tuple(damaged))


def roots() -> tuple[Path | str, ...]:
    """Where baselines are sought, and the first is where they are written.

    $MXHARNESS_BASELINES, else the checkout's folder or the working directory's; then those that came with this version.
    """
    return tuple(dict.fromkeys((os.environ.get(ADDRESS) or paths.writable_baselines(), paths.baselines())))


def places(root: Root) -> dict[tuple[str, str], Path | str]:
    """(device class, name) of every baseline and the root it is in, the first one where two have the same name."""
    found: dict[tuple[str, str], Path | str] = {}
    for base in (root,) if root else roots():
        for pair in open_store(base).names():
            found.setdefault(pair, base)
    return found


def _missing(device_class: str, name: str, root: Root) -> str:
    there = ["/".join(pair) for pair in sorted(places(root))]
    known = f"there are {', '.join(there)}" if there else "there is none yet"
    return f"no baseline {device_class}/{name}; {known}; `mxharness baseline create {name}` makes one"


def checked_name(name: str) -> str:
    """`name`, or UserError where a baseline cannot be called that."""
    if not NAME.fullmatch(name):
        raise UserError(f"'{name}' is no name for a baseline; take up to 64 letters, digits, '.', '_', '-'")
    return name


def _checked_class(device_class: str) -> str:
    if not DEVICE_CLASS.fullmatch(device_class):
        raise UserError(f"'{device_class}' is no device class; they read host, sm_80, sm_90")
    return device_class
