"""Kernels that hand elements to threads otherwise on a GPU: the CPU runs that arrangement, too, with its bytes."""

from __future__ import annotations

from itertools import product

import pytest
from mxharness.device import host
from mxharness.device.source import shipped
from mxharness.execution import execute
from mxharness.judge import judge
from mxharness.op import Case
from mxharness.ops import find

SHAPES = ((3, 49), (2, 72), (5, 160), (3, 4224), (300, 96))
"""Rows that end in a part of a block, at and beside 16 bytes; more than one block of threads, the last in part."""


@pytest.mark.parametrize("name", ["quantize", "dequant"])
def test_a_gpus_arrangement_is_right_on_a_cpu(name):
    op = find(name)
    device = host.open_device(shipped().replaced(op.source, "#ifdef __CUDACC__", "#if 1"))
    regime = {"quantize": "ties", "dequant": "codes"}[name]
    for shape, dtype in product(SHAPES, ("fp32", "bf16", "fp16")):
        case = Case(name, shape, regime=regime, dtype=dtype)
        inputs = op.make_inputs(case)
        execution = execute(op, case, device, inputs)
        assert not execution.violations
        outcome = judge(op, case, "exact", "host", inputs, execution)
        assert outcome.passed, outcome.message
