"""The same bits again: run to run, whatever the output buffer held before, and whatever else is in the batch.

`run(op, case, inputs, poison=..)` executes a case and returns its outputs. Every function gives one sentence about what
differs, or "" where nothing does.
"""

from __future__ import annotations

from collections.abc import Callable

from mxharness.errors import UserError
from mxharness.judge import digest
from mxharness.op import Case, Op, Tensors

Run = Callable[..., Tensors]

POISONS = (0xFF, 0x00, 0x55)
MOST = 2048
ROWS = (1, 2, 7, 8, 9, 16, 33, 64, 128, 512, 1024)
"""Batch sizes to cut a case down to: both sides of every switch between kernels."""


def differs_between_runs(op: Op, case: Case, run: Run) -> str:
    """Whether outputs depend on what their memory held before the launch."""
    inputs = op.make_inputs(case)
    digests = {digest(run(op, case, inputs, poison=poison)) for poison in POISONS}
    if len(digests) == 1:
        return ""
    return f"{case}: outputs differ between runs, or some element is never written: {case!r}"


def differs_alone(op: Op, case: Case, run: Run) -> tuple[str, int]:
    """Whether rows alone have other bits than in their batch, and how many cuts were compared."""
    inputs = op.make_inputs(case)
    whole = run(op, case, inputs)
    rows = next(iter(whole.values())).shape[0]
    compared = 0
    for count in (count for count in ROWS if count < rows):
        for first in {0, rows - count}:
            here = slice(first, first + count)
            part = {name: tensor[here].clone() if name in op.row_inputs else tensor for name, tensor in inputs.items()}
            alone = run(op, case, part)
            compared += 1
            if digest(alone) != digest({name: tensor[here] for name, tensor in whole.items()}):
                place = f"{op.row_axis} {first} to {first + count - 1}"
                return f"{case}: {place} differ alone and in the batch: {case!r}", compared
    return "", compared


def differs_in_a_tall_batch(op: Op, case: Case, run: Run) -> str | None:
    """Whether rows repeated until there are MOST have other bits; None where they may not be given twice."""
    inputs = op.make_inputs(case)
    whole = run(op, case, inputs)
    rows = next(iter(whole.values())).shape[0]
    copies = -(-MOST // rows)
    tall = {
        name: tensor.repeat(copies, *(1,) * (tensor.ndim - 1)) if name in op.row_inputs else tensor
        for name, tensor in inputs.items()
    }
    try:
        many = run(op, case, tall)
    except UserError:  # as pages of a cache
        return None
    for name, tensor in many.items():
        repeated = whole[name].repeat(copies, *(1,) * (tensor.ndim - 1))
        if tensor.shape != repeated.shape:
            return f"{case}: {name} has {tensor.shape[0]} {op.row_axis} for {copies * rows}: {case!r}"
        if digest({name: repeated}) != digest({name: tensor}):
            return f"{case}: {name} differs in a batch of {copies * rows} {op.row_axis}: {case!r}"
    return ""
