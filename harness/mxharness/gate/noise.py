"""What an honest candidate looks like: the reference's weights with every activation rounded to a smaller dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mxharness.model import reference
from mxharness.model.config import weights as weights_of
from mxharness.mxfp4 import Quantized, dequantize, quantize

if TYPE_CHECKING:
    import torch

    from mxharness.model.checkpoint import Checkpoint
    from mxharness.model.decoder import Activations
    from mxharness.model.runner import Runner


def honest(checkpoint: Checkpoint, activations: Activations, torch_device: torch.device) -> Runner:
    """Torch in fp16 or bf16 on the values of the MXFP4 weights (floor, even), with float32 logits."""
    import torch

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[activations]
    weights = {}
    for weight in weights_of(checkpoint.config):
        value = checkpoint.tensors[weight.name].read()
        if weight.packed and not isinstance(value, Quantized):
            value = quantize(value)
        if isinstance(value, Quantized):
            value = dequantize(*value)[..., : weight.shape[-1]]
        weights[weight.name] = value.to(torch_device, dtype)
    config = checkpoint.config
    return replace(
        reference.decoded(checkpoint, torch_device),
        name="honest",
        activations=activations,
        arithmetic=f"torch {activations}",
        hidden_states=lambda ids: reference.hidden_states(config, weights, ids.to(torch_device)),
        logits=lambda states: reference.logits(config, weights, states).float(),
    )
