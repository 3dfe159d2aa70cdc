"""How long a call takes: on a GPU from CUDA graphs over rotating copies, on the CPU by the wall clock.

One CUDA graph makes many calls, each with other copies of weights and activations, which together exceed the L2 cache
as a model's layers do: neither launches nor a warm cache are measured. A kernel that went to another stream than the
captured one would be missing from the graph without a word, so its nodes are counted and its outputs compared.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch

from mxharness.errors import KernelFailure
from mxharness.figures import Timing, timing

Call = Callable[[int], torch.Tensor]
"""Makes the i-th call, on the copies that are its turn; what it computed."""

WORKING_SET = 160 << 20
"""Bytes that the rotating copies reach together: three times the L2 cache of an H100 (50 MB)."""
MOST_COPIES = 512
"""Of tensors so small that the copies fit in the cache all the same; a row says how many bytes they were."""
_GRAPH_SECONDS = 1e-3
"""So long should a graph take at least, so that what lies between two replays (some 2 us) does not count."""
_MOST_CALLS = 64
"""A graph makes so many calls to get there, or one on each copy where there are more copies."""
_ROUNDS = 3
"""Those who are compared take turns so often, so that a clock that changes meets all of them."""
_LEAST, _MOST = 4, 20
"""Replays in a round."""
_WORK = {0, 1, 2}
"""Nodes of a graph that do something: kernels, copies, fills (CUgraphNodeType)."""
_NOT_WRITTEN = {torch.uint8: 0xA5, torch.int32: -7, torch.int64: -7}
"""What no call gives throughout; NaN for floats."""


@dataclass(frozen=True)
class Subject:
    """Something to be timed."""

    call: Call
    copies: int
    """Call i works on copy i % copies."""
    own: bool = True
    """What is the project's own must give the same bits in the graph as outside, and fails where it cannot be timed.

    Somebody else's must write something, and where it cannot be timed the reason stands in the answer: not everybody's
    bits repeat.
    """
    launched: Callable[[], int] | None = None
    """How many kernels have been launched so far, where somebody counts them."""


Times = dict[str, "Timing | str"]
"""By subject its timing, or why somebody else's could not be timed."""


class Timer(Protocol):
    """Times subjects against each other."""

    def __call__(self, subjects: Mapping[str, Subject], least_seconds: float, budget: float) -> Times:
        """The timing of each. least_seconds: below which no call can be; budget: seconds for each, about.

        Raises KernelFailure where a graph does not hold what was called.
        """


