"""A model as it lies on disk or in memory, read tensor by tensor; gguf.py, safetensors.py and others make one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mxharness.model.config import ModelConfig
    from mxharness.mxfp4 import Quantized


@dataclass(frozen=True)
class Vocabulary:
    """What a byte-level BPE tokenizer is made of."""

    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    pre_tokenizer: str
    """tokenizer.ggml.pre: the name of the rule that cuts text before merging, for example "smollm"."""


@dataclass(frozen=True)
class Stored:
    """One weight, not yet read."""

    shape: tuple[int, ...]
    format: str
    """As the file calls it: "Q4_1", "MXFP4", "BF16"."""
    read: Callable[[], torch.Tensor | Quantized]
    """Its bytes, each time from the source: float32 on the CPU, or Quantized where it is stored in MXFP4."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole model: `tensors` holds exactly `config.weights(config)`, in shapes as given there."""

    name: str
    sha256: str
    """Of the file, or of its files' names and hashes, or of all weights in order for a model in memory."""
    config: ModelConfig
    tensors: Mapping[str, Stored]
    vocabulary: Vocabulary | Path | None
    """None where there is no tokenizer; a Path is a tokenizer.json."""
