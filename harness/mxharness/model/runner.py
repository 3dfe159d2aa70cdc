"""A model that runs: from token ids to final states and from states to logits, and the words for what it computes.

reference.py makes one of float32 torch, decoder.py one of the project's kernels; what measures a model takes either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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
