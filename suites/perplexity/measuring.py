"""The toy model measured on 264 tokens."""

from __future__ import annotations

from typing import Any

from mxharness import perplexity
from mxharness.model import reference
from mxharness.model.checkpoint import Checkpoint
from mxharness.model.runner import Runner

from ..toys import sample

SAMPLE = sample(6)


def read(file: Checkpoint, tokens: int | None = None) -> perplexity.Reading:
    """The sample's tokens, or the first of them."""
    return perplexity.read(file, SAMPLE, "toy", tokens)


def measure(
    file: Checkpoint,
    runner: Runner | None = None,
    *,
    tokens: int | None = None,
    **options: Any,  # noqa: ANN401  what `measure` takes
) -> perplexity.Result:
    """Measured with a runner; in float32 where none is given. options: of perplexity.measure."""
    return perplexity.measure(read(file, tokens), runner or reference.float32(file), **options)
