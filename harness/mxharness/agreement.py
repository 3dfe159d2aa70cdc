"""Whether two measurements agree: one model three ways, what the kernels change and what the format costs.

    relative = exp(mean of (candidate's NLL - reference's NLL)) - 1

Only two results of the same tokens, windows and model are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mxharness.errors import UserError
from mxharness.perplexity import OVERFLOW, measure

if TYPE_CHECKING:
    from mxharness.device import Device
    from mxharness.model.checkpoint import Checkpoint
    from mxharness.model.decoder import Activations
    from mxharness.model.runner import Runner
    from mxharness.perplexity import Reading, Result


@dataclass(frozen=True)
class Comparison:
    """A candidate against a reference on the same tokens."""

    relative: float
    """Candidate perplexity / reference perplexity - 1."""
    largest_token: float
    """Largest |difference| of one token's NLL, in nats."""
    bitwise: bool
    """Every token's NLL has the same bits."""


@dataclass(frozen=True)
class Limit:
    """How far a perplexity through kernels may be from float32 on the same decoded weights, and why."""

    relative: float
    why: str


LIMITS = {
    "fp16": Limit(
        5e-3,
        "same weights; every activation rounded to fp16 (2^-11), sums in float32: no change of perplexity that matters",
    ),
    "bf16": Limit(
        1e-2,
        "same weights; every activation rounded to bf16 (2^-8), which alone moves perplexity by 2e-3 and more",
    ),
}


@dataclass(frozen=True)
class Triple:
    """One model three ways, on the same windows, and the verdict on the kernels."""

    original: Result
    """Float32 torch, original weights."""
    decoded: Result
    """Float32 torch, the weights MXFP4 decodes to."""
    kernels: Result
    """The MXFP4 bytes through the project's kernels."""
    limit: Limit
    agreement: Comparison
    """Kernels against decoded: what the kernels change."""
    cost: Comparison
    """Kernels against original: what the format costs. Reported, not judged."""

    @property
    def passed(self) -> bool:
        """Whether the kernels stay within the limit."""
        return abs(self.agreement.relative) <= self.limit.relative

    @property
    def message(self) -> str:
        """What, how far, what is allowed and why."""
        return (
            f"perplexity through kernels ({self.kernels.activations} activations) {self.kernels.perplexity:.4f}, "
            f"float32 on the decoded weights {self.decoded.perplexity:.4f}: {self.agreement.relative:+.2e} relative, "
            f"{'within' if self.passed else 'past'} {self.limit.relative:g} ({self.limit.why})"
        )

    def to_json(self) -> dict[str, Any]:
        """Three results, the verdict and its reason."""
        return {
            "passed": self.passed,
            "message": self.message,
            "relative_to_decoded": self.agreement.relative,
            "relative_to_original": self.cost.relative,
            "limit": self.limit.relative,
            "why": self.limit.why,
            **{name: getattr(self, name).to_json() for name in ("original", "decoded", "kernels")},
        }


def compare(reference: Result, candidate: Result) -> Comparison:
    """A candidate against a reference. Raises UserError where they did not score the same tokens of the same text."""
    for what in ("model_sha256", "text_sha256", "ids_sha256", "protocol", "spans"):
        ours, theirs = getattr(reference, what), getattr(candidate, what)
        if ours != theirs:
            values = f": {ours} and {theirs}" if isinstance(ours, str) else f": {len(ours)} and {len(theirs)} windows"
            raise UserError(f"these two results cannot be compared, their {what} differs{values}")
    change = candidate.mean_nll - reference.mean_nll
    difference = abs(candidate.nll - reference.nll)
    return Comparison(
        relative=math.expm1(change) if change < OVERFLOW else math.inf,
        largest_token=float(difference.max()),
        bitwise=candidate.nll.tobytes() == reference.nll.tobytes(),
    )


def triple(
    checkpoint: Checkpoint,
    reading: Reading,
    device: Device,
    *,
    activations: Activations = "fp16",
    scale_rule: str = "floor",
    tie_rule: str = "even",
    original: Checkpoint | None = None,
    measured: Callable[[Runner], Result] | None = None,
) -> Triple:
    """Float32, MXFP4 decoded in float32, and MXFP4 through `device`'s kernels. measured: `measure` with its options.

    original: the model with the weights that MXFP4 was made of, where `checkpoint` no longer has them.
    """
    from mxharness.model import decoder, reference

    run = measured or partial(measure, reading)
    through_kernels = decoder.kernels(checkpoint, device, activations, scale_rule, tie_rule)
    unrounded = run(reference.float32(original or checkpoint, device.torch_device))
    decoded = run(reference.decoded(checkpoint, device.torch_device, scale_rule, tie_rule))
    kernels = run(through_kernels)
    return Triple(
        original=unrounded,
        decoded=decoded,
        kernels=kernels,
        limit=LIMITS[activations],
        agreement=compare(decoded, kernels),
        cost=compare(unrounded, kernels),
    )
