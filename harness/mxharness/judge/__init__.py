"""The one comparison: is this output right, element by element, and if not, where and how badly.

references.py says what is right, compare.py compares one output, evidence.py refuses what proves nothing, message.py
says what is wrong and what it looks like, localise.py asks the kernel itself where along K.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from mxharness import facts, regimes
from mxharness.device import Device
from mxharness.execution import Execution, as_bytes, execute
from mxharness.facts import DeviceFact
from mxharness.judge import evidence, localise, measures, references
from mxharness.judge.compare import compare, largest_of
from mxharness.judge.message import compose
from mxharness.op import Case, Expected, Gate, Op, Outcome, Tensors


def gates(op: Op, case: Case, fact: DeviceFact | None = facts.HOST) -> tuple[Gate, ...]:
    """The gates that apply to a case, the sharpest last.

    fact: what is known of the device (facts.find). Where nothing is, no bits are predicted and no sum is exact.
    """
    if op.tolerance.unit_roundoff == 0:
        return ("exact",)
    found: list[Gate] = ["bound"]
    if case.regime in regimes.EXACT and fact is not None and fact.exact_integers >= regimes.EXACT_WIDTH:
        found.append("exact-arithmetic")
    if op.predict is not None and fact is not None and fact.predicted is not None:
        found.append("predicted")
    if op.composed is not None:
        found.append("composed")
    return tuple(found)


def judge(
    op: Op,
    case: Case,
    gate: Gate,
    device_class: str,
    inputs: Tensors,
    execution: Execution,
    device: Device | None = None,
) -> Outcome:
    """The verdict on one execution under one gate, with the arithmetic that is known of the device class.

    device: where it ran. A failing contraction is then run again there on parts of its inputs, and the message says
    where along K it goes wrong.
    """
    with facts.assumed(device_class):
        return _judge(op, case, gate, device_class, inputs, execution, device)


def _judge(
    op: Op,
    case: Case,
    gate: Gate,
    device_class: str,
    inputs: Tensors,
    execution: Execution,
    device: Device | None,
) -> Outcome:
    outputs = execution.outputs
    verdicts, disagreement = {}, ""
    if outputs:
        where = references.place(device, inputs, outputs)
        found = references.find(op, case, gate, inputs, outputs, where)
        expected, disagreement = found.expected, found.disagreement
        _check_forms(op, case, gate, outputs, expected)
        verdicts = {name: compare(outputs[name], expected[name], gate, op.tolerance) for name in expected}
    bad = sum(int(verdict.bad.sum()) for verdict in verdicts.values())
    elements = sum(outputs[name].numel() for name in verdicts)
    floats = [outputs[name] for name in verdicts if outputs[name].is_floating_point()]
    nan = sum(int(tensor.isnan().sum()) for tensor in floats)
    inf = sum(int(tensor.isinf().sum()) for tensor in floats)
    nothing = evidence.degenerate(case, inputs), evidence.empty(case, gate, {n: v.want for n, v in verdicts.items()})
    refusals = [text for text in (*nothing, *(verdict.refusal for verdict in verdicts.values())) if text]
    broken = [*execution.violations, *([disagreement] if disagreement else [])]
    passed = bool(outputs) and bad == 0 and not broken and not refusals
    wants = {name: (outputs[name], verdict.want) for name, verdict in verdicts.items()}
    outcome = Outcome(
        case=str(case),
        op=op.name,
        shape=case.shape,
        dtype=case.dtype,
        regime=case.regime,
        device=device_class,
        gate=gate,
        passed=passed,
        elements=elements,
        bad=bad,
        nan=nan,
        inf=inf,
        ratio=max((largest_of(verdict.ratio) for verdict in verdicts.values()), default=math.inf),
        max_ulp=max((measures.ulps(*pair) for pair in wants.values()), default=math.inf),
        nmse=max((measures.nmse(*pair) for pair in wants.values()), default=math.inf),
        ties=sum(verdict.ties for verdict in verdicts.values()),
        refused=bool(outputs) and bool(refusals) and bad == 0 and not broken,
        digest=digest(outputs),
        inputs=digest(inputs),
        message="",
        line=max((verdict.line for verdict in verdicts.values()), default=math.inf),
        chain=max((verdict.chain for verdict in verdicts.values()), default=0),
        high_ratio=max((measures.high_ratio(verdict.ratio) for verdict in verdicts.values()), default=math.inf),
        cosine=min((measures.cosine(*pair) for pair in wants.values()), default=0.0),
    )
    if passed:
        return outcome
    places = op.places(case, {**outputs, **inputs}) if op.places and outputs else {}

    def along_k(name: str) -> str:
        searched = device is not None and op.operands is not None and not execution.violations
        return _along_k(op, case, gate, inputs, name, device) if searched and device is not None else ""

    sentences = [*broken, *refusals]
    return replace(outcome, message=compose(op, case, gate, outputs, verdicts, sentences, places, along_k))


def _along_k(op: Op, case: Case, gate: Gate, inputs: Tensors, output: str, device: Device) -> str:
    """Where along K an output goes wrong: see localise.py. Empty for what is no contraction."""
    operands = op.operands(case) if op.operands else {}
    if output not in operands or gate == "composed":
        return ""
    operand = operands[output]

    def fails(part: torch.Tensor) -> bool | None:
        kept = {**inputs, operand.name: part}
        execution = execute(op, case, device, kept)
        if execution.violations or not execution.outputs:
            return None
        expected = references.computed(op, case, gate, kept, execution.outputs)[output]
        return bool(compare(execution.outputs[output], expected, gate, op.tolerance).bad.any())

    trial = localise.Trial(inputs[operand.name], operand, fails)
    found = [localise.along_k(trial)]
    if gate == "predicted":
        found.append(localise.first_step(trial))
    return ", ".join(text for text in found if text)


def digest(tensors: Tensors) -> str:
    """First 16 hex digits of the sha256 over all tensors by name; every NaN counts as the same NaN."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.is_floating_point():
            tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(as_bytes(tensor).numpy().tobytes())
    return total.hexdigest()[:16]


def _check_forms(op: Op, case: Case, gate: Gate, outputs: Tensors, expected: Mapping[str, Expected]) -> None:
    """Names, shapes and dtypes before values; a difference is a fault of the operator's own code, not of a kernel.

    Not every stage is a contraction whose bits are predicted, or a plain sum, and the whole function has no
    intermediates.
    """
    some = gate in ("predicted", "exact-arithmetic", "composed")
    if not expected or not set(expected) <= set(outputs) or (not some and set(outputs) != set(expected)):
        raise AssertionError(
            f"{op.name} {case}: outputs {', '.join(outputs)} do not meet references {', '.join(expected) or 'none'}"
        )
    for name, reference in expected.items():
        got = (tuple(outputs[name].shape), outputs[name].dtype)
        want = (tuple(reference.value.shape), reference.dtype or reference.value.dtype)
        if got != want:
            raise AssertionError(f"{op.name} {case}: output {name} is {got[0]} {got[1]}, should be {want[0]} {want[1]}")
