"""What an output should be, in float64, on the GPU that ran the kernel where that pays; a sample on the CPU as well.

A GPU's reference is as good as the CPU's. Its operations are IEEE ones or functions within units in the last place, and
its sums have another order: K terms are off by gamma_K magnitude at most, with u = 2^-53, in either order. A kernel
that sums K products in chunks has a chain of n >= 2 sqrt(K) roundings, so K <= n^2 / 4, and an error of n^2 / 4 * 2^-53
moves a verdict by n * 2^-31 of its bound gamma_n magnitude: nothing that a bound decides hangs on the order.

It is computed from copies of what the judge itself holds on the CPU, and nothing stays on the GPU from one reference to
the next: a kernel that writes anywhere cannot have changed what judges it. Predicted bits are always the CPU's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from mxharness.device import Device
from mxharness.device.cuda import CudaDevice
from mxharness.op import Case, Expected, Gate, Op, Tensors

CPU = torch.device("cpu")
LEAST = 2**18
"""Elements of inputs and outputs together from which a GPU is asked. Below, its launches take longer than the CPU
(measured on an H100: 4.8 ms on the CPU and 5.2 at 2^16, 12 and 7.6 at 2^18, 36 and 9.7 at 2^19)."""
SHARE = 50
"""One case and gate in so many is computed on the CPU as well, and the two must agree."""
UNIT = 2.0**-53
FROM_FLOAT32 = 2.0**-29
"""What slack holds of roundings to float32 is, for those to float64, so much of it."""


@dataclass(frozen=True)
class References:
    """By output, and what the GPU and the CPU do not agree in; "" where they do or only one was asked."""

    expected: Mapping[str, Expected]
    disagreement: str = ""


def place(device: Device | None, inputs: Tensors, outputs: Tensors) -> torch.device:
    """Where the references of an execution on `device` are computed."""
    count = sum(tensor.numel() for tensor in (*inputs.values(), *outputs.values()))
    return device.torch_device if isinstance(device, CudaDevice) and not device.dead and count >= LEAST else CPU


def sampled(case: Case, gate: Gate) -> bool:
    """Whether this is one of the SHARE: by the hash of its name, the same in every run."""
    return int.from_bytes(hashlib.sha256(f"{case} {gate}".encode()).digest()[:8], "big") % SHARE == 0


def find(op: Op, case: Case, gate: Gate, inputs: Tensors, outputs: Tensors, where: torch.device = CPU) -> References:
    """The references, on the CPU, computed on `where`; on the CPU where that has no memory for it or has failed."""
    if gate == "predicted" or where == CPU:
        return References(computed(op, case, gate, inputs, outputs))
    try:
        found = computed(op, case, gate, _moved(inputs, where), _moved(outputs, where))
        there = {name: _on_cpu(one) for name, one in found.items()}
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # who runs the next kernel is told of a lost context
        return References(computed(op, case, gate, inputs, outputs))
    if not sampled(case, gate):
        return References(there)
    here = computed(op, case, gate, inputs, outputs)
    return References(here, "; ".join(disagreements(case, there, here, where)))


def computed(op: Op, case: Case, gate: Gate, inputs: Tensors, outputs: Tensors) -> Mapping[str, Expected]:
    """The operator's references under one gate, where the tensors are."""
    if gate == "predicted":
        if op.predict is None:
            raise ValueError(f"{op.name} predicts no bits")
        return {name: Expected(tensor) for name, tensor in op.predict(case, {**outputs, **inputs}).items()}
    if gate == "composed":
        if op.composed is None:
            raise ValueError(f"{op.name} is one stage")
        return op.composed(case, inputs)
    stages = op.golden(case, {**outputs, **inputs})
    return {name: one for name, one in stages.items() if gate != "exact-arithmetic" or one.quantum is not None}


def _moved(tensors: Tensors, where: torch.device) -> Tensors:
    return {name: tensor.to(where) for name, tensor in tensors.items()}


def _on_cpu(one: Expected) -> Expected:
    def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.cpu()

    rest = {"magnitude": moved(one.magnitude), "slack": moved(one.slack), "quantum": moved(one.quantum)}
    return Expected(one.value.cpu(), chain=one.chain, dtype=one.dtype, permitted=moved(one.permitted), **rest)


def disagreements(
    case: Case, there: Mapping[str, Expected], here: Mapping[str, Expected], where: torch.device
) -> Iterator[str]:
    """Sentences about every output whose two references are further apart than float64 explains."""
    for name in here.keys() | there.keys():
        one, other = there.get(name), here.get(name)
        if one is None or other is None:
            yield f"only one of {where} and the CPU has a reference for {name}"
            continue
        allowed = _allowed(case, other)
        for field in ("value", "magnitude", "slack", "quantum", "permitted"):
            room = allowed if field in ("value", "magnitude", "slack") else None
            if told := _apart(getattr(one, field), getattr(other, field), room):
                yield f"{where} and the CPU disagree on the reference's {field} for {name}: {told}"


def _allowed(case: Case, here: Expected) -> torch.Tensor | None:
    """How far float64 references may be apart, element by element; None where they are exact.

    Each is off by gamma_K magnitude; of the slack, which bounds what roundings to float32 do on their way through
    functions, those to float64 do 2^-29, K at a time. K: n^2 for a chain of n, or the case's longest axis.
    """
    if here.magnitude is None:
        return None
    terms = max(here.chain**2, *case.shape)
    room = 2 * terms * UNIT * (here.magnitude.nan_to_num(0.0, torch.inf) + here.value.abs().nan_to_num(0.0, 0.0))
    return room if here.slack is None else room + 2 * terms * FROM_FLOAT32 * here.slack.nan_to_num(0.0, torch.inf)


def _apart(one: torch.Tensor | None, other: torch.Tensor | None, room: torch.Tensor | None) -> str:
    """Where two tensors differ by more than `room`, or at all where there is none; "" where they do not."""
    if one is None or other is None:
        return "" if one is other else "only one has it"
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{tuple(one.shape)} {one.dtype} and {tuple(other.shape)} {other.dtype}"
    same = (one == other) | ((one != one) & (other != other))  # noqa: PLR0124  NaN, which integers do not have
    if room is not None:
        same |= (one - other).abs() <= room
    if bool(same.all()):
        return ""
    at = (~same).nonzero()[0].tolist()
    left, right = one[tuple(at)].item(), other[tuple(at)].item()
    return f"{int((~same).sum())} of {same.numel()} elements, the first at {at}: {left!r} and {right!r}"
