"""A tiny model with random weights, for tests of decoders, files and likelihoods: no download, milliseconds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch

from mxharness import mxfp4
from mxharness.functional.rope import Yarn
from mxharness.model.checkpoint import Checkpoint, Stored, Vocabulary
from mxharness.model.config import ModelConfig
from mxharness.model.config import weights as weights_of
from mxharness.mxfp4 import Quantized


def byte_vocabulary() -> Vocabulary:
    """GPT-2's 256 byte symbols, two merges and a special token; the symbols are its documented byte-to-unicode map."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    symbols = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]
    return Vocabulary((*symbols, "12", "th", "<|end|>"), ("1 2", "t h"), "smollm")


LLAMA = ModelConfig(
    "llama", layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, head_size=32, vocabulary=259, context=128,
    norm_epsilon=1e-5, rope_base=1e4,
)  # fmt: skip
GPT_OSS = ModelConfig(
    "gpt-oss", layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, head_size=32, vocabulary=259, context=128,
    norm_epsilon=1e-5, rope_base=15e4, yarn=Yarn(factor=4.0, original_context=32), tied=False, windows=(8, None),
    experts=4, chosen=2, swiglu_alpha=1.702, swiglu_limit=7.0,
)  # fmt: skip
EXPERTS = ("gate_up", "down")
"""Weights of gpt-oss that are stored in MXFP4."""
CONFIGS = {config.architecture: config for config in (LLAMA, GPT_OSS)}


def checkpoint(config: ModelConfig = LLAMA, seed: int = 0) -> Checkpoint:
    """Random weights for any sizes, at a scale that gives logits of a few units; experts are stored in MXFP4.

    Weights outside MXFP4 are bfloat16 values, as in released models.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor | Quantized] = {}
    for weight in weights_of(config):
        noise = torch.randn(weight.shape, generator=generator)
        what = weight.name.rsplit(".", 1)[-1]
        if what.endswith("norm"):
            value = 1 + 0.1 * noise
        elif what.endswith("bias") or what == "sinks":
            value = 0.5 * noise
        else:
            value = 2 * weight.shape[-1] ** -0.5 * noise
        value = value.bfloat16().float()
        tensors[weight.name] = mxfp4.quantize(value) if config.experts and what in EXPERTS else value
    stored = {
        weight.name: Stored(weight.shape, "MXFP4" if isinstance(tensor, Quantized) else "F32", partial(_same, tensor))
        for weight, tensor in zip(weights_of(config), tensors.values(), strict=True)
    }
    return Checkpoint(f"toy {config.architecture}", sha256(tensors), config, stored, byte_vocabulary())


def stable(config: ModelConfig) -> Checkpoint:
    """Weights from a hash of their names, the same bits on every machine and with every version of torch."""
    stored = {}
    for weight in weights_of(config):
        count = math.prod(weight.shape)
        noise = np.frombuffer(hashlib.shake_128(weight.name.encode()).digest(count), np.int8).reshape(weight.shape)
        value = torch.from_numpy(noise.astype(np.float32)) / 256  # uniform in -0.5 .. 0.5, exact
        if weight.name.endswith("norm"):
            value = 1 + value / 8
        stored[weight.name] = Stored(weight.shape, "F32", partial(_same, value))
    return Checkpoint(f"stable toy {config.architecture}", "0" * 64, config, stored, byte_vocabulary())


def sha256(tensors: Mapping[str, torch.Tensor | Quantized]) -> str:
    """Of all weights in order."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        for part in tensor if isinstance(tensor, Quantized) else (tensor,):
            digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def _same(tensor: torch.Tensor | Quantized) -> torch.Tensor | Quantized:
    return tensor
