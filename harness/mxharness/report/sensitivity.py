"""The section "Sensitivity" of a report: what `mxharness sensitivity --json` wrote, ranked, drawn and in words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxharness import plot
from mxharness.errors import UserError

FILE = "sensitivity.json"
"""Beside run.json: there a report finds it without being told."""

TITLES = {
    "roles": "Each role alone in MXFP4 (floor)",
    "layers": "Each layer alone in MXFP4 (floor)",
    "formats": "Everything in one format",
}
"""By group of changes, in the order of the page."""

AXIS = "mean KL from float32, nats per token (one-sided 95 % bounds)"


@dataclass(frozen=True)
class Interval:
    """A mean with its one-sided 95 % bounds."""

    mean: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Part:
    """Weights that were stored in a format while all others stayed float32."""

    name: str
    format: str
    parameters: int
    kl: Interval
    """Nats per token."""
    moved: Interval
    """Relative change of perplexity."""
    same: float
    """Share of tokens whose most probable word stays."""
    note: str
    """Which other formats stand in where rows do not fit; mostly empty."""


@dataclass(frozen=True)
class Group:
    """Parts that are compared with each other, the dearest first."""

    title: str
    parts: tuple[Part, ...]
    drawing: str
    """An <svg>, whose label says every number that it shows."""


@dataclass(frozen=True)
class Section:
    """What the page shows of a measurement."""

    model: str
    text: str
    protocol: str
    windows: str
    """"8 of 53"."""
    scored: int
    perplexity: float
    """Of the float32 model."""
    groups: tuple[Group, ...]
    missing: tuple[tuple[str, str], ...]
    """What was not measured, and why."""
    stored: int
    """Weights that are MXFP4 in the file: what that cost is in no number here."""


def read(path: Path) -> Section:
    """The section of a document of `mxharness sensitivity --json`. Raises UserError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    try:
        return _section(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not what `mxharness sensitivity --json` prints") from error


def beside(folder: Path) -> Section | None:
    """The section of the document that lies in `folder`; None where there is none. Raises as `read`."""
    return read(folder / FILE) if (folder / FILE).is_file() else None


def _section(found: Mapping[str, Any]) -> Section:
    groups = []
    for group, title in TITLES.items():
        measured = [_part(loss) for loss in found["losses"] if loss["group"] == group and loss["kl"]]
        parts = tuple(sorted(measured, key=lambda part: -part.kl.mean))
        if parts:
            bars = [plot.Bar(part.name, part.kl.mean, part.kl.lower, part.kl.upper) for part in parts]
            groups.append(Group(title, parts, plot.bars_svg(f"{title}, {AXIS}", bars, AXIS)))
    return Section(
        model=str(found["model"]),
        text=str(found["text"]),
        protocol=str(found["protocol"]),
        windows=f"{found['windows']} of {found['windows_available']}",
        scored=int(found["tokens_scored"]),
        perplexity=float(found["perplexity_float32"]),
        groups=tuple(groups),
        missing=tuple((str(loss["name"]), str(loss["missing"])) for loss in found["losses"] if not loss["kl"]),
        stored=len(found["stored_in_mxfp4"]),
    )


def _part(loss: Mapping[str, Any]) -> Part:
    log = _interval(loss["log_perplexity"])
    whole = len(loss["weights"])
    fell_back: Mapping[str, Sequence[str]] = loss["fell_back"]
    return Part(
        name=str(loss["name"]),
        format=str(loss["format"]),
        parameters=int(loss["parameters"]),
        kl=_interval(loss["kl"]),
        moved=Interval(*(math.expm1(min(nats, 700.0)) for nats in (log.mean, log.lower, log.upper))),
        same=float(loss["same_word"]),
        note=", ".join(f"{len(names)} of {whole} weights in {name}" for name, names in fell_back.items()),
    )


def _interval(numbers: Mapping[str, Any]) -> Interval:
    return Interval(*(float(numbers[name]) for name in ("mean", "lower", "upper")))
