"""What a failing check says: what, where, how bad, what it looks like, what to paste."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch

from mxharness import pattern
from mxharness.judge import values
from mxharness.judge.compare import Verdict
from mxharness.op import Case, Gate, Op, Tensors
from mxharness.pattern import Places

Along = Callable[[str], str]
"""Output to a phrase about K, empty where nothing is to be said (localise.py)."""


def compose(
    op: Op,
    case: Case,
    gate: Gate,
    outputs: Tensors,
    verdicts: Mapping[str, Verdict],
    sentences: list[str],
    places: Mapping[str, Places],
    along_k: Along,
) -> str:
    """What, where, how bad, what to paste."""
    sizes = "x".join(map(str, case.shape))
    parts = list(sentences)
    searched = False
    for name, verdict in verdicts.items():
        count = int(verdict.bad.sum())
        if count:
            k = "" if searched else along_k(name)  # of the first alone: what follows has its fault
            searched = searched or bool(k)
            parts.append(_describe(op, gate, name, outputs[name], verdict, count, places.get(name), k))
    return f"{op.name} {sizes}: {'; '.join(parts)}; paste into {op.name}.CASES: {case!r}"


def _describe(
    op: Op, gate: Gate, name: str, output: torch.Tensor, verdict: Verdict, count: int, places: Places | None, k: str
) -> str:
    reason = {
        "bound": f"past the bound ({op.tolerance.why})",
        "composed": f"past the whole function's bound ({op.tolerance.why})",
        "exact": f"not the exact value ({op.tolerance.why})",
        "exact-arithmetic": "not the one right value (every partial sum is exact, so any order gives the same bits)",
        "predicted": "not the predicted bits (another order, another rounding or a fault)",
    }[gate]
    special = ""
    if output.is_floating_point():
        wrong_nan = int((output.isnan() & ~verdict.want.isnan()).sum())
        wrong_inf = int((output.isinf() & verdict.bad).sum())
        special = "".join(
            f", {number} of them {what}" for number, what in ((wrong_nan, "NaN"), (wrong_inf, "Inf")) if number
        )
    distance = torch.where(verdict.bad, (output.double() - verdict.want).abs().nan_to_num(torch.inf), -1.0)
    worst_by = torch.where(verdict.bad, verdict.ratio, -1.0) if gate in ("bound", "composed") else distance
    flat = int(worst_by.argmax())
    place = [int(i) for i in np.unravel_index(flat, output.shape)]
    got, want = output.flatten()[flat].item(), verdict.want.flatten()[flat].item()
    ratio = float(verdict.ratio.flatten()[flat])
    bounded = gate in ("bound", "composed")
    times = f", {ratio:.3g}x the bound" if bounded and math.isfinite(ratio) else ""
    digits = ".6g" if bounded else ".9g"
    nan = output.isnan() & verdict.bad if output.is_floating_point() else torch.zeros_like(verdict.bad)
    holes = f"the NaN in {pattern.describe(nan, places)}" if 0 < int(nan.sum()) < count else ""
    looks = [
        pattern.describe(verdict.bad, places),
        holes,
        values.describe(output, verdict.want, verdict.bad, places),
        k,
    ]
    return (
        f"{count} of {output.numel()} elements of {name} {reason}{special}; "
        f"worst {place}: got {got:{digits}}, should be {want:{digits}}{times}; "
        f"pattern: {', '.join(text for text in looks if text)}"
    )
