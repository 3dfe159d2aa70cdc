"""What models say of every scored token of their windows: negative log likelihoods, or any function of the logits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from mxharness.progress import counting

if TYPE_CHECKING:
    from mxharness.model.runner import Runner
    from mxharness.protocols import Span

Ids = np.ndarray[tuple[int], np.dtype[np.int32]]
Columns = Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]
"""Names to values, a row for each scored token."""
Reduce = Callable[[slice, torch.Tensor, Sequence[torch.Tensor]], Mapping[str, torch.Tensor]]
"""(rows among the window's scored tokens, their ids (R,), the runners' logits (R, vocabulary)) -> columns of R rows."""
HEAD_ROWS = 256
"""Positions whose logits exist at once: 50 MB of float32 at 49,152 words."""


def batches(windows: Sequence[Span], size: int) -> list[list[Span]]:
    """Consecutive windows of one length, at most `size` at a time: what goes through a model together."""
    groups: list[list[Span]] = []
    for span in windows:
        last = groups[-1] if groups else []
        if last and len(last) < size and span.stop - span.start == last[0].stop - last[0].start:
            last.append(span)
        else:
            groups.append([span])
    return groups


def over_batch(
    runners: Sequence[Runner], ids: Ids, group: Sequence[Span], reduce_of: Callable[[Span], Reduce]
) -> list[Columns]:
    """The columns of each window of one batch; runners on one device.

    ids (T,) int32: the stream. reduce_of: for a window the function that makes columns of logits.

    Raises UserError where a window or an id does not fit the model.
    """
    stream = torch.from_numpy(ids.astype(np.int64))
    read = torch.stack([stream[span.start : span.stop] for span in group])
    with torch.inference_mode():
        states = [runner.hidden_states(read) for runner in runners]
        return [
            _columns(
                runners,
                [rows[i, span.first - 1 - span.start : -1] for rows in states],
                stream[span.first : span.stop].to(states[0].device),
                reduce_of(span),
            )
            for i, span in enumerate(group)
        ]


def over_windows(
    runners: Sequence[Runner],
    ids: Ids,
    windows: Sequence[Span],
    reduce_of: Callable[[Span], Reduce],
    *,
    batch: int = 1,
    progress: str = "",
) -> Iterator[Columns]:
    """The columns of each window, in order; arguments as in `over_batch`. progress: the name of a bar on stderr."""
    with progress_bar(progress, windows) as shown:
        for group in batches(windows, batch):
            yield from over_batch(runners, ids, group, reduce_of)
            shown(read(group))


def nll(_rows: slice, targets: torch.Tensor, logits: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The column "nll": -log softmax(logits)[target] in nats, float32."""
    return {"nll": torch.nn.functional.cross_entropy(logits[0], targets, reduction="none")}


def read(windows: Sequence[Span]) -> int:
    """Tokens that go through a model, unscored ones included."""
    return sum(span.stop - span.start for span in windows)


@contextmanager
def progress_bar(name: str, windows: Sequence[Span]) -> Iterator[Callable[[int], object]]:
    """A bar on stderr with tokens/s, none without a name; the function it gives counts tokens."""
    from tqdm import tqdm

    interval, total = 0.5 if sys.stderr.isatty() else 10, read(windows)
    bar = tqdm(total=total, desc=name, unit="tok", disable=not name, mininterval=interval)
    with bar, counting("tokens", total) as count:

        def done(tokens: int) -> None:
            bar.update(tokens)
            count(tokens)

        yield done


def default_batch(runner: Runner) -> int:
    """Windows at once: one on a CPU, eight on a GPU."""
    return 8 if runner.torch_device.type == "cuda" else 1


def _columns(
    runners: Sequence[Runner], states: Sequence[torch.Tensor], targets: torch.Tensor, reduce: Reduce
) -> Columns:
    parts: list[Mapping[str, torch.Tensor]] = []
    for row in range(0, len(targets), HEAD_ROWS):
        rows = slice(row, min(row + HEAD_ROWS, len(targets)))
        logits = [runner.logits(state[rows]) for runner, state in zip(runners, states, strict=True)]
        parts.append(reduce(rows, targets[rows], logits))
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
