"""Perplexity of a real model on real text, with everything that fixes the number stated beside it.

    NLL_t = -log softmax(logits at position t - 1)[id t],   perplexity = exp(mean of NLL over the scored t)

The join of the text's rows alone moves it by more than most kernel bugs: a result carries the hashes of model, text and
token ids and its protocol, and `agreement.compare` refuses two results that differ in any of them.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mxharness import __version__
from mxharness.errors import UserError
from mxharness.model import likelihood
from mxharness.model.kept import open_kept
from mxharness.model.ranks import ALONE, Ranks
from mxharness.model.tokenizer import encode, ids_sha256
from mxharness.protocols import DEFAULT_PROTOCOL, DEFAULT_WINDOWS, PROTOCOLS, Span, select, spans

if TYPE_CHECKING:
    from mxharness.model.checkpoint import Checkpoint
    from mxharness.model.likelihood import Ids
    from mxharness.model.runner import Runner
    from mxharness.text import Text

    Floats = np.ndarray[tuple[int], np.dtype[np.float32]]

OVERFLOW = 700.0
"""Nats: exp of more is no float64; a broken kernel gets there."""


class NothingToScoreError(UserError):
    """A text too short for one window of its protocol."""


class NotFiniteError(ArithmeticError):
    """A scored token has a NaN or infinite log likelihood: the check failed, there is no perplexity."""


@dataclass(frozen=True)
class Reading:
    """A text as a model's tokens, cut into windows, and what fixes all of it."""

    model: str
    model_sha256: str
    text: str
    """The text's label: what it is, or that it is not WikiText-2."""
    text_sha256: str
    ids: Ids
    ids_sha256: str
    """Of the token stream the windows were cut from: int32, little-endian."""
    protocol: str
    available: tuple[Span, ...]
    """Every window of the stream."""


@dataclass(frozen=True)
class Keep:
    """Where the likelihoods of every token are kept, a folder for each runner."""

    folder: Path
    resume: bool = False
    """Go on with what is there."""


@dataclass(frozen=True, eq=False)
class Result:
    """One measurement and everything that fixes it."""

    model: str
    model_sha256: str
    text: str
    """The text's label: what it is, or that it is not WikiText-2."""
    text_sha256: str
    ids_sha256: str
    """Of the token stream the windows were cut from: int32, little-endian."""
    tokens: int
    """Length of that stream."""
    protocol: str
    windows: int
    windows_available: int
    spans: tuple[Span, ...]
    scored: int
    """Tokens scored."""
    perplexity: float
    mean_nll: float
    """Nats per scored token."""
    nll: Floats
    """(scored,) nats, in the order of the text."""
    tokens_per_second: float
    """Tokens read, unscored ones included, by wall-clock time; 0 where all were on disk already."""
    backend: str
    """The runner's name: "float32", "decoded" or "kernels"."""
    weights: str
    activations: str
    arithmetic: str
    device_class: str

    def to_json(self) -> dict[str, Any]:
        """Every field but the windows and the single likelihoods, which are there as a digest."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in {"spans", "nll"}}
        return {**kept, "nll_sha256": hashlib.sha256(self.nll.astype("<f4").tobytes()).hexdigest()}


def read(checkpoint: Checkpoint, text: Text, protocol: str = DEFAULT_PROTOCOL, tokens: int | None = None) -> Reading:
    """The windows of a text. tokens: only the first that many tokens of the text are used.

    Raises UserError for an unknown protocol, a model without a tokenizer and a text that gives no window.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"no protocol '{protocol}'; there are {', '.join(PROTOCOLS)}")
    ids = encode(checkpoint.vocabulary, text.text)[:tokens]
    available = spans(PROTOCOLS[protocol], len(ids))
    if not available:
        raise NothingToScoreError(
            f"nothing to score: {text.label} gives {len(ids):,} tokens, {protocol} needs {PROTOCOLS[protocol].window}"
        )
    return Reading(
        checkpoint.name, checkpoint.sha256, text.label, text.sha256, ids, ids_sha256(ids), protocol, available
    )


