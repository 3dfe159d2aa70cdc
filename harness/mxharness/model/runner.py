"""A model that runs: from token ids to final states and from states to logits, and the words for what it computes.

reference.py makes one of float32 torch, decoder.py one of the project's kernels; what measures a model takes either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mxharness.errors import UserError
from mxharness.model.config import weights

if TYPE_CHECKING:
    import torch

    from mxharness.model.checkpoint import Checkpoint
    from mxharness.model.config import ModelConfig


@dataclass(frozen=True)
class Runner:
    """Two functions and what every number from them must say."""

    config: ModelConfig
    name: str
    """"float32", "decoded" or "kernels"."""
    weights: str
    """"float32", or "mxfp4 (floor, even)": scale rule, tie rule; "mxfp4 (as stored)" where the file holds the bytes."""
    activations: str
    """Dtype of the activations: fp32, fp16 or bf16."""
    arithmetic: str
    """"torch float32", or the device's "tensor-core" or "float32"."""
    device_class: str
    """"cpu" or "sm_90" for torch, "host" or "sm_90" for the kernels."""
    torch_device: torch.device
    hidden_states: Callable[[torch.Tensor], torch.Tensor]
    """ids (B, T) int64 on the CPU -> final normed states (B, T, hidden), of the activations' dtype.

    Raises UserError for sequences longer than the context and ids outside the vocabulary."""
    logits: Callable[[torch.Tensor], torch.Tensor]
    """States (R, hidden) -> (R, vocabulary) float32."""


def check_ids(config: ModelConfig, ids: torch.Tensor) -> None:
    """UserError for a sequence longer than the context and for ids outside the vocabulary; ids (B, T) on the CPU."""
    if ids.shape[1] > config.context:
        raise UserError(f"a window of {ids.shape[1]} tokens does not fit the model's context of {config.context}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocabulary:
        raise UserError(
            f"token ids from {int(ids.min())} to {int(ids.max())}; the model has 0 to {config.vocabulary - 1}"
        )


def weights_words(checkpoint: Checkpoint, rules: str | None = None) -> str:
    """What `Runner.weights` says: rules are what weights not stored in MXFP4 are rounded by, None where they are not.

    "float32", "mxfp4 (floor, even)", "mxfp4 (as stored)", or where only some are stored in MXFP4,
    "mxfp4 (as stored), float32" and "mxfp4 (as stored), mxfp4 (floor, even)".
    """
    stored = {checkpoint.tensors[w.name].format == "MXFP4" for w in weights(checkpoint.config) if w.packed}
    words = {True: "mxfp4 (as stored)", False: "float32" if rules is None else f"mxfp4 ({rules})"}
    return ", ".join(words[kind] for kind in sorted(stored, reverse=True))
