"""Kernels that hand elements to threads otherwise on a GPU: the CPU runs that arrangement, too, with its bytes."""

from __future__ import annotations

import pytest
from mxharness.device import host
from mxharness.device.source import shipped
from mxharness.execution import execute
from mxharness.judge import gates, judge
from mxharness.ops import select


@pytest.mark.parametrize("source", ["quantize.cu", "dequant.cu", "kv_cache.cu"])
def test_a_gpus_arrangement_is_right_on_a_cpu(source):
    device = host.open_device(shipped().replaced(source, "#ifdef __CUDACC__", "#if 1"))
    for op in select(source):
        for case in op.cases[::2]:
            inputs = op.make_inputs(case)
            execution = execute(op, case, device, inputs)
            assert not execution.violations, case
            outcome = judge(op, case, gates(op, case)[0], "host", inputs, execution)
            assert outcome.passed, outcome.message
