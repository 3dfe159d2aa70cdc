"""Checks that fail, by a tolerance nothing can keep or a wrong reference, and the folder that one leaves."""

from __future__ import annotations

from dataclasses import replace

from mxharness import repro
from mxharness.execution import execute
from mxharness.judge import judge
from mxharness.ops import find

SUM = next(case for case in find("mma").cases if case.regime == "normal")
TIGHT = 2.0**-60
HALF_IS_WRONG = """\
from dataclasses import replace

import pytest

def wrong(op):
    def golden(case, tensors):
        return {name: replace(want, value=-want.value) for name, want in op.golden(case, tensors).items()}
    return replace(op, golden=golden)

@pytest.mark.gates("exact")
def test_exact(op, case, gate, check):
    check(wrong(op) if case.dtype == "fp16" else op, case, gate)
"""
"""The beginning of a test file whose exact checks fail in half precision."""


def save(folder, op, case, gate, device):
    """A folder of a check that fails; (its path, the verdict)."""
    inputs = op.make_inputs(case)
    execution = execute(op, case, device, inputs)
    outcome = judge(op, case, gate, device.device_class, inputs, execution, device)
    assert not outcome.passed
    return repro.save(folder, str(case), op, case, gate, device, inputs, execution.outputs, outcome), outcome


def narrow(op):
    """The operator under a tolerance that no kernel keeps."""
    return replace(op, tolerance=replace(op.tolerance, unit_roundoff=TIGHT))
