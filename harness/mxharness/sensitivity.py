"""What quantising a part of a model's weights costs, each part alone, and what other formats would cost.

Everything runs in float32 torch on weights that were stored in a format and read back; nothing else changes, so the
loss is the format's and no kernel's. Of every change are measured, per token and paired with the float32 model: the KL
divergence over the whole vocabulary and the change of log perplexity, with windows as the units of their errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from mxharness.errors import Unavailable, UserError
from mxharness.gate import divergence
from mxharness.gate.statistics import Estimate, clustered
from mxharness.model import likelihood, reference
from mxharness.model.checkpoint import values
from mxharness.model.config import weights as weights_of
from mxharness.model.runner import check_ids
from mxharness.perplexity import perplexity_of
from mxharness.protocols import select
from mxharness.roundtrip import DEFAULT, FORMATS, Format, fitting, restored

if TYPE_CHECKING:
    from mxharness.model.checkpoint import Checkpoint
    from mxharness.model.likelihood import Columns
    from mxharness.model.reference import Weights
    from mxharness.model.runner import Runner
    from mxharness.perplexity import Reading
    from mxharness.protocols import Span

    Column = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

Group = Literal["roles", "layers", "formats"]
GROUPS: tuple[Group, ...] = get_args(Group)
_ROLES = {**dict.fromkeys(("q", "k", "v", "o"), "attention"), **dict.fromkeys(("gate", "up", "gate_up", "down"), "ffn")}
_TOGETHER = 8
"""Changes that go through the windows with one pass of the float32 model: bounds what lies in memory."""


@dataclass(frozen=True)
class Change:
    """Weights that are stored in a format while all others stay float32."""

    group: Group
    name: str
    """ "attention", "layer 3", "Q8_0"."""
    weights: tuple[str, ...]
    format: Format = DEFAULT


@dataclass(frozen=True)
class Loss:
    """What a change costs."""

    change: Change
    parameters: int
    fell_back: Mapping[str, tuple[str, ...]]
    """Format to the weights stored in it because their rows do not fit the change's own."""
    kl: Estimate | None
    """Nats per token; None where it was not measured."""
    moved: Estimate | None
    """Change of log perplexity, nats per token."""
    same: float
    """Share of tokens whose most probable word is float32's."""
    missing: str = ""
    """Why it was not measured."""

    def to_json(self) -> dict[str, Any]:
        """Everything, with the bounds of both estimates."""
        return {
            "group": self.change.group,
            "name": self.change.name,
            "format": self.change.format.name,
            "bits": self.change.format.bits,
            "weights": list(self.change.weights),
            "parameters": self.parameters,
            "fell_back": {form: list(names) for form, names in self.fell_back.items()},
            "kl": _numbers(self.kl),
            "log_perplexity": _numbers(self.moved),
            "same_word": self.same,
            "missing": self.missing,
        }


@dataclass(frozen=True)
class Sensitivity:
    """All losses of one model on one text."""

    reading: Reading
    windows: int
    scored: int
    mean_nll: float
    """Of the float32 model, nats per token."""
    losses: tuple[Loss, ...]
    device_class: str
    stored: tuple[str, ...]
    """Weights that the file holds in MXFP4 already: quantising them again costs nothing here."""

    @property
    def perplexity(self) -> float:
        """Of the float32 model."""
        return perplexity_of(self.mean_nll)

    def ranked(self, group: Group) -> list[Loss]:
        """A group's losses, the largest divergence first; what was not measured comes last."""
        return sorted(
            (loss for loss in self.losses if loss.change.group == group),
            key=lambda loss: loss.kl.mean if loss.kl else -1.0,
            reverse=True,
        )

    def to_json(self) -> dict[str, Any]:
        """Everything that fixes the numbers, and the numbers."""
        reading = self.reading
        return {
            "model": reading.model,
            "model_sha256": reading.model_sha256,
            "text": reading.text,
            "text_sha256": reading.text_sha256,
            "token_ids_sha256": reading.ids_sha256,
            "protocol": reading.protocol,
            "windows": self.windows,
            "windows_available": len(reading.available),
            "tokens_scored": self.scored,
            "perplexity_float32": self.perplexity,
            "torch": torch.__version__,
            "device_class": self.device_class,
            "stored_in_mxfp4": list(self.stored),
            "losses": [loss.to_json() for loss in self.losses],
        }


def changes(checkpoint: Checkpoint, groups: Sequence[Group] = GROUPS) -> tuple[Change, ...]:
    """Every role alone, all linear layers and everything; every layer alone; everything in every format.

    The router, norms, biases and sinks are never quantised. Raises UserError for an unknown group.
    """
    if unknown := [group for group in groups if group not in GROUPS]:
        raise UserError(f"no group '{unknown[0]}'; there are {', '.join(GROUPS)}")
    packed = [weight.name for weight in weights_of(checkpoint.config) if weight.packed]
    roles: dict[str, list[str]] = {}
    layers: dict[str, list[str]] = {}
    for name in packed:
        roles.setdefault(_role(checkpoint, name), []).append(name)
        if name.startswith("layers."):
            layers.setdefault(f"layer {name.split('.')[1]}", []).append(name)
    linear = [name for names in layers.values() for name in names]
    found: list[Change] = []
    if "roles" in groups:
        parts = {**roles, "all linear layers": linear, "everything": packed}
        found += [Change("roles", name, tuple(names)) for name, names in parts.items()]
    if "layers" in groups:
        found += [Change("layers", name, tuple(names)) for name, names in layers.items()]
    if "formats" in groups:
        found += [Change("formats", name, tuple(packed), form) for name, form in FORMATS.items()]
    return tuple(found)


