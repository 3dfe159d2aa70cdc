"""Whether a gate's references hold: they repeat themselves, they are what is stored, and what the format costs them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mxharness.gate import compared, sequence, stored
from mxharness.gate.statistics import Estimate, clustered
from mxharness.gate.verdict import Failed, Window
from mxharness.model import likelihood
from mxharness.model.runner import weights_words
from mxharness.protocols import Span, select

if TYPE_CHECKING:
    import torch

    from mxharness.gate.sequence import Measure
    from mxharness.gate.stored import Statistics
    from mxharness.model.checkpoint import Checkpoint
    from mxharness.model.likelihood import Ids
    from mxharness.model.runner import Runner
    from mxharness.perplexity import Reading

NATS = 1e-3
"""How far a reference may move from its stored value, per token: another order of sums in torch moves it by less."""


@dataclass(frozen=True)
class Repeated:
    """A reference beside itself, run twice on the same windows."""

    windows: int
    kl: float
    """Mean, nats per token."""
    largest: float
    """Largest |difference| of one token's NLL, nats."""

    @property
    def note(self) -> str:
        """Whether the two runs agree, and if not by how much they differ."""
        windows = f"{self.windows} window{'s' if self.windows > 1 else ''}"
        if self.kl == 0 and self.largest == 0:
            return f"the reference twice, {windows}: the same bits"
        return (
            f"the reference twice, {windows}: NOT the same bits, mean KL {self.kl:.1e}, a token's likelihood moves by "
            f"up to {self.largest:.1e} nats; no verdict is finer than this noise"
        )


def repeated(reference: Runner, ids: Ids, spans: Sequence[Span]) -> Repeated:
    """Run a reference twice on one batch of `spans`, the first of them."""
    batch = spans[: likelihood.default_batch(reference)]
    windows = list(compared.together(reference, reference, ids)(batch))
    kl, change = (
        np.concatenate(each)
        for each in ([window.kl for window in windows], [window.candidate - window.reference for window in windows])
    )
    return Repeated(len(windows), float(kl.mean()), float(abs(change).max()))


def recomputed(
    kept: Statistics,
    checkpoint: Checkpoint,
    original: Checkpoint | None,
    reading: Reading,
    torch_device: torch.device,
) -> list[str]:
    """Run both references again on a few windows, and say how near they are to what is stored.

    original: as in `stored.collect`. Raises Failed where one of them, or what the format costs, has moved by more than
    NATS.
    """
    few: tuple[Span, ...] = select(kept.spans, sequence.GLANCE)
    now = stored.collect(checkpoint, reading, few, torch_device, original=original, top=1, drawn=1)
    decoded, unrounded = (
        now.columns[column].astype(np.float64)
        - np.concatenate([kept.part(column, span) for span in few]).astype(np.float64)
        for column in ("nll", "original")
    )
    notes = []
    for what, change in (
        ("MXFP4 decoded to float32", decoded),
        ("the float32 original", unrounded),
        ("what the format costs", decoded - unrounded),
    ):
        if not np.isfinite(change).all() or abs(change.mean()) > NATS:
            raise Failed(
                f"{what} is not what the baseline holds: {change.mean():+.2e} nats per token over {len(few)} windows, "
                f"{NATS:g} allowed; the format, the quantiser or torch's arithmetic has changed"
            )
        same = f"{change.mean():+.1e} nats per token, at most {abs(change).max():.1e}"
        notes.append(f"{what} again, {len(few)} windows: {same if change.any() else 'the same bits'}")
    return notes


def remembering(measure: Measure, seen: dict[Span, Window]) -> Measure:
    """The same measure, which leaves every window that it gives in `seen`."""

    def measured(spans: Sequence[Span]) -> Iterable[Window]:
        for window in measure(spans):
            seen[window.span] = window
            yield window

    return measured


def has_original(checkpoint: Checkpoint) -> bool:
    """Whether some of the weights that the kernels take in MXFP4 are wider in the checkpoint."""
    return "float32" in weights_words(checkpoint)


def cost(original: Runner, ids: Ids, seen: Mapping[Span, Window], *, progress: str = "") -> Estimate:
    """What the format costs in log perplexity: the reference of windows that were read against the original weights.

    Raises Failed where the original weights give NaN or Inf.
    """
    spans = sorted(seen, key=lambda span: span.start)
    batch = likelihood.default_batch(original)
    rows = likelihood.over_windows([original], ids, spans, lambda _: likelihood.nll, batch=batch, progress=progress)
    differences = [seen[span].reference - row["nll"].astype(np.float64) for span, row in zip(spans, rows, strict=True)]
    if not all(np.isfinite(each).all() for each in differences):
        raise Failed(f"the original weights ({original.weights}) give NaN or infinite likelihoods")
    return clustered(
        np.array([float(each.sum()) for each in differences]), np.array([float(len(each)) for each in differences])
    )
