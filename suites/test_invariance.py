"""The same bits again: run to run, whatever the output buffer held before, and whatever else is in the batch."""

from __future__ import annotations

from mxharness.errors import UserError
from mxharness.judge import digest

MOST, CHEAPEST = 2048, 8
ROWS = (1, 2, 7, 8, 9, 16, 33, 64, 128, 512, 1024)
"""Batch sizes to cut a case down to: both sides of every switch between kernels."""


def test_repeatable(op, outputs):
    for case in op.cases:
        inputs = op.make_inputs(case)
        digests = {digest(outputs(op, case, inputs, poison=poison)) for poison in (0xFF, 0x00, 0x55)}
        assert len(digests) == 1, f"{case}: outputs differ between runs, or some element is never written: {case!r}"


def test_rows_do_not_depend_on_the_batch(op, outputs):
    compared = 0
    for case in op.cases:
        inputs = op.make_inputs(case)
        whole = outputs(op, case, inputs)
        rows = next(iter(whole.values())).shape[0]
        for count in (count for count in ROWS if count < rows):
            for first in {0, rows - count}:
                here = slice(first, first + count)
                part = {
                    name: tensor[here].clone() if name in op.row_inputs else tensor for name, tensor in inputs.items()
                }
                alone = outputs(op, case, part)
                same = digest(alone) == digest({name: tensor[here] for name, tensor in whole.items()})
                assert same, (
                    f"{case}: {op.row_axis} {first} to {first + count - 1} differ alone and in the batch: {case!r}"
                )
                compared += 1
    assert compared > 0


def test_a_batch_of_2048_has_its_rows_bits(op, outputs):
    """The cheapest cases, their rows repeated until there are as many."""
    made = {case: op.make_inputs(case) for case in op.cases}
    compared = 0
    for case in sorted(made, key=lambda case: sum(tensor.numel() for tensor in made[case].values()))[:CHEAPEST]:
        inputs = made[case]
        whole = outputs(op, case, inputs)
        rows = next(iter(whole.values())).shape[0]
        copies = -(-MOST // rows)
        tall = {
            name: tensor.repeat(copies, *(1,) * (tensor.ndim - 1)) if name in op.row_inputs else tensor
            for name, tensor in inputs.items()
        }
        try:
            many = outputs(op, case, tall)
        except UserError:  # rows that may not be given twice, as pages of a cache
            continue
        compared += 1
        assert {tensor.shape[0] for tensor in many.values()} == {copies * rows}
        for name, tensor in many.items():
            alike = digest({name: whole[name].repeat(copies, *(1,) * (tensor.ndim - 1))}) == digest({name: tensor})
            assert alike, f"{case}: {name} differs in a batch of {copies * rows} {op.row_axis}: {case!r}"
    assert compared > 0