def measure(
    checkpoint: Checkpoint,
    reading: Reading,
    asked: Sequence[Change],
    torch_device: torch.device,
    *,
    windows: int | None,
    progress: bool = False,
) -> Sensitivity:
    """The loss of each change, in their order, on `windows` evenly spaced windows, None for all.

    checkpoint: the weights as they were before anybody quantised them, as far as they exist. progress: bars on stderr.

    Raises UserError where torch multiplies float32 with reduced precision and where an id or a window does not fit
    the model.
    """
    spans = select(reading.available, windows)
    exact = {name: values(stored).to(torch_device) for name, stored in checkpoint.tensors.items()}
    first = _runner(reference.float32(checkpoint, torch_device), exact)
    unique = list({_key(change): change for change in asked}.values())
    found: dict[tuple[tuple[str, ...], str], Loss] = {}
    mean = math.nan
    for start in range(0, len(unique), _TOGETHER):
        together = unique[start : start + _TOGETHER]
        runners: list[Runner] = []
        places: list[int | str] = []
        for change in together:
            try:
                runners.append(_runner(first, {**exact, **_stored(change, exact)}))
                places.append(len(runners) - 1)
            except Unavailable as error:
                places.append(str(error))
        name = f"{start + 1} to {start + len(together)} of {len(unique)}" if progress else ""
        windows_seen = _windows([first, *runners], reading, spans, name)
        mean = _over(windows_seen, lambda columns: columns["reference"]).mean
        for change, place in zip(together, places, strict=True):
            found[_key(change)] = _loss(checkpoint, change, windows_seen, place)
    return Sensitivity(
        reading=reading,
        windows=len(spans),
        scored=sum(span.stop - span.first for span in spans),
        mean_nll=mean,
        losses=tuple(replace(found[_key(change)], change=change) for change in asked),
        device_class=first.device_class,
        stored=tuple(name for name, stored in checkpoint.tensors.items() if stored.format == "MXFP4"),
    )


def _role(checkpoint: Checkpoint, name: str) -> str:
    if name == "embedding" and checkpoint.config.tied:
        return "embedding and head"
    what = name.rsplit(".", 1)[-1]
    return _ROLES.get(what, what)


def _numbers(found: Estimate | None) -> dict[str, float] | None:
    if found is None:
        return None
    return {"mean": found.mean, "lower": found.lower, "upper": found.upper, "standard_error": found.error}


def _key(change: Change) -> tuple[tuple[str, ...], str]:
    """What is measured: two changes may be one, under two names."""
    return change.weights, change.format.name


def _stored(change: Change, exact: Weights) -> dict[str, torch.Tensor]:
    """The weights of a change as they come back from its format. Raises Unavailable."""
    return {name: restored(change.format, exact[name]) for name in change.weights}


def _runner(base: Runner, weights: Weights) -> Runner:
    """The float32 model on other weights."""
    config, where = base.config, base.torch_device

    def hidden_states(ids: torch.Tensor) -> torch.Tensor:
        check_ids(config, ids)
        return reference.hidden_states(config, weights, ids.to(where))

    return replace(base, hidden_states=hidden_states, logits=lambda states: reference.logits(config, weights, states))


def _windows(runners: Sequence[Runner], reading: Reading, spans: Sequence[Span], progress: str) -> list[Columns]:
    """Of every window the columns "reference", and of change i "nll i", "kl i" and "same i"."""

    def reduce(rows: slice, targets: torch.Tensor, logits: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
        columns = {"reference": likelihood.nll(rows, targets, logits[:1])["nll"]}
        for i, each in enumerate(logits[1:]):
            distance = divergence.in_full(logits[0], each)
            columns[f"nll {i}"] = likelihood.nll(rows, targets, [each])["nll"]
            columns[f"kl {i}"], columns[f"same {i}"] = distance.kl, distance.same
        return columns

    batch = likelihood.default_batch(runners[0])
    return list(likelihood.over_windows(runners, reading.ids, spans, lambda _: reduce, batch=batch, progress=progress))


def _over(windows: Sequence[Columns], of: Callable[[Columns], Column]) -> Estimate:
    """The mean per token of a column, with windows as units."""
    columns = [of(window).astype(np.float64) for window in windows]
    return clustered(np.array([float(column.sum()) for column in columns]), np.array([float(len(c)) for c in columns]))


def _loss(checkpoint: Checkpoint, change: Change, windows: Sequence[Columns], place: int | str) -> Loss:
    """place: the number of the change's columns, or why it has none."""
    shapes = {name: checkpoint.tensors[name].shape for name in change.weights}
    fell_back: dict[str, tuple[str, ...]] = {}
    for name, shape in shapes.items():
        if (form := fitting(change.format, shape[-1])) != change.format:
            fell_back[form.name] = (*fell_back.get(form.name, ()), name)
    loss = Loss(change, sum(math.prod(shape) for shape in shapes.values()), fell_back, None, None, math.nan)
    if isinstance(place, str):
        return replace(loss, missing=place)
    return replace(
        loss,
        kl=_over(windows, lambda columns: columns[f"kl {place}"]),
        moved=_over(
            windows, lambda columns: np.subtract(columns[f"nll {place}"], columns["reference"], dtype=np.float64)
        ),
        same=_over(windows, lambda columns: columns[f"same {place}"]).mean,
    )
