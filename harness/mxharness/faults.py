"""Planted faults: real bugs of other projects, as data, applied to the kernel text or to the layouts before a run.

A suite that stays green on one of these proves nothing. Each names the project it was seen in, what to change, the
operator whose cases must fail, and the check that must notice first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from mxharness import mxfp4
from mxharness.device import Device, open_device
from mxharness.device.source import shipped
from mxharness.errors import UserError
from mxharness.execution import Execution, execute
from mxharness.judge import gates, judge
from mxharness.op import Case, Op
from mxharness.ops import find


@dataclass(frozen=True)
class KernelChange:
    """In kernels/`file`, `old` (which occurs once) becomes `new`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class LayoutChange:
    """In mxfp4.LAYOUTS[`layout`], `field` becomes `value`."""

    layout: str
    field: str
    value: str


@dataclass(frozen=True)
class Fault:
    """One bug to plant."""

    name: str
    seen_in: str
    symptom: str
    change: KernelChange | LayoutChange
    op: str
    """Operator whose cases are run."""
    detector: str
    """The check that must fail first: a gate, "memory" for writes outside an output, "crash" for no output at all."""


@dataclass(frozen=True)
class FaultResult:
    """What the harness made of one planted fault."""

    name: str
    caught: bool
    detector: str
    """The check that failed first; empty when none did."""
    expected_detector: str
    seen_in: str
    symptom: str
    message: str
    """Of the failing check."""
    checks: int
    """Run until one failed."""
    seconds: float


def _scale_bias(offset: int) -> Fault:
    word = f"{'plus' if offset > 0 else 'minus'}-{abs(offset)}"
    return Fault(
        name=f"scale-bias-{word}",
        seen_in="vllm-project/compressed-tensors PR 538, vllm PR 35979",
        symptom="perplexity 22,953 instead of 8.74: the stored scale byte is off by a constant",
        change=KernelChange("mxfp4.cuh", "    if (s == 0) return", f"    s += {offset};\n    if (s == 0) return"),
        op="dequant",
        detector="exact",
    )


FAULTS = (
    Fault(
        name="gguf-nibbles-read-as-linear",
        seen_in="kekzl/imp PR 567",
        symptom="fluent garbage: split nibbles of GGUF blocks are read as linear ones",
        change=LayoutChange("gguf", "nibbles", "linear-low"),
        op="dequant",
        detector="exact",
    ),
    Fault(
        name="nibbles-swapped",
        seen_in="pytorch/ao issue 2939 and PR 3123",
        symptom="wrong across frameworks: the first element is taken from the high nibble",
        change=KernelChange(
            "mxfp4.cuh",
            "    const std::uint32_t first = byte & 7,",
            "    byte = byte >> 4 | (byte & 15) << 4;\n    const std::uint32_t first = byte & 7,",
        ),
        op="dequant",
        detector="exact",
    ),
    *(_scale_bias(offset) for offset in (-2, -1, 1, 2)),
    Fault(
        name="scale-byte-0-is-zero",
        seen_in="triton-lang/triton PR 11624 and PR 11737",
        symptom="blocks vanish: 2^-127 is made by a shift and becomes 0",
        change=KernelChange("mxfp4.cuh", "if (s == 0) return __uint_as_float(0x00400000u);", ""),
        op="dequant",
        detector="exact",
    ),
    *(
        Fault(
            name=f"scales-past-the-row-{path}",
            seen_in="triton-lang/triton issue 10772, vllm PR 47910, sglang PR 36456",
            symptom="accuracy 0 %, depends on neighbours: rows of K/32 = 90 scales are read as if padded",
            change=KernelChange("gemm.cu", old, new),
            op="gemm",
            detector="bound",
        )
        for path, old, new in (
            ("few-tokens", "scales[row[i] * (K / MX_BLOCK) +", "scales[row[i] * ((K + 127) / 128 * 4) +"),
            (
                "many-tokens",
                "scales[static_cast<long long>(n) * (K / MX_BLOCK) +",
                "scales[static_cast<long long>(n) * ((K + 127) / 128 * 4) +",
            ),
        )
    ),
    *(
        Fault(
            name=f"k-tail-dropped-{path}",
            seen_in="triton-lang/triton PR 7203",
            symptom="wrong when K is not a multiple of the block: the last chunk of K is left out",
            change=KernelChange("gemm.cu", old, new),
            op="gemm",
            detector="bound",
        )
        for path, old, new in (
            ("few-tokens", "const int chunks = (K + chunk - 1) / chunk;", "const int chunks = K / chunk;"),
            ("many-tokens", "begin < K; begin += chunk", "begin + chunk <= K; begin += chunk"),
        )
    ),
    Fault(
        name="scale-cast-to-half",
        seen_in="pytorch/ao and ml-explore/mlx, fp16 output",
        symptom="zeros become NaN from scale byte 143 on: the scale, not the product, is rounded to half",
        change=KernelChange(
            "dequant.cu",
            "    const float scale = decode_scale(scales[row * blocks + k / MX_BLOCK]);",
            "    float scale = decode_scale(scales[row * blocks + k / MX_BLOCK]);\n"
            "    if (std::is_same<T, __half>::value) scale = __half2float(__float2half_rn(scale));",
        ),
        op="dequant",
        detector="exact",
    ),
    Fault(
        name="linear-code-table",
        seen_in="llama-orch, mxfp4_dequant.cu",
        symptom="codes 5, 6, 7 decode as 2.5, 3, 3.5",
        change=KernelChange("mxfp4.cuh", "low[2] = {0xC0800000u, 0xC0804000u}", "low[2] = {0xC0800000u, 0x60402000u}"),
        op="dequant",
        detector="exact",
    ),
    Fault(
        name="tail-written-past-the-end",
        seen_in="llama-orch, mxfp4_dequant.cu",
        symptom="buffer overrun: the element count is rounded up and written",
        change=KernelChange("dequant.cu", "const int count = min(PER_THREAD, K - k);", "const int count = PER_THREAD;"),
        op="dequant",
        detector="memory",
    ),
    Fault(
        name="half-accumulators",
        seen_in="llama-orch, mxfp4_gemm.cu",
        symptom="sums are kept in half",
        change=KernelChange(
            "gemm.cu",
            "    return __fadd_rn(total, Order<T>::scale_operand ? chunk_sum : __fmul_rn(chunk_sum, scale));",
            "    return __half2float(__float2half_rn("
            "__fadd_rn(total, Order<T>::scale_operand ? chunk_sum : __fmul_rn(chunk_sum, scale))));",
        ),
        op="gemm",
        detector="bound",
    ),
)


