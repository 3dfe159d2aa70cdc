"""Device facts: what was measured of a device class's matrix instruction, and what the judge may therefore assume.

    baselines/devices/<device class>.json   came with this version: of hardware that its maintainers measured
    <cache>/devices/<device class>.json     written by `mxharness probe` on the user's own GPU

A fact that came with this version holds; a probe that finds something else says so and changes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from mxharness import paths
from mxharness.bounds import widened
from mxharness.document import API_VERSION, read_document, write_atomically
from mxharness.errors import UserError
from mxharness.regimes import EXACT_WIDTH
from mxharness.tensor_core import HOPPER, Unit, Units, predicting

FLOAT32 = 2.0**-24
"""The unit roundoff that the operators' own bounds are written with."""
UNMEASURED = 2.0**-23
"""Of a tensor core nobody measured: it truncates (Blanchard, Higham, Lopez, Mary, Pranesh, SISC 42(3), 2020)."""
UNMEASURED_BEFORE_8 = 2.0**-22
"""Below compute capability 8.0, where a step sums four products with no bit below the largest (Volta, ibid.)."""


@dataclass(frozen=True)
class DeviceFact:
    """What one device class computes."""

    device_class: str
    gpu: str
    driver: str
    date: str
    """Of the measurement, ISO 8601."""
    units: Mapping[str, Unit | None]
    """By dtype, "bf16" and "fp16"; None where no model of the family fits."""
    exact_integers: int
    """Sums of integers are exact, in any order, as long as the sum of their magnitudes stays within this."""
    unit_roundoff: float
    """With which gamma_n bounds a chain."""
    results: int
    mismatches: int
    """Results compared with the units', and those with other bits."""
    source: str
    """The command, or why it holds."""

    @property
    def predicted(self) -> Units | None:
        """The units of both dtypes; None where one has none."""
        known = {dtype: unit for dtype, unit in self.units.items() if unit is not None}
        return known if len(known) == len(self.units) else None


HOST = DeviceFact(
    device_class="host",
    gpu="none",
    driver="none",
    date="2026-11-22",
    units={"bf16": HOPPER, "fp16": HOPPER},
    exact_integers=2**24,
    unit_roundoff=FLOAT32,
    results=0,
    mismatches=0,
    source="kernels/host/tensor_core.h is Hopper's model",
)
"""The host device needs no measurement."""


def shipped_folder() -> Path:
    """The facts that came with this version."""
    return paths.baselines() / "devices"


def own_folder() -> Path:
    """The facts this user measured."""
    return paths.cache() / "devices"


def find(device_class: str) -> DeviceFact | None:
    """What is known of a device class: what came with this version, else what this user measured, else None."""
    return shipped(device_class) or _load(own_folder() / f"{device_class}.json")


def shipped(device_class: str) -> DeviceFact | None:
    """What came with this version."""
    return HOST if device_class == "host" else _load(shipped_folder() / f"{device_class}.json")


def roundoff(device_class: str) -> float:
    """The unit roundoff of contractions on a device class."""
    fact = find(device_class)
    return fact.unit_roundoff if fact else unmeasured(device_class)


def unmeasured(device_class: str) -> float:
    """The unit roundoff of a class that has no fact."""
    capability = re.fullmatch(r"sm_([0-9]+)", device_class)
    return UNMEASURED_BEFORE_8 if capability and int(capability[1]) < 80 else UNMEASURED


@contextmanager
def assumed(device_class: str) -> Iterator[None]:
    """Predict and bound what is computed inside as on this device class."""
    fact = find(device_class)
    units = (fact.predicted if fact else None) or {"bf16": HOPPER, "fp16": HOPPER}
    with predicting(units), widened(roundoff(device_class) / FLOAT32):
        yield


def lacking(device_class: str) -> str:
    """Which gates cannot judge this device class, and what to do; empty where all can."""
    fact = find(device_class)
    if fact is None:
        return (
            f"{device_class} has no device fact: predicted bits and exact arithmetic are not judged, and bounds are "
            f"{unmeasured(device_class) / FLOAT32:g} times as wide; run `mxharness probe`"
        )
    if fact.predicted is None:
        dtypes = " and ".join(dtype for dtype, unit in fact.units.items() if unit is None)
        return f"{device_class} has no known model of its tensor core in {dtypes}: predicted bits are not judged"
    if fact.exact_integers < EXACT_WIDTH:
        return f"{device_class} has no exact integers past {fact.exact_integers}: exact arithmetic is not judged"
    return ""


def store(fact: DeviceFact, folder: Path | None = None) -> Path:
    """Write a fact of the user's own GPU; the file. Raises UserError where one that came with this version differs."""
    official = shipped(fact.device_class)
    if official and (reason := contradiction(official, fact)):
        raise UserError(reason)
    path = (folder or own_folder()) / f"{fact.device_class}.json"
    write_atomically(path, json.dumps({"api_version": API_VERSION, **asdict(fact)}, indent=1, sort_keys=True) + "\n")
    return path


def contradiction(known: DeviceFact, found: DeviceFact) -> str:
    """In what a measurement is not what was known; empty where they agree."""
    for what in ("units", "exact_integers", "unit_roundoff"):
        if getattr(known, what) != getattr(found, what):
            return (
                f"this {known.device_class} is not the one known ({known.gpu}, driver {known.driver}, {known.date}): "
                f"{what.replace('_', ' ')} {_said(getattr(found, what))} instead of {_said(getattr(known, what))}"
            )
    return ""


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{dtype} {unit or 'of no known model'}" for dtype, unit in value.items())
    return str(value)


def _load(path: Path) -> DeviceFact | None:
    try:
        stamp = path.stat().st_mtime_ns
    except OSError:
        return None
    return _read(path, stamp)


@cache
def _read(path: Path, stamp: int) -> DeviceFact:
    """The fact in `path`; the file's time is part of the cache's key, so that a new file is read."""
    document: dict[str, Any] = read_document(path, "device fact")
    try:
        units = {dtype: Unit(**unit) if unit else None for dtype, unit in document["units"].items()}
        known = {field.name: document[field.name] for field in fields(DeviceFact)}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"device fact {path} is damaged ({error}); `mxharness probe` makes it anew") from error
    return DeviceFact(**{**known, "units": units})
