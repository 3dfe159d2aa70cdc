"""A checkpoint through the gate: its text, its references, one candidate for each dtype of activations."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mxharness import perplexity
from mxharness.agreement import LIMITS
from mxharness.errors import UserError
from mxharness.gate import compared, noise, references, sequence, stored
from mxharness.gate.verdict import Failed, Judgement, Rules, Window, judge, moved
from mxharness.model import decoder, reference
from mxharness.protocols import Span, select

if TYPE_CHECKING:
    import torch

    from mxharness.device import Device
    from mxharness.gate.references import Repeated
    from mxharness.gate.sequence import Measure
    from mxharness.gate.statistics import Estimate
    from mxharness.gate.stored import Statistics
    from mxharness.model.checkpoint import Checkpoint
    from mxharness.model.decoder import Activations
    from mxharness.perplexity import Reading
    from mxharness.text import Text


@dataclass(frozen=True)
class Gated:
    """One model's gates."""

    title: str
    judgements: Mapping[Activations, Judgement]
    reference: str
    """What was compared with."""
    cost: Estimate | None
    """Of the format in log perplexity, where the original weights are at hand or in the baseline."""
    repeated: Repeated | None
    """The reference beside itself; None where it is stored."""
    notes: tuple[str, ...]
    """On the references, for people."""

    @property
    def passed(self) -> bool:
        """Whether every gate passes."""
        return all(judgement.passed for judgement in self.judgements.values())


def judge_model(
    checkpoint: Checkpoint,
    text: Text,
    device: Device,
    activations: Sequence[Activations],
    protocol: str,
    *,
    tokens: int | None = None,
    windows: int | None = None,
    baseline: str | None = None,
    original: Checkpoint | None = None,
    progress: bool = False,
) -> Gated:
    """Judge the kernels on `device`, with activations of each dtype, against float32 on the same weights.

    windows: read at most so many, None for all there are. baseline: the name or file of a stored reference.
    original: as in `stored.collect`.

    Raises Failed for NaN, Inf, nothing scored, another experiment than the baseline's and a reference that is not
    what is stored; UserError for an unknown protocol and a baseline that cannot be read.
    """
    try:
        reading = perplexity.read(checkpoint, text, protocol, tokens)
    except perplexity.NothingToScoreError as error:
        raise Failed(str(error)) from error
    runners = {name: decoder.kernels(checkpoint, device, name) for name in activations}
    bars = {name: f"kernels, {name}" if progress else "" for name in activations}
    noises = dict.fromkeys(activations, 0.0)
    measures: dict[Activations, Measure]
    again: Repeated | None = None
    notes: list[str] = []
    if baseline is None:
        available = select(reading.available, windows)
        float32 = reference.decoded(checkpoint, device.torch_device)
        again = references.repeated(float32, reading.ids, available)
        notes.append(again.note)
        measures = {
            name: compared.together(float32, runners[name], reading.ids, progress=bars[name]) for name in runners
        }
    else:
        kept = stored.load(stored.find(baseline))
        kept.require(reading, _words(checkpoint))
        available = select(kept.spans, windows)
        notes += references.recomputed(kept, checkpoint, original, reading, device.torch_device)
        noises = {name: kept.noise(name) for name in activations}
        measures = {n: compared.against(kept, runners[n], reading.ids, progress=bars[n]) for n in activations}
    rules = {name: Rules(LIMITS[name].relative, noise=noises[name]) for name in activations}
    seen: dict[Span, Window] = {}
    judgements = sequence.run(
        available, [(references.remembering(measures[name], seen), rules[name]) for name in activations]
    )
    cost: Estimate | None = None
    if baseline is not None:
        cost = kept.cost(kept.spans)
    elif original or references.has_original(checkpoint):
        unrounded = reference.float32(original or checkpoint, device.torch_device)
        cost = references.cost(unrounded, reading.ids, seen, progress="original" if progress else "")
    if cost:
        notes.append(f"the format moves perplexity by {moved(cost)}, on {cost.windows} windows")
    else:
        notes.append("what the format costs is not known: the weights before MXFP4 are not at hand")
    return Gated(
        title=f"{reading.model} on {reading.text}: {protocol}, kernels on {device.device_class} ({device.arithmetic})",
        judgements=dict(zip(activations, judgements, strict=True)),
        reference=f"baseline {baseline}" if baseline else "float32 on the same weights, run beside",
        cost=cost,
        repeated=again,
        notes=tuple(notes),
    )


@dataclass(frozen=True, eq=False)
class Measured:
    """A model on a fixed set of windows: both references, the kernels, and the verdict on these."""

    references: Statistics
    windows: tuple[Window, ...]
    judgement: Judgement
    seconds: float
    """What the kernels took."""


def on_windows(
    checkpoint: Checkpoint,
    reading: Reading,
    device: Device,
    activations: Activations,
    spans: Sequence[Span],
    *,
    original: Checkpoint | None = None,
    progress: bool = False,
) -> Measured:
    """Run both references and the kernels on `spans` and judge these, whatever is left open. Raises Failed."""
    kept = stored.collect(checkpoint, reading, spans, device.torch_device, original=original, progress=progress)
    candidate = decoder.kernels(checkpoint, device, activations)
    start = time.perf_counter()
    measure = compared.against(kept, candidate, reading.ids, progress=f"kernels, {activations}" if progress else "")
    windows = tuple(measure(spans))
    seconds = time.perf_counter() - start
    return Measured(kept, windows, judge(windows, Rules(LIMITS[activations].relative)), seconds)


def make_baseline(
    checkpoint: Checkpoint,
    text: Text,
    torch_device: torch.device,
    protocol: str,
    *,
    tokens: int | None = None,
    windows: int | None = None,
    original: Checkpoint | None = None,
    top: int = stored.TOP,
    drawn: int = stored.DRAWN,
    progress: bool = False,
) -> Statistics:
    """A reference's statistics with the divergence of an honest candidate of each dtype, on a few windows, beside.

    Raises UserError for a text without a window and a reference with NaN or Inf.
    """
    reading = perplexity.read(checkpoint, text, protocol, tokens)
    spans = select(reading.available, windows)
    found = stored.collect(
        checkpoint, reading, spans, torch_device, original=original, top=top, drawn=drawn, progress=progress
    )
    if not all(np.isfinite(found.columns[column]).all() for column in ("nll", "original")):
        raise UserError(f"{checkpoint.name} gives NaN or infinite likelihoods in float32: no reference to compare with")
    few = select(spans, sequence.GLANCE)
    fixed = dict(found.fixed)
    for name in decoder.ACTIVATIONS:
        measure = compared.against(found, noise.honest(checkpoint, name, torch_device), reading.ids)
        fixed[f"noise_{name}"] = f"{noise.level(list(measure(few))):.6g}"
    return replace(found, fixed=fixed)


def _words(checkpoint: Checkpoint) -> str:
    from mxharness.model.runner import weights_words

    return weights_words(checkpoint, "floor, even")
