"""Perplexity of a real model on real text, with everything that fixes the number stated beside it.

    NLL_t = -log softmax(logits at position t - 1)[id t],   perplexity = exp(mean of NLL over the scored t)

The join of the text's rows alone moves it by more than most kernel bugs: a result carries the hashes of model, text and
token ids and its protocol, and `compare` refuses two results that differ in any of them.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from mxharness.errors import UserError
from mxharness.model import backend as backends
from mxharness.model import llama
from mxharness.model.likelihood import window_nll
from mxharness.model.tokenizer import encode, ids_sha256
from mxharness.protocols import DEFAULT_PROTOCOL, DEFAULT_WINDOWS, PROTOCOLS, Span, select, spans

if TYPE_CHECKING:
    import numpy as np

    from mxharness.device import Device
    from mxharness.model.backend import Activations, Backend
    from mxharness.model.gguf import ModelFile
    from mxharness.text import Text

W = TypeVar("W")
_OVERFLOW = 700.0  # exp of more is no float64; a broken kernel gets there


class NotFiniteError(ArithmeticError):
    """A scored token has a NaN or infinite log likelihood: the check failed, there is no perplexity."""


@dataclass(frozen=True, eq=False)
class Result:
    """One measurement and everything that fixes it."""

    model: str
    model_sha256: str
    text: str
    """The text's label: what it is, or that it is not WikiText-2."""
    text_sha256: str
    ids_sha256: str
    """Of the token stream the windows were cut from: int32, little-endian."""
    tokens: int
    """Length of that stream."""
    protocol: str
    windows: int
    windows_available: int
    spans: tuple[Span, ...]
    scored: int
    """Tokens scored."""
    perplexity: float
    mean_nll: float
    """Nats per scored token."""
    nll: np.ndarray[tuple[int], np.dtype[np.float32]]
    """(scored,) nats, in the order of the text."""
    tokens_per_second: float
    """Tokens read, unscored ones included, by wall-clock time."""
    backend: str
    weights: str
    activations: str
    arithmetic: str
    device_class: str

    def to_json(self) -> dict[str, Any]:
        """Every field but the windows and the single likelihoods, which are there as a digest."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in {"spans", "nll"}}
        return {**kept, "nll_sha256": hashlib.sha256(self.nll.astype("<f4").tobytes()).hexdigest()}


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
        1e-3,
        "same weights; activations rounded to fp16 (2^-11) before every linear layer, products summed in float32",
    ),
    "bf16": Limit(
        5e-3,
        "same weights; activations rounded to bf16 (2^-8) before every linear layer, which alone moves it by 2e-3",
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


def measure(
    file: ModelFile,
    text: Text,
    backend: Backend[W],
    protocol: str = DEFAULT_PROTOCOL,
    *,
    windows: int | None = DEFAULT_WINDOWS,
    tokens: int | None = None,
    batch: int | None = None,
    progress: bool = False,
) -> Result:
    """Perplexity of a model on a text.

    windows: how many evenly spaced windows, None for all. tokens: only the first that many tokens of the text are used.
    batch: windows at once; by default 1 on a CPU and 8 on a GPU. progress: a bar with tokens/s on stderr.

    Raises UserError for an unknown protocol and for a text that gives no window, NotFiniteError for NaN or Inf.
    """
    import numpy as np

    if protocol not in PROTOCOLS:
        raise UserError(f"no protocol '{protocol}'; there are {', '.join(PROTOCOLS)}")
    ids = encode(file.vocabulary, text.text)[:tokens]
    available = spans(PROTOCOLS[protocol], len(ids))
    if not available:
        raise UserError(
            f"nothing to score: {text.label} gives {len(ids):,} tokens, {protocol} needs {PROTOCOLS[protocol].window}"
        )
    chosen = select(available, windows)
    model = llama.build(file.config, file.weights, backend)
    batch = batch or (8 if backend.torch_device.type == "cuda" else 1)
    start = time.perf_counter()
    parts = []
    for span, part in zip(chosen, window_nll(model, ids, chosen, batch=batch, progress=progress), strict=True):
        _check_finite(part, span, backend)
        parts.append(part)
    nll = np.concatenate(parts)
    seconds = time.perf_counter() - start
    mean = float(nll.mean(dtype="float64"))
    return Result(
        model=file.name,
        model_sha256=file.sha256,
        text=text.label,
        text_sha256=text.sha256,
        ids_sha256=ids_sha256(ids),
        tokens=len(ids),
        protocol=protocol,
        windows=len(chosen),
        windows_available=len(available),
        spans=chosen,
        scored=len(nll),
        perplexity=math.exp(mean) if mean < _OVERFLOW else math.inf,
        mean_nll=mean,
        nll=nll,
        tokens_per_second=sum(span.stop - span.start for span in chosen) / seconds,
        backend=backend.name,
        weights=backend.weights,
        activations=backend.activations,
        arithmetic=backend.arithmetic,
        device_class=backend.device_class,
    )


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
        relative=math.expm1(change) if change < _OVERFLOW else math.inf,
        largest_token=float(difference.max()),
        bitwise=candidate.nll.tobytes() == reference.nll.tobytes(),
    )


def triple(
    file: ModelFile,
    text: Text,
    device: Device,
    protocol: str = DEFAULT_PROTOCOL,
    *,
    activations: Activations = "fp16",
    scale_rule: str = "floor",
    tie_rule: str = "even",
    windows: int | None = DEFAULT_WINDOWS,
    tokens: int | None = None,
    batch: int | None = None,
    progress: bool = False,
) -> Triple:
    """Float32, MXFP4 decoded in float32, and MXFP4 through `device`'s kernels; the arguments are `measure`'s."""

    def run(backend: Backend[W]) -> Result:
        return measure(file, text, backend, protocol, windows=windows, tokens=tokens, batch=batch, progress=progress)

    through_kernels = backends.kernels(device, activations, scale_rule, tie_rule)
    original = run(backends.float32(device.torch_device))
    decoded = run(backends.decoded(device.torch_device, scale_rule, tie_rule))
    kernels = run(through_kernels)
    return Triple(
        original=original,
        decoded=decoded,
        kernels=kernels,
        limit=LIMITS[activations],
        agreement=compare(decoded, kernels),
        cost=compare(original, kernels),
    )


def _check_finite(nll: np.ndarray[tuple[int], np.dtype[np.float32]], span: Span, backend: Backend[W]) -> None:
    import numpy as np

    bad = np.flatnonzero(~np.isfinite(nll))
    if len(bad):
        hint = "; fp16 holds activations up to 65504, try bf16" if backend.activations == "fp16" else ""
        raise NotFiniteError(
            f"{len(bad)} of {len(nll)} scored tokens of the window at token {span.start} have a NaN or infinite log "
            f"likelihood, the first is token {span.first + int(bad[0])} ({backend.name}, {backend.weights}{hint})"
        )
