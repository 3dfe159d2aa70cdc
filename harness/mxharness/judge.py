"""The one comparison: is this output right, element by element, and if not, where and how badly.

NaN and Inf are counted before any maximum is taken. Every bound is per element (Tolerance in op.py); no bound is ever
collapsed to one number per tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from mxharness import regimes
from mxharness.bounds import SMALLEST, UNIT_ROUNDOFF, gamma
from mxharness.execution import Execution, as_bytes
from mxharness.op import Case, Expected, Gate, Op, Outcome, Tensors, Tolerance
from mxharness.pattern import describe

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@dataclass(frozen=True)
class Verdict:
    """On one output tensor."""

    bad: torch.Tensor
    """bool, the output's shape."""
    ratio: torch.Tensor
    """float64, error / bound; 0 where bitwise equal, inf where a bitwise gate fails or a NaN or Inf is wrong."""
    want: torch.Tensor
    """float64, the reference."""
    refusal: str = ""
    """Why the case proves nothing; empty when it does."""
    ties: int = 0
    """Permitted ids that are not the reference's own choice."""


def gates(op: Op, case: Case) -> tuple[Gate, ...]:
    """The gates that apply to a case, the sharpest last."""
    if op.tolerance.unit_roundoff == 0:
        return ("exact",)
    found: list[Gate] = ["bound"]
    if case.regime in regimes.EXACT:
        found.append("exact-arithmetic")
    if op.predict is not None:
        found.append("predicted")
    if op.composed is not None:
        found.append("composed")
    return tuple(found)


def judge(op: Op, case: Case, gate: Gate, device_class: str, inputs: Tensors, execution: Execution) -> Outcome:
    """The verdict on one execution under one gate."""
    outputs = execution.outputs
    verdicts = {}
    if outputs:
        expected = _expected(op, case, gate, inputs, outputs)
        _check_forms(op, case, gate, outputs, expected)
        verdicts = {name: _compare(outputs[name], expected[name], gate, op.tolerance) for name in expected}
    bad = sum(int(verdict.bad.sum()) for verdict in verdicts.values())
    elements = sum(outputs[name].numel() for name in verdicts)
    floats = [outputs[name] for name in verdicts if outputs[name].is_floating_point()]
    nan = sum(int(tensor.isnan().sum()) for tensor in floats)
    inf = sum(int(tensor.isinf().sum()) for tensor in floats)
    refusals = [verdict.refusal for verdict in verdicts.values() if verdict.refusal]
    passed = bool(outputs) and bad == 0 and not execution.violations and not refusals
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
        ratio=max((_largest(verdict.ratio) for verdict in verdicts.values()), default=math.inf),
        max_ulp=max((_ulps(outputs[name], verdict.want) for name, verdict in verdicts.items()), default=math.inf),
        nmse=max((_nmse(outputs[name], verdict.want) for name, verdict in verdicts.items()), default=math.inf),
        ties=sum(verdict.ties for verdict in verdicts.values()),
        refused=bool(outputs) and bool(refusals) and bad == 0 and not execution.violations,
        digest=digest(outputs),
        inputs=digest(inputs),
        message="",
    )
    if passed:
        return outcome
    return replace(outcome, message=_message(op, case, gate, outputs, verdicts, [*execution.violations, *refusals]))


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


def _expected(op: Op, case: Case, gate: Gate, inputs: Tensors, outputs: Tensors) -> Mapping[str, Expected]:
    if gate == "predicted":
        if op.predict is None:
            raise ValueError(f"{op.name} predicts no bits")
        return {name: Expected(tensor) for name, tensor in op.predict(case, {**outputs, **inputs}).items()}
    if gate == "composed":
        if op.composed is None:
            raise ValueError(f"{op.name} is one stage")
        return op.composed(case, inputs)
    return op.golden(case, {**outputs, **inputs})


