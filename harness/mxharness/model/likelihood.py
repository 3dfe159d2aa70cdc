"""The negative log likelihood of every scored token of a model's windows."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from mxharness.model import llama

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mxharness.model.llama import Llama
    from mxharness.protocols import Span

W = TypeVar("W")
_HEAD_ROWS = 1024  # positions whose logits exist at once: 200 MB of float32 at 49,152 words


class NotFiniteError(ArithmeticError):
    """A scored token has a NaN or infinite log likelihood: the check failed, there is no perplexity."""


def token_nll(
    model: Llama[W],
    ids: np.ndarray[tuple[int], np.dtype[np.int32]],
    windows: Sequence[Span],
    *,
    batch: int = 1,
    progress: bool = False,
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """The NLL of every scored token of `windows`, in nats, in their order. Raises NotFiniteError for NaN or Inf."""
    import numpy as np
    import torch
    from tqdm import tqdm  # type: ignore[import-untyped]  # tqdm ships no types

    stream = torch.from_numpy(ids.astype(np.int64))
    parts = []
    bar = tqdm(
        total=sum(span.stop - span.start for span in windows),
        desc=f"{model.backend.name}, {model.backend.weights}",
        unit="tok",
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )
    with torch.inference_mode(), bar:
        for group in _batches(windows, batch):
            read = torch.stack([stream[span.start : span.stop] for span in group])
            states = llama.hidden_states(model, read)
            for span, rows in zip(group, states, strict=True):
                nll = _nll(model, rows[span.first - 1 - span.start : -1], stream[span.first : span.stop])
                _check_finite(nll, span, model)
                parts.append(nll)
            bar.update(read.numel())
    return np.concatenate(parts)


def _batches(windows: Sequence[Span], batch: int) -> Iterator[list[Span]]:
    """Consecutive windows of one length, at most `batch` at a time."""
    group: list[Span] = []
    for span in windows:
        if group and (len(group) == batch or span.stop - span.start != group[0].stop - group[0].start):
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def _nll(model: Llama[W], states: torch.Tensor, targets: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """States (R, hidden) that predict targets (R,) -> (R,) float32."""
    import torch

    parts = []
    targets = targets.to(states.device)
    for row in range(0, len(targets), _HEAD_ROWS):
        logits = llama.logits(model, states[row : row + _HEAD_ROWS])
        parts.append(torch.nn.functional.cross_entropy(logits, targets[row : row + _HEAD_ROWS], reduction="none"))
    nll: np.ndarray[tuple[int], np.dtype[np.float32]] = torch.cat(parts).cpu().numpy()
    return nll


def _check_finite(nll: np.ndarray[tuple[int], np.dtype[np.float32]], span: Span, model: Llama[W]) -> None:
    import numpy as np

    bad = np.flatnonzero(~np.isfinite(nll))
    if len(bad):
        hint = "; fp16 holds activations up to 65504, try bf16" if model.backend.activations == "fp16" else ""
        raise NotFiniteError(
            f"{len(bad)} of {len(nll)} scored tokens of the window at token {span.start} have a NaN or infinite log "
            f"likelihood, the first is token {span.first + int(bad[0])} ({model.backend.name}, "
            f"{model.backend.weights}{hint})"
        )
