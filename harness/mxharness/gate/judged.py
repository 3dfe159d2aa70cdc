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
from mxharness.gate import compared, noise, sequence, stored
from mxharness.gate.statistics import Estimate
from mxharness.gate.verdict import Failed, Judgement, Rules, Window, judge, moved
from mxharness.model import decoder, reference
from mxharness.protocols import DEFAULT_WINDOWS, Span, select

if TYPE_CHECKING:
    import torch

    from mxharness.device import Device
    from mxharness.gate.sequence import Measure
    from mxharness.gate.stored import Statistics
    from mxharness.model.checkpoint import Checkpoint
    from mxharness.model.decoder import Activations
    from mxharness.perplexity import Reading
    from mxharness.text import Text

NATS = 1e-3
"""How far a reference may move from its stored value, per token: another order of sums in torch moves it by less."""


@dataclass(frozen=True)
class Gated:
    """One model's gates."""

    title: str
    judgements: Mapping[Activations, Judgement]
    reference: str
    """What was compared with."""
    cost: Estimate | None
    """Of the format in log perplexity, where a baseline knows it."""
    notes: tuple[str, ...]

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
    cost: Estimate | None = None
    notes: list[str] = []
    if baseline is None:
        available = select(reading.available, windows)
        float32 = reference.decoded(checkpoint, device.torch_device)
        measures = {
            name: compared.together(float32, runners[name], reading.ids, progress=bars[name]) for name in runners
        }
    else:
        kept = stored.load(stored.find(baseline))
        kept.require(reading, _words(checkpoint))
        available = select(kept.spans, windows)
        cost = kept.cost(kept.spans)
        notes += _recomputed(kept, checkpoint, original, reading, device.torch_device)
        notes.append(f"the format moves perplexity by {moved(cost)}")
        noises = {name: float(kept.fixed.get(f"noise_{name}", "0")) for name in activations}
        measures = {n: compared.against(kept, runners[n], reading.ids, progress=bars[n]) for n in activations}
    rules = {name: Rules(LIMITS[name].relative, noise=noises[name]) for name in activations}
    judgements = sequence.run(available, [(measures[name], rules[name]) for name in activations])
    return Gated(
        title=f"{reading.model} on {reading.text}: {protocol}, kernels on {device.device_class} ({device.arithmetic})",
        judgements=dict(zip(activations, judgements, strict=True)),
        reference=f"baseline {baseline}" if baseline else "float32 on the same weights, run beside",
        cost=cost,
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
    """A reference's statistics with the divergence of an honest candidate of each dtype, on a few windows, beside."""
    reading = perplexity.read(checkpoint, text, protocol, tokens)
    spans = select(reading.available, windows)
    found = stored.collect(
        checkpoint, reading, spans, torch_device, original=original, top=top, drawn=drawn, progress=progress
    )
    fixed = dict(found.fixed)
    few = select(spans, sequence.GLANCE)
    for name in decoder.ACTIVATIONS:
        measure = compared.against(found, noise.honest(checkpoint, name, torch_device), reading.ids)
        kl = np.concatenate([window.kl for window in measure(few)])
        if not np.isfinite(kl).all():
            raise UserError(f"{checkpoint.name} gives NaN or infinities with activations in {name}; take another dtype")
        # Torch's norms square in the dtype itself; where that overflows it is no noise and widens nothing.
        fixed[f"noise_{name}"] = f"{kl.mean() if kl.mean() < Rules(0.0).divergence else 0.0:.6g}"
    return replace(found, fixed=fixed)


def _words(checkpoint: Checkpoint) -> str:
    from mxharness.model.runner import weights_words

    return weights_words(checkpoint, "floor, even")


def _recomputed(
    kept: Statistics,
    checkpoint: Checkpoint,
    original: Checkpoint | None,
    reading: Reading,
    torch_device: torch.device,
) -> list[str]:
    """Run both references again on a few windows. Raises Failed where one is not what is stored."""
    few: tuple[Span, ...] = select(kept.spans, min(sequence.GLANCE, DEFAULT_WINDOWS))
    now = stored.collect(checkpoint, reading, few, torch_device, original=original, top=1, drawn=1)
    notes = []
    for column, what in (("nll", "MXFP4 decoded to float32"), ("original", "the float32 original")):
        before = np.concatenate([kept.part(column, span) for span in few]).astype(np.float64)
        change = now.columns[column].astype(np.float64) - before
        if not np.isfinite(change).all() or abs(change.mean()) > NATS:
            raise Failed(
                f"{what} is not what the baseline holds: {change.mean():+.2e} nats per token over {len(few)} windows, "
                f"{NATS:g} allowed; the format, the quantiser or torch's arithmetic has changed"
            )
        same = f"{change.mean():+.1e} nats per token, at most {abs(change).max():.1e}"
        notes.append(f"{what} again, {len(few)} windows: {same if change.any() else 'the same bits'}")
    return notes