def _check_forms(op: Op, case: Case, gate: Gate, outputs: Tensors, expected: Mapping[str, Expected]) -> None:
    """Names, shapes and dtypes before values; a difference is a fault of the operator's own code, not of a kernel.

    Not every stage is a contraction whose bits are predicted, and the whole function has no intermediates.
    """
    some = gate in ("predicted", "composed")
    if not expected or not set(expected) <= set(outputs) or (not some and set(outputs) != set(expected)):
        raise AssertionError(
            f"{op.name} {case}: outputs {', '.join(outputs)} do not meet references {', '.join(expected) or 'none'}"
        )
    for name, reference in expected.items():
        got = (tuple(outputs[name].shape), outputs[name].dtype)
        want = (tuple(reference.value.shape), reference.dtype or reference.value.dtype)
        if got != want:
            raise AssertionError(f"{op.name} {case}: output {name} is {got[0]} {got[1]}, should be {want[0]} {want[1]}")


def _compare(output: torch.Tensor, expected: Expected, gate: Gate, tolerance: Tolerance) -> Verdict:
    if expected.permitted is not None:
        return _permitted(output, expected.value, expected.permitted)
    if gate in ("bound", "composed") and expected.magnitude is not None:
        ceiling = tolerance.composed_ceiling if gate == "composed" else tolerance.ceiling
        return _within_bound(output, expected, tolerance, ceiling)
    refusal = ""
    want = expected.value
    if gate == "exact-arithmetic":
        if not torch.equal(want.to(torch.float32).double(), want):
            refusal = "the exact result does not fit float32, so this case proves nothing about the kernel's arithmetic"
        want = want.to(torch.float32).to(output.dtype)
    same = (output == want) if not output.is_floating_point() else _same_bits(output, want)
    ratio = torch.where(same, 0.0, torch.inf).double()
    return Verdict(~same, ratio, want.double(), refusal)


def _same_bits(output: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Bitwise, but for the payload of NaN, which no standard fixes."""
    integer = _INTEGERS[output.dtype]
    return (output.view(integer) == want.view(integer)) | (output.isnan() & want.isnan())


def _permitted(output: torch.Tensor, choice: torch.Tensor, permitted: torch.Tensor) -> Verdict:
    """Ids: the reference's own choice, or one that its bounds cannot tell from it."""
    ids = output.long()
    known = (ids >= 0) & (ids < permitted.shape[-1])
    right = known & permitted.gather(-1, ids.where(known, 0).unsqueeze(-1)).squeeze(-1)
    ratio = torch.where(right, 0.0, torch.inf).double()
    return Verdict(~right, ratio, choice.double(), ties=int((right & (ids != choice)).sum()))


def _within_bound(output: torch.Tensor, expected: Expected, tolerance: Tolerance, ceiling: float) -> Verdict:
    """|y - reference| <= gamma_n magnitude + slack + u_out (|reference| (1 + gamma_n) + slack) + eta, times a scale.

    NaN and Inf exactly where due.
    """
    if expected.magnitude is None:
        raise ValueError("a bound needs the magnitude of the sum")
    gamma_n = gamma(expected.chain, tolerance.unit_roundoff)
    y, want = output.double(), expected.value
    summed = gamma_n * expected.magnitude
    if expected.slack is not None:
        summed = summed + expected.slack * (1 + UNIT_ROUNDOFF[output.dtype])
    bound = summed + UNIT_ROUNDOFF[output.dtype] * want.abs() * (1 + gamma_n) + SMALLEST[output.dtype]
    bound = tolerance.scale * bound
    largest = torch.finfo(output.dtype).max
    # A reference within its bound of the largest finite number may round to it or to Inf.
    may_overflow = want.abs() + bound > largest
    right_inf = y.isinf() & (y.sign() == want.sign()) & may_overflow
    due_nan = want.isnan()
    # A partial sum may pass float32's range though the whole does not: no bound holds there.
    out_of_range = expected.magnitude.isfinite() & (expected.magnitude * (1 + gamma_n) >= 2.0**128)
    error = (y - want).abs()
    ordinary = y.isfinite() & want.isfinite()
    ratio = torch.where(ordinary & ~bound.isnan(), error / bound, torch.inf)
    ratio = torch.where(right_inf | (due_nan & y.isnan()) | out_of_range, 0.0, ratio)
    judged = ordinary & (want != 0)
    refusal = ""
    if out_of_range.double().mean() > 0.5:
        refusal = "most partial sums may overflow: this case proves nothing"
    if judged.any():
        looseness = float((bound[judged] / want[judged].abs()).median())
        if looseness > ceiling:
            refusal = (
                f"the median bound is {looseness:.2g} of the reference, past the ceiling of {ceiling:g}: "
                "this case proves nothing"
            )
    return Verdict(ratio > 1, ratio, want, refusal)


def _largest(ratio: torch.Tensor) -> float:
    return float(ratio.max()) if ratio.numel() else math.inf


def _ulps(output: torch.Tensor, want: torch.Tensor) -> float:
    """Largest distance to the correctly rounded reference in units in the last place; inf for a NaN that is not due."""
    if not output.is_floating_point():
        return float((output.double() - want).abs().max())
    integer = _INTEGERS[output.dtype]
    rounded = want.to(torch.float32).to(output.dtype)
    keep = output.isfinite() & rounded.isfinite()
    if bool((rounded.isfinite() & ~output.isfinite()).any()):
        return math.inf
    if not keep.any():
        return 0.0

    def ordered(x: torch.Tensor) -> torch.Tensor:
        bits = x.view(integer).long()
        return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)

    return float((ordered(output)[keep] - ordered(rounded)[keep]).abs().max())


