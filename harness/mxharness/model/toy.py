"""A tiny model with random weights, for tests of decoders, files and likelihoods: no download, milliseconds."""

from __future__ import annotations

import torch

from mxharness.model import llama
from mxharness.model.gguf import ModelFile, Vocabulary

CONFIG = llama.LlamaConfig(
    layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, head_size=16, vocabulary=259,
    rope_base=1e4, norm_epsilon=1e-5, context=128, tied=True,
)  # fmt: skip


def byte_vocabulary() -> Vocabulary:
    """GPT-2's 256 byte symbols, two merges and a special token; the symbols are its documented byte-to-unicode map."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    symbols = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]
    return Vocabulary((*symbols, "12", "th", "<|end|>"), ("1 2", "t h"), "smollm")


def random_weights(config: llama.LlamaConfig = CONFIG, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights at a scale that gives logits of a few units, so that attention and likelihoods are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "q": (64, 64),
        "k": (32, 64),
        "v": (32, 64),
        "o": (64, 64),
        "gate": (96, 64),
        "up": (96, 64),
        "down": (64, 96),
    }
    weights = {}
    for name in llama.weight_names(config):
        what = name.rsplit(".", 1)[-1]
        shape = (64,) if what.endswith("norm") else sizes.get(what, (config.vocabulary, 64))
        noise = torch.randn(shape, generator=generator)
        weights[name] = 1 + 0.1 * noise if what.endswith("norm") else 0.25 * noise
    return weights


def model() -> ModelFile:
    """Two layers, a byte vocabulary, a tied head."""
    return ModelFile("toy", "1" * 64, CONFIG, random_weights(), byte_vocabulary())
