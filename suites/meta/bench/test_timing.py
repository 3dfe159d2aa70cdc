"""Graphs that are timed, what they must hold and write, and what a timing is made of."""

from __future__ import annotations

import pytest
import torch
from mxharness import figures, timing
from mxharness.bench import products, work
from mxharness.device import open_device
from mxharness.errors import KernelFailure
from mxharness.functional import ffn_forward, gemm
from mxharness.timing import Subject


def test_as_many_copies_as_leave_the_cache_cold_and_calls_as_make_a_graph_long():
    assert timing.copies_for(timing.WORKING_SET) == 2
    assert timing.copies_for(timing.WORKING_SET // 10) == 10
    assert timing.copies_for(1) == timing.MOST_COPIES
    assert timing.calls_for(38, 1.4e-6) == 76
    assert timing.calls_for(10, 3e-6) == 60
    assert timing.calls_for(5, 326e-6) == 5
    assert timing.calls_for(2, 10.0) == 2


def test_a_graph_that_lacks_kernels_is_refused():
    timing.check_captured(40, 40, 40)
    with pytest.raises(KernelFailure, match="did not capture the kernels: it holds 0 of them, and 40 were launched"):
        timing.check_captured(0, 40, 40)
    with pytest.raises(KernelFailure, match="holds 79 of them, and 80 were launched in 40 calls"):
        timing.check_captured(79, 80, 40)
    with pytest.raises(KernelFailure, match="holds 39"):
        timing.check_captured(39, 0, 40)


def test_a_graph_that_writes_nothing_or_other_bits_is_refused():
    right = [torch.ones(3), torch.full((3,), 2.0)]
    timing.check_written([right[0], right[1], right[0]], right, exact=True)
    with pytest.raises(KernelFailure, match="call 1 of 2 of the CUDA graph gave other bits"):
        timing.check_written([right[0], right[0]], right, exact=True)
    timing.check_written([right[1], right[0]], right, exact=False)
    for like in (torch.ones(3), torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.uint8)):
        with pytest.raises(KernelFailure, match="call 0 of 1 of the CUDA graph wrote nothing"):
            timing.check_written([timing.unwritten(like)], [like], exact=False)


def test_launches_are_counted_for_what_a_graph_must_hold(meter):
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    weight = work.weights(meter, (64, 64), 1)[0]
    gemm(x, weight, device=meter)
    assert meter.launches == 1
    ffn_forward(x, weight, weight, device=meter)
    assert meter.launches == 4


def test_subjects_take_turns_and_each_call_is_on_the_next_copy():
    seen = []
    subjects = {name: Subject(lambda i, name=name: seen.append((name, i)), 2) for name in "ab"}
    found = timing.clock_times(subjects, 1e-6, 0.0)
    assert seen[:4] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert found["a"].repeats == len(seen) / 2 >= 4
    assert found["a"].low <= found["a"].us <= found["a"].high


def test_a_timing_is_the_median_of_its_repeats_and_their_deciles():
    found = figures.timing([i * 1e-5 for i in range(1, 12)], calls=10)
    assert (found.us, found.low, found.high) == pytest.approx((6.0, 2.0, 10.0))
    assert found.spread == pytest.approx(8 / 6)
    assert (found.repeats, found.calls) == (11, 10)


def test_what_a_copy_gives_is_never_taken_for_memory_that_nobody_wrote():
    rival = products.copying(open_device("host"), 1_024)
    outputs = [rival.call(i) for i in range(rival.copies)]
    assert len(outputs) > 255  # as many as a byte has values
    timing.check_written(outputs, outputs, exact=False)