def _nmse(output: torch.Tensor, want: torch.Tensor) -> float:
    """Sum of squared errors over sum of squared references, finite references; inf for a NaN that is not due."""
    keep = output.double().isfinite() & want.isfinite()
    if bool((want.to(torch.float32).to(output.dtype).double().isfinite() & ~keep).any()):
        return math.inf
    y, reference = output.double()[keep], want[keep]
    scale = reference.abs().max() if reference.numel() else torch.tensor(0.0)
    if scale == 0:
        return 0.0 if not y.any() else math.inf
    return float(((y - reference) / scale).square().sum() / (reference / scale).square().sum())


def _message(
    op: Op, case: Case, gate: Gate, outputs: Tensors, verdicts: Mapping[str, Verdict], sentences: list[str]
) -> str:
    """What, where, how bad, what to paste."""
    sizes = "x".join(map(str, case.shape))
    parts = list(sentences)
    for name, verdict in verdicts.items():
        count = int(verdict.bad.sum())
        if count:
            parts.append(_describe(op, gate, name, outputs[name], verdict, count))
    return f"{op.name} {sizes}: {'; '.join(parts)}; paste into {op.name}.CASES: {case!r}"


def _describe(op: Op, gate: Gate, name: str, output: torch.Tensor, verdict: Verdict, count: int) -> str:
    reason = {
        "bound": f"past the bound ({op.tolerance.why})",
        "composed": f"past the whole function's bound ({op.tolerance.why})",
        "exact": f"not the exact value ({op.tolerance.why})",
        "exact-arithmetic": "not the one right value (every partial sum is exact, so any order gives the same bits)",
        "predicted": "not the predicted bits (another order, another rounding or a fault)",
    }[gate]
    special = ""
    if output.is_floating_point():
        wrong_nan = int((output.isnan() & ~verdict.want.isnan()).sum())
        wrong_inf = int((output.isinf() & verdict.bad).sum())
        special = "".join(
            f", {number} of them {what}" for number, what in ((wrong_nan, "NaN"), (wrong_inf, "Inf")) if number
        )
    distance = torch.where(verdict.bad, (output.double() - verdict.want).abs().nan_to_num(torch.inf), -1.0)
    worst_by = torch.where(verdict.bad, verdict.ratio, -1.0) if gate in ("bound", "composed") else distance
    flat = int(worst_by.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(flat), output.shape)]
    got, want = output.flatten()[flat].item(), verdict.want.flatten()[flat].item()
    ratio = float(verdict.ratio.flatten()[flat])
    bounded = gate in ("bound", "composed")
    times = f", {ratio:.3g}x the bound" if bounded and math.isfinite(ratio) else ""
    digits = ".6g" if bounded else ".9g"
    return (
        f"{count} of {output.numel()} elements of {name} {reason}{special}; "
        f"worst {place}: got {got:{digits}}, should be {want:{digits}}{times}; pattern: {describe(verdict.bad)}"
    )
