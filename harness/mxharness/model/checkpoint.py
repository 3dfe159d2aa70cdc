"""A model as it lies on disk or in memory, read tensor by tensor; gguf.py, safetensors.py and others make one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mxharness.errors import UserError

if TYPE_CHECKING:
    import torch

    from mxharness.model.config import ModelConfig, Weight
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
    ends: tuple[int, ...] = ()
    """Ids that end a text; () where the file names none."""


def values(stored: Stored) -> torch.Tensor:
    """A weight in float32 on the CPU, of the shape it is stored under: as it is, or what its MXFP4 bytes decode to."""
    from mxharness import mxfp4
    from mxharness.mxfp4 import Quantized

    read = stored.read()
    return mxfp4.dequantize(*read) if isinstance(read, Quantized) else read


def packed(stored: Stored, scale_rule: str = "floor", tie_rule: str = "even") -> Quantized:
    """A weight in MXFP4: the stored bytes where it is stored so, whatever the rules, else quantised by the rules.

    What is stored in MXFP4 is never quantised again. Raises UserError, as `mxfp4.quantize` does.
    """
    from mxharness import mxfp4
    from mxharness.mxfp4 import Quantized

    read = stored.read()
    return read if isinstance(read, Quantized) else mxfp4.quantize(read, scale_rule, tie_rule)


def collect(config: ModelConfig, find: Callable[[Weight], Stored], where: str) -> dict[str, Stored]:
    """Every weight of a model, in order, found by `find`.

    Raises UserError for sizes that no model has and for a weight of another shape than the configuration gives it.
    """
    from mxharness.model.config import weights

    _check_sizes(config, where)
    tensors = {}
    for weight in weights(config):
        stored = find(weight)
        if stored.shape != weight.shape:
            raise UserError(
                f"{where} is no whole model: '{weight.name}' is {stored.shape} and must be {weight.shape}, by its sizes"
            )
        tensors[weight.name] = stored
    return tensors


def _check_sizes(config: ModelConfig, where: str) -> None:
    sizes = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_size", "vocabulary", "context")
    wrong = [f"{name} {getattr(config, name)}" for name in sizes if getattr(config, name) < 1]
    if not wrong and (config.heads % config.kv_heads or config.head_size % 2):
        wrong = [f"{config.heads} heads of {config.head_size}, {config.kv_heads} of keys"]
    if config.architecture == "gpt-oss" and not 1 <= config.chosen <= config.experts:
        wrong.append(f"{config.chosen} of {config.experts} experts")
    if config.windows and (
        len(config.windows) != config.layers or any(w is not None and w < 1 for w in config.windows)
    ):
        wrong.append(f"windows {config.windows}")
    numbers = [config.norm_epsilon, config.rope_base]
    if config.yarn:
        numbers += [config.yarn.factor, config.yarn.original_context, config.yarn.beta_fast, config.yarn.beta_slow]
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        wrong.append(f"constants {numbers}")
    if wrong:
        raise UserError(f"{where} describes no model that can be run: {', '.join(wrong)}")