def measure(
    reading: Reading,
    runner: Runner,
    *,
    windows: int | None = DEFAULT_WINDOWS,
    batch: int | None = None,
    progress: bool = False,
    keep: Keep | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """Perplexity of a model on a text.

    windows: how many evenly spaced windows, None for all. batch: windows at once; by default 1 on a CPU and 8 on a GPU.
    progress: a bar with tokens/s on stderr. keep: where the likelihoods of every token are kept, so that a measurement
    that was killed can go on. ranks: the processes that share the work; each gets the whole result.

    Raises NotFiniteError for NaN or Inf, UserError for a folder of `keep` that holds something else.
    """
    chosen = select(reading.available, windows)
    batch = batch or likelihood.default_batch(runner)
    groups = likelihood.batches(chosen, batch)
    kept = None
    if keep:
        identity = _identity(reading, runner, len(chosen), batch)
        opened = partial(open_kept, keep.folder / runner.name, identity)
        if ranks.rank == 0:
            kept = opened(resume=keep.resume)
        ranks.wait()
        kept = kept or opened(resume=True)
    sizes = [sum(span.stop - span.first for span in group) for group in groups]
    nll = np.zeros(sum(sizes), np.float32)
    measured, start = 0, time.perf_counter()
    name = f"{runner.name}, {runner.weights}" if progress and ranks.rank == 0 else ""
    whole = kept.whole(len(nll)) if kept else None
    with likelihood.progress_bar(
        name, [span for i, group in enumerate(groups) if ranks.mine(i) for span in group]
    ) as bar:
        for i, group in enumerate(groups):
            place = slice(sum(sizes[:i]), sum(sizes[: i + 1]))
            if not ranks.mine(i):
                continue
            if whole is not None:
                nll[place] = whole[place]
                continue
            part = kept.batch(i, sizes[i]) if kept else None
            if part is None:
                columns = likelihood.over_batch([runner], reading.ids, group, lambda _: likelihood.nll)
                part = np.concatenate([column["nll"] for column in columns]).astype(np.float32)
                _check_finite(part, group, runner)
                measured += likelihood.read(group)
                if kept:
                    kept.keep(i, part)
            nll[place] = part
            bar(likelihood.read(group))
    nll = ranks.gathered(nll)
    seconds = time.perf_counter() - start
    if kept and ranks.rank == 0 and whole is None:
        kept.finish(nll, chosen, len(groups))
    ranks.wait()
    mean = float(nll.mean(dtype="float64"))
    return Result(
        model=reading.model,
        model_sha256=reading.model_sha256,
        text=reading.text,
        text_sha256=reading.text_sha256,
        ids_sha256=reading.ids_sha256,
        tokens=len(reading.ids),
        protocol=reading.protocol,
        windows=len(chosen),
        windows_available=len(reading.available),
        spans=chosen,
        scored=len(nll),
        perplexity=perplexity_of(mean),
        mean_nll=mean,
        nll=nll,
        tokens_per_second=measured * ranks.count / seconds,
        backend=runner.name,
        weights=runner.weights,
        activations=runner.activations,
        arithmetic=runner.arithmetic,
        device_class=runner.device_class,
    )


def _identity(reading: Reading, runner: Runner, windows: int, batch: int) -> dict[str, object]:
    """What fixes every bit of a measurement, but the machine."""
    import torch

    return {
        "model": reading.model,
        "model_sha256": reading.model_sha256,
        "text": reading.text,
        "text_sha256": reading.text_sha256,
        "ids_sha256": reading.ids_sha256,
        "protocol": reading.protocol,
        "windows": windows,
        "batch": batch,
        "weights": runner.weights,
        "activations": runner.activations,
        "arithmetic": runner.arithmetic,
        "device_class": runner.device_class,
        "kernels": kernels_sha256() if runner.name == "kernels" else "",
        "torch": torch.__version__,
        "mxharness": __version__,
    }


def perplexity_of(nats: float) -> float:
    """Exp of a mean NLL; infinite where float64 ends."""
    return math.exp(nats) if nats < OVERFLOW else math.inf


def kernels_sha256() -> str:
    """Of every text under kernels/."""
    from mxharness.device.source import shipped

    return hashlib.sha256(repr(shipped().files).encode()).hexdigest()


def _check_finite(nll: Floats, group: Sequence[Span], runner: Runner) -> None:
    for span in group:
        part, nll = np.split(nll, [span.stop - span.first])
        bad = np.flatnonzero(~np.isfinite(part))
        if len(bad):
            hint = "; fp16 holds activations up to 65504, try bf16" if runner.activations == "fp16" else ""
            raise NotFiniteError(
                f"{len(bad)} of {len(part)} scored tokens of the window at token {span.start} have a NaN or infinite "
                f"log likelihood, the first is token {span.first + int(bad[0])} ({runner.name}, {runner.weights}{hint})"
            )
