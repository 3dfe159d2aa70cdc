"""The same bits again: run to run, whatever the output buffer held before, and whatever else is in the batch."""

from __future__ import annotations

from mxharness.faults.invariance import differs_alone, differs_between_runs, differs_in_a_tall_batch
from mxharness.ops import cheapest

TALL = 8
"""Cases an operator whose rows are repeated to 2,048: the cheapest."""


def test_repeatable(op, outputs):
    for case in op.cases:
        problem = differs_between_runs(op, case, outputs)
        assert not problem, problem


def test_rows_do_not_depend_on_the_batch(op, outputs):
    compared = 0
    for case in op.cases:
        problem, count = differs_alone(op, case, outputs)
        assert not problem, problem
        compared += count
    assert compared > 0


def test_a_batch_of_2048_has_its_rows_bits(op, outputs):
    found = [differs_in_a_tall_batch(op, case, outputs) for case in cheapest(op, TALL)]
    problem = next(filter(None, found), "")
    assert not problem, problem
    assert "" in found
