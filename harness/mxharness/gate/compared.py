"""Windows of a candidate beside its reference: both run together, or the candidate against what is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from mxharness.gate import divergence
from mxharness.gate.divergence import Cells, Distance
from mxharness.gate.verdict import Window
from mxharness.model import likelihood

if TYPE_CHECKING:
    from mxharness.gate.sequence import Measure
    from mxharness.gate.stored import Statistics
    from mxharness.model.likelihood import Columns, Ids, Reduce
    from mxharness.model.runner import Runner
    from mxharness.protocols import Span


def together(reference: Runner, candidate: Runner, ids: Ids, *, progress: str = "") -> Measure:
    """Both models on the same windows; KL in full. They must be on one torch device."""

    def reduce(rows: slice, targets: torch.Tensor, logits: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
        first, second = (likelihood.nll(rows, targets, [each])["nll"] for each in logits)
        return {"reference": first, "candidate": second, **_columns(divergence.in_full(logits[0], logits[1]))}

    return _measure([reference, candidate], ids, lambda _: reduce, progress)


def against(stored: Statistics, candidate: Runner, ids: Ids, *, progress: str = "") -> Measure:
    """A candidate against a reference's stored statistics; KL estimated from cells. For windows that are stored."""

    def reduce_of(span: Span) -> Reduce:
        cells, nll = stored.window(span)

        def reduce(rows: slice, targets: torch.Tensor, logits: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
            part = Cells(*(torch.from_numpy(each[rows]).to(logits[0].device) for each in cells))
            found = divergence.from_cells(part, logits[0])
            own = likelihood.nll(rows, targets, logits)["nll"]
            return {"reference": torch.from_numpy(nll[rows]), "candidate": own, **_columns(found)}

        return reduce

    return _measure([candidate], ids, reduce_of, progress)


def _columns(found: Distance) -> dict[str, torch.Tensor]:
    return {"kl": found.kl, "bound": found.bound, "same": found.same}


def _measure(runners: Sequence[Runner], ids: Ids, reduce_of: Callable[[Span], Reduce], progress: str) -> Measure:
    def measure(spans: Sequence[Span]) -> Iterator[Window]:
        batch = likelihood.default_batch(runners[0])
        rows = likelihood.over_windows(runners, ids, spans, reduce_of, batch=batch, progress=progress)
        for span, columns in zip(spans, rows, strict=True):
            yield _window(span, columns)

    return measure


def _window(span: Span, columns: Columns) -> Window:
    wide = {name: column.astype(np.float64) for name, column in columns.items()}
    return Window(span, wide["reference"], wide["candidate"], wide["kl"], wide["bound"], wide["same"])
