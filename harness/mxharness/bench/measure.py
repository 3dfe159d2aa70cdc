"""A row from an entry: its time against its rivals', its error, its bits again and again, its first row alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

import torch

from mxharness import environment
from mxharness.bench import peers
from mxharness.bench.entries import Entry
from mxharness.bench.result import Bench, Peer, Row
from mxharness.bench.work import Work, floor_seconds, released
from mxharness.device import Device
from mxharness.device.meter import Meter
from mxharness.errors import KernelFailure, UserError
from mxharness.figures import Ceilings, Timing
from mxharness.functional.profile import ceilings
from mxharness.timing import Call, Subject, Timer, Times, bits, clock_times, graph_times

REPEATS = 20
_BUDGET = 0.12
"""Seconds of timing for each subject of a row, about."""
_COPIED = 1 << 30


def bench(
    device: Device,
    entries: Iterable[Entry],
    *,
    timer: Timer | None = None,
    limits: Ceilings | None = None,
    budget: float = _BUDGET,
    filters: tuple[str, ...] = (),
    progress: Callable[[Row], None] = lambda row: None,
) -> Bench:
    """Measure entries on a device, one after another.

    timer: by default CUDA graphs on a GPU and a clock on the CPU. limits: by default those known or measured of the
    device. progress is told each row. A row that fails, as one whose graph does not hold what was called, is named.
    """
    timer = timer or (graph_times if device.torch_device.type == "cuda" else clock_times)
    limits = limits or ceilings(device.torch_device)
    started, clock = datetime.now(UTC), time.monotonic()
    bandwidth = _copy_bandwidth(device, timer, limits)
    meter = Meter(device)
    rows, failed = {}, {}
    for entry in entries:
        try:
            row = measure(entry, meter, timer, limits, budget)
        except (KernelFailure, UserError) as error:
            failed[entry.key] = str(error)
            continue
        rows[row.key] = row
        progress(row)
    released()
    peers.released()
    facts = environment.describe(device)
    return Bench(
        device_class=device.device_class,
        unit=facts["cpu"] if device.device_class == "host" else facts["gpu"],
        driver=facts["driver"],
        started=started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        seconds=time.monotonic() - clock,
        ceilings=limits,
        copy_bandwidth=bandwidth,
        environment=facts,
        rows=rows,
        filters=filters,
        failed=failed,
    )


def measure(entry: Entry, device: Meter, timer: Timer, limits: Ceilings, budget: float = _BUDGET) -> Row:
    """One row."""
    work = entry.work(device)
    first = work.call(0).clone()
    floor = floor_seconds(work.nbytes, work.flops, limits.bandwidth, limits.matrix_rate)
    subjects = {"": Subject(work.call, work.copies, launched=lambda: device.launches)}
    errors: dict[str, float | None] = {}
    absent = dict(work.absent)
    for name, rival in work.rivals.items():
        try:
            errors[name] = _error(work, rival.call(0), rival.part) if rival.judged else None
        except Exception as error:  # whatever somebody else's code raises
            absent[name] = f"fails: {peers.first_line(error)}"
        else:
            subjects[name] = Subject(rival.call, rival.copies, own=False)
    times: Times = timer(subjects, floor, budget)
    own = times.pop("")
    if isinstance(own, str):
        raise KernelFailure(f"{entry.key} {own}")
    measured = {}
    for name, found in times.items():
        if isinstance(found, str):
            absent[name] = found
        else:
            measured[name] = Peer(found, errors[name])
    return Row(
        op=entry.op,
        shape=entry.label,
        axes=entry.axes,
        rows=entry.rows,
        variant=entry.dtype,
        timing=own,
        working_set=work.copies * work.nbytes,
        nbytes=work.nbytes,
        flops=work.flops,
        limited="bytes" if work.nbytes / limits.bandwidth >= work.flops / limits.matrix_rate else "operations",
        floor_us=1e6 * floor,
        error=_error(work, first),
        repeatable=repeats(work.call, REPEATS),
        invariant=None if work.alone is None else _invariant(work, first),
        reference=work.reference,
        peers=measured,
        absent=absent,
    )


def repeats(call: Call, times: int) -> bool:
    """Whether so many calls give the same bits."""
    first = bits(call(0)).clone()
    return all(torch.equal(bits(call(0)), first) for _ in range(times - 1))


def _invariant(work: Work, first: torch.Tensor) -> bool:
    """Whether the first row alone has the bits it has in the batch."""
    if work.alone is None or work.row is None:
        raise ValueError("there is nothing to compare a row alone with")
    return torch.equal(bits(work.alone()), bits(work.row(first)))


def _error(work: Work, y: torch.Tensor, part: Callable[[torch.Tensor], torch.Tensor] | None = None) -> float:
    """Relative Frobenius error of the part that the reference tells."""
    wanted = work.golden
    return float(((part or work.part)(y).double() - wanted).norm() / wanted.norm())


def _copy_bandwidth(device: Device, timer: Timer, limits: Ceilings) -> float:
    """Bytes per second, read and written together: the better of the driver's copy and a kernel of torch's."""
    size = _COPIED if device.torch_device.type == "cuda" else _COPIED // 16
    source, target = torch.ones(2, size // 4, device=device.torch_device)
    ways: dict[str, Call] = {"copy": lambda i: target.copy_(source), "negate": lambda i: torch.neg(source, out=target)}
    subjects = {name: Subject(call, 1, own=False) for name, call in ways.items()}
    found = timer(subjects, 2 * size / limits.bandwidth, _BUDGET)
    return max(2e6 * size / one.us for one in found.values() if isinstance(one, Timing))
