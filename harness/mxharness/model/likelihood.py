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


def window_nll(
    model: Llama[W],
    ids: np.ndarray[tuple[int], np.dtype[np.int32]],
    windows: Sequence[Span],
    *,
    batch: int = 1,
    progress: bool = False,
) -> Iterator[np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """For each window, in order, the NLL of its scored tokens in nats. progress: a bar with tokens/s on stderr."""
    import numpy as np
    import torch
    from tqdm import tqdm

    stream = torch.from_numpy(ids.astype(np.int64))
    bar = tqdm(
        total=sum(span.stop - span.start for span in windows),
        desc=f"{model.backend.name}, {model.backend.weights}",
        unit="tok",
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )
    with bar:
        for group in _batches(windows, batch):
            read = torch.stack([stream[span.start : span.stop] for span in group])
            with torch.inference_mode():
                states = llama.hidden_states(model, read)
                found = [
                    _nll(model, rows[span.first - 1 - span.start : -1], stream[span.first : span.stop])
                    for span, rows in zip(group, states, strict=True)
                ]
            bar.update(read.numel())
            yield from found


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
