"""Kernels that hand elements to threads otherwise on a GPU: the CPU runs that arrangement, too, with its bytes."""

from __future__ import annotations

import pytest
import torch
from mxharness import functional
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


@pytest.mark.parametrize("largest", [2.0**-126, 1.0, 1.75, 2.0**127])
def test_pairs_are_encoded_as_single_elements_are(largest):
    """All bfloat16 up to the largest of the block, of both signs."""
    text = shipped().replaced("quantize.cu", "#ifdef __CUDACC__", "#if 1")
    numbers = torch.arange(1 << 16).to(torch.int32).to(torch.uint16).view(torch.bfloat16)
    numbers = numbers[numbers.abs() <= largest]
    x = torch.full((-(-len(numbers) // 31), 32), largest, dtype=torch.bfloat16)
    padded = torch.zeros(len(x) * 31, dtype=torch.bfloat16)
    padded[: len(numbers)] = numbers
    x[:, 1:] = padded.view(-1, 31)
    pairs, single = (functional.quantize(x, device=host.open_device(sources)) for sources in (text, shipped()))
    assert torch.equal(pairs.codes, single.codes)
    assert torch.equal(pairs.scales, single.scales)