def select(names: Sequence[str] | None) -> tuple[Fault, ...]:
    """The faults called `names`, all of them for None; UserError, listing what exists, for another name."""
    if names is None:
        return FAULTS
    known = {fault.name: fault for fault in FAULTS}
    for name in names:
        if name not in known:
            raise UserError(f"no fault '{name}'; there are {', '.join(known)}")
    return tuple(known[name] for name in names)


@contextmanager
def planted(fault: Fault, device_name: str) -> Iterator[Device]:
    """A device whose kernels have the fault, or the healthy device while the layouts have it."""
    change = fault.change
    if isinstance(change, KernelChange):
        yield open_device(device_name, sources=shipped().replaced(change.file, change.old, change.new))
        return
    field: dict[str, Any] = {change.field: change.value}
    broken = replace(mxfp4.LAYOUTS[change.layout], **field)
    with mock.patch.dict(mxfp4.LAYOUTS, {change.layout: broken}):
        yield open_device(device_name)


def run_fault(fault: Fault, device_name: str) -> FaultResult:
    """Plant one fault and run the operator's checks until one fails; the healthy kernel must pass that case."""
    started = time.monotonic()
    op = find(fault.op)
    count, detector, message = 0, "", ""
    with planted(fault, device_name) as device:
        for case in op.cases:
            inputs = op.make_inputs(case)
            execution = execute(op, case, device, inputs)
            for gate in gates(op, case):
                count += 1
                outcome = judge(op, case, gate, device.device_class, inputs, execution)
                if not outcome.passed:
                    detector, message = _detector(gate, execution), outcome.message
                    break
            if detector:
                break
    if detector and (failing := _failing(op, case, open_device(device_name))):
        detector, message = "", f"without the fault the same case fails too, which proves nothing: {failing}"
    return FaultResult(
        name=fault.name,
        caught=bool(detector),
        detector=detector,
        expected_detector=fault.detector,
        seen_in=fault.seen_in,
        symptom=fault.symptom,
        message=message,
        checks=count,
        seconds=round(time.monotonic() - started, 3),
    )


def _detector(gate: str, execution: Execution) -> str:
    if not execution.outputs:
        return "crash"
    return "memory" if execution.violations else gate


def _failing(op: Op, case: Case, device: Device) -> str:
    """The message of the first gate that the healthy kernel fails; empty when it passes all."""
    inputs = op.make_inputs(case)
    execution = execute(op, case, device, inputs)
    outcomes = [judge(op, case, gate, device.device_class, inputs, execution) for gate in gates(op, case)]
    return next((outcome.message for outcome in outcomes if not outcome.passed), "")


def run_faults(device_name: str = "auto", names: Sequence[str] | None = None) -> list[FaultResult]:
    """Plant each fault in turn, all of FAULTS or those named. UserError for a name that does not exist."""
    return [run_fault(fault, device_name) for fault in select(names)]
