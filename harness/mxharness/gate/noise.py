"""What an honest candidate looks like: the reference's weights with every activation rounded to a smaller dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mxharness.gate.verdict import Rules, Window
from mxharness.model import reference
from mxharness.model.config import weights as weights_of
from mxharness.mxfp4 import Quantized, dequantize, quantize

if TYPE_CHECKING:
    import torch

    from mxharness.model.checkpoint import Checkpoint
    from mxharness.model.decoder import Activations
    from mxharness.model.runner import Runner


def honest(checkpoint: Checkpoint, activations: Activations, torch_device: torch.device) -> Runner:
    """Torch in fp16 or bf16 on the values of the MXFP4 weights (floor, even).

    Rounded are the results of every operation; norms are float32 inside, as on the kernels, and the logits are float32.
    """
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


def level(windows: Sequence[Window]) -> float:
    """Mean KL of an honest candidate's windows, nats per token: the noise that may widen a limit.

    0, which widens nothing, where the candidate turns out not to be one: NaN, Inf, or most probable words so different
    that the gate would fail it.
    """
    kl, same = (np.concatenate([getattr(window, name) for window in windows]) for name in ("kl", "same"))
    honest = np.isfinite(kl).all() and same.mean() >= Rules(0.0).same
    return float(kl.mean()) if honest else 0.0
