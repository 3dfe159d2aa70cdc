"""A model that transformers holds in memory, as a checkpoint."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING

import torch

from mxharness.errors import UserError
from mxharness.model import huggingface
from mxharness.model.checkpoint import Checkpoint
from mxharness.model.tensorfile import finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


def from_transformers(model: PreTrainedModel) -> Checkpoint:
    """A LlamaForCausalLM or GptOssForCausalLM as a checkpoint that reads the model's own memory.

    Weights that are changed later change the checkpoint, not its hash. There is no tokenizer in it: give the text's
    token ids, or replace `vocabulary`.

    Raises UserError for another class or architecture, weights without data, and dtypes other than float32, fp16, bf16.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, torch.nn.Module) or config is None or not hasattr(config, "to_dict"):
        raise UserError(f"from_transformers takes a transformers model, not {type(model).__name__}")
    where = type(model).__name__
    document = config.to_dict()
    sizes = huggingface.read_config(document, where)
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.is_meta:
            raise UserError(f"{where} has no data for '{name}'; load its weights first")
        if tensor.dtype not in _FORMATS:
            raise UserError(f"{where} has '{name}' in {tensor.dtype}; weights are float32, float16 or bfloat16")
    sources = {
        name: huggingface.Source(tuple(tensor.shape), _FORMATS[tensor.dtype], partial(_cpu, tensor, name, where))
        for name, tensor in state.items()
    }
    tensors = huggingface.tensors(sizes, sources, where)
    digest = hashlib.sha256(repr(sizes).encode())
    for name in sorted(state):
        digest.update(f"{name}\n".encode())
        digest.update(state[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return Checkpoint(
        name=str(document.get("_name_or_path") or where),
        sha256=digest.hexdigest(),
        config=sizes,
        tensors=tensors,
        vocabulary=None,
        ends=huggingface.ends(document),
    )


def _cpu(tensor: torch.Tensor, name: str, where: str) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.uint8:
        return tensor
    tensor = tensor.float()
    finite(tensor, name, where)
    return tensor