def copies_for(nbytes: int) -> int:
    """How many copies of so many bytes leave the L2 cache cold."""
    return min(max(-(-WORKING_SET // max(nbytes, 1)), 2), MOST_COPIES)


def calls_for(copies: int, least_seconds: float) -> int:
    """A multiple of the copies: as many calls as make a graph long enough to be timed."""
    wanted = min(_GRAPH_SECONDS / max(least_seconds, 1e-9), _MOST_CALLS)
    return copies * max(1, round(wanted / copies))


@dataclass(frozen=True, eq=False)
class Captured:
    """Calls as a CUDA graph."""

    graph: torch.cuda.CUDAGraph
    outputs: list[torch.Tensor]
    nodes: int
    """Kernels, copies and fills in the graph."""


def capture(call: Call, calls: int) -> Captured:
    """Call i = 0 .. calls - 1 as a graph, on torch's current stream. Everything must have run once before."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    # Not torch.cuda.graph(), which empties torch's cache of memory every time. The kernels go to the device's stream,
    # which is torch's current one: it is this stream that is captured.
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        outputs = [call(i) for i in range(calls)]
    finally:
        graph.capture_end()
    nodes = work_nodes(graph.raw_cuda_graph())
    graph.instantiate()
    return Captured(graph, outputs, nodes)


def work_nodes(graph: int) -> int:
    """Kernels, copies and fills in a cudaGraph_t, as the driver counts them."""
    driver: Any = ctypes.CDLL("libcuda.so.1")
    count = ctypes.c_size_t(0)
    _succeed(driver.cuGraphGetNodes(ctypes.c_void_p(graph), None, ctypes.byref(count)))
    nodes = (ctypes.c_void_p * max(count.value, 1))()
    _succeed(driver.cuGraphGetNodes(ctypes.c_void_p(graph), nodes, ctypes.byref(count)))
    found, kind = 0, ctypes.c_int(0)
    for node in nodes[: count.value]:
        _succeed(driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)))
        found += kind.value in _WORK
    return found


def _succeed(code: int) -> None:
    if code:
        raise KernelFailure(
            f"CUDA's driver does not tell what the graph holds (error {code}): it is empty where every kernel went to "
            "another stream"
        )


def check_captured(nodes: int, launched: int, calls: int) -> None:
    """KernelFailure unless a graph holds as many nodes as kernels were launched, and at least one a call."""
    if nodes < max(launched, calls):
        raise KernelFailure(
            f"the CUDA graph did not capture the kernels: it holds {nodes} of them, and {launched} were launched "
            f"in {calls} calls"
        )


def check_written(outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], *, exact: bool) -> None:
    """KernelFailure unless call i gave what the calls gave outside the graph, or where not exact anything at all."""
    for i, output in enumerate(outputs):
        if exact and not torch.equal(bits(output), bits(wanted[i % len(wanted)])):
            raise KernelFailure(f"call {i} of {len(outputs)} of the CUDA graph gave other bits than outside the graph")
        if not exact and bool((bits(output) == bits(unwritten(output))).all()):
            raise KernelFailure(f"call {i} of {len(outputs)} of the CUDA graph wrote nothing")


def unwritten(like: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape that no call gives."""
    return torch.full_like(like, _NOT_WRITTEN.get(like.dtype, float("nan")))


def bits(y: torch.Tensor) -> torch.Tensor:
    """A tensor as integers, so that NaN equals itself and zeros have signs."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return y.contiguous().view(kinds[y.element_size()])


def graph_times(subjects: Mapping[str, Subject], least_seconds: float, budget: float) -> Times:
    """A Timer for GPUs: see the module. The subjects take turns, replay by replay back to back on the GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    found: Times = {}
    graphs = {}
    for name, subject in subjects.items():
        try:
            graphs[name] = _verified(subject, calls_for(subject.copies, least_seconds))
        except Exception as error:
            if subject.own:
                raise
            found[name] = f"cannot be timed: {type(error).__name__}: {error}"
    counts = {}
    for name, captured in graphs.items():
        once = min(elapsed(captured.graph.replay, device) for _ in range(2))
        counts[name] = int(min(max(budget / _ROUNDS / once, _LEAST), _MOST))
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(_ROUNDS):
        for name, captured in graphs.items():
            seconds[name] += _replayed(captured.graph, counts[name])
    return found | {name: timing(seconds[name], len(graphs[name].outputs)) for name in graphs}


def _verified(subject: Subject, calls: int) -> Captured:
    """The subject's graph, which is sure to hold its calls."""
    wanted = [subject.call(i).clone() for i in range(subject.copies if subject.own else 1)]
    before = subject.launched() if subject.launched else 0
    captured = capture(subject.call, calls)
    launched = subject.launched() - before if subject.launched else 0
    check_captured(captured.nodes, launched, calls)
    for output in captured.outputs:
        output.copy_(unwritten(output))
    captured.graph.replay()
    check_written(captured.outputs, wanted, exact=subject.own)
    return captured


def _replayed(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    """Seconds of each of `count` replays, behind one that does not count; the GPU never waits for the CPU between."""
    event_of = partial(torch.cuda.Event, enable_timing=True)
    events = [event_of() for _ in range(count + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    events[-1].synchronize()
    return [float(a.elapsed_time(b)) / 1e3 for a, b in pairwise(events)]


def clock_times(subjects: Mapping[str, Subject], least_seconds: float, budget: float) -> Times:
    """A Timer for the CPU: a clock read around each call; the subjects take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    cpu = torch.device("cpu")
    for turn in range(_MOST):
        for name, subject in subjects.items():
            if turn < _LEAST or sum(seconds[name]) < budget:
                seconds[name].append(elapsed(partial(subject.call, turn), cpu))
    return {name: timing(seconds[name]) for name in subjects}


def elapsed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: between events on the current stream of a GPU, by the wall clock on the CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    event = partial(torch.cuda.Event, enable_timing=True)
    before, after = event(), event()
    before.record()
    function()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3
