"""What proves nothing: degenerate inputs, references of zeros or NaN, bounds wider than what they bound.

A case that a wrong kernel passes as well is refused in every gate. Only what is degenerate on purpose is declared with
the reason (regimes.declared); it is judged, and never counts as the evidence for an operator and gate.
"""

from __future__ import annotations

import torch

from mxharness import regimes
from mxharness.op import Case, Expected, Gate, Tensors

LOOSE = 0.4
"""The largest share of elements whose bound may be as large as the reference: each of them could have either sign."""
TELLING = 1 / 8
"""The smallest share of a contraction's or function's references that are finite and not zero."""
FEW = 32
"""Fewer numbers than this are one-sided, or all zero, by chance; nor are they evidence."""
ONE_SIDED = {
    "uniforms": "numbers from 0 to 1",
    "angles": "cosines and sines, of the first positions' small angles",
    "norm_weight": "a norm's weights lie around their mean",
    "routed_weights": "a softmax gives numbers from 0 to 1",
}
"""Inputs that are positive by nature."""


def degenerate(case: Case, inputs: Tensors) -> str:
    """Why an undeclared case's inputs prove nothing: all zero, all the same, all of one sign; empty where they do."""
    if regimes.declared(case):
        return ""
    for name, tensor in inputs.items():
        packed = tensor.dtype == torch.uint8 and "codes" in name
        if tensor.numel() >= FEW and (packed or tensor.is_floating_point()):
            kind = _codes(tensor) if packed else _numbers(tensor)
            if kind and not (kind == "of one sign" and name in ONE_SIDED):
                return f"every {'weight in' if packed else 'number of'} {name} is {kind}: this case proves nothing"
    return ""


def _codes(codes: torch.Tensor) -> str:
    """Of bytes that hold two MXFP4 codes: sign bits 0x88, magnitudes 0x77."""
    if not (codes & 0x77).any():
        return "zero"
    if bool((codes == (codes.flatten()[0] & 15) * 17).all()):
        return "the same"
    negative = codes & 0x88
    return "of one sign" if not negative.any() or bool((negative == 0x88).all()) else ""


def _numbers(x: torch.Tensor) -> str:
    least, most = x.nan_to_num(0.0, 0.0, 0.0).aminmax()
    if least == most:
        return "zero" if least == 0 else "the same"
    return "of one sign" if least >= 0 or most <= 0 else ""


def empty(case: Case, gate: Gate, wants: Tensors) -> str:
    """Why an undeclared case's references prove nothing; empty where they do.

    Where all that is compared is one and the same number, any kernel that writes it passes; where nearly all of a
    result is zero, NaN or Inf, so does one that is wrong in the rest.
    """
    if regimes.declared(case) or sum(want.numel() for want in wants.values()) < FEW:
        return ""
    if all(_constant(want) for want in wants.values()):
        return f"every reference is {float(next(iter(wants.values())).flatten()[0]):g}: this case proves nothing"
    for name, want in wants.items() if gate in ("predicted", "exact-arithmetic", "composed") else ():
        share = float((want.isfinite() & (want != 0)).double().mean())
        if want.numel() >= FEW and share < TELLING:
            return f"only {share:.0%} of the references of {name} are finite and not zero: this case proves nothing"
    return ""


def _constant(want: torch.Tensor) -> bool:
    flat = want.flatten()
    return bool((flat == flat[0]).all() | flat.isnan().all()) if len(flat) else True


def inexact(expected: Expected) -> str:
    """Why exact arithmetic proves nothing here: terms are no integers of one quantum, or too many of them."""
    want, magnitude, quantum = expected.value, expected.magnitude, expected.quantum
    if magnitude is None or quantum is None:
        return "this output is no plain sum, so this case proves nothing about the kernel's arithmetic"
    if bool((magnitude <= regimes.EXACT_WIDTH * quantum).all()) and torch.equal(want.to(torch.float32).double(), want):
        return ""
    return "a partial sum may round, so this case proves nothing about the kernel's arithmetic"


def loose(bound: torch.Tensor, want: torch.Tensor, out_of_range: torch.Tensor, ceiling: float) -> str:
    """Why a bound per element proves nothing: a median past the ceiling, or too many elements without any meaning."""
    if out_of_range.double().mean() > 0.5:
        return "most partial sums may overflow: this case proves nothing"
    judged = want.isfinite() & (want != 0)
    if not judged.any():
        return ""
    relative = bound[judged] / want[judged].abs()
    if (looseness := float(relative.median())) > ceiling:
        return (
            f"the median bound is {looseness:.2g} of the reference, past the ceiling of {ceiling:g}: "
            "this case proves nothing"
        )
    if (share := float((~(relative < 1)).double().mean())) > LOOSE:
        return f"{share:.0%} of the elements have a bound as large as their reference: this case proves nothing"
    return ""


def is_evidence(case: Case, inputs: Tensors) -> bool:
    """Whether the case may be what an operator rests on: neither declared nor degenerate."""
    return not regimes.declared(case) and not degenerate(case, inputs)
