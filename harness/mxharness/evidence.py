"""What proves nothing: degenerate inputs, references of zeros or NaN, bounds wider than what they bound.

A case that every wrong kernel passes is refused in every gate, unless its regime says that it is so on purpose
(regimes.DECLARED); and such a case never is the evidence for an operator (suites/meta/test_judge.py).
"""

from __future__ import annotations

import torch

from mxharness.op import Gate

TELLING = 0.5
"""The share of a reference that must be finite and not zero, and of a bounded one's elements whose bound is smaller
than the reference."""


def bitwise_refusal(gate: Gate, want: torch.Tensor) -> str:
    """Why a comparison of bits proves nothing; empty when it does."""
    if gate == "exact-arithmetic" and not torch.equal(want.to(torch.float32).double(), want.double()):
        return "the exact result does not fit float32, so this case proves nothing about the kernel's arithmetic"
    return ""


def bound_refusal(bound: torch.Tensor, want: torch.Tensor, out_of_range: torch.Tensor, ceiling: float) -> str:
    """The same for a bound per element."""
    if out_of_range.double().mean() > 0.5:
        return "most partial sums may overflow: this case proves nothing"
    judged = want.isfinite() & (want != 0)
    if judged.any():
        looseness = float((bound[judged] / want[judged].abs()).median())
        if looseness > ceiling:
            return (
                f"the median bound is {looseness:.2g} of the reference, past the ceiling of {ceiling:g}: "
                "this case proves nothing"
            )
    return ""
