"""Memory and speed of generating with random weights of a model's shape: no download, the same kernels and bytes.

Usage: python examples/decode_speed.py [toy | smollm2 | gpt-oss-20b] [new tokens]

Prints what the weights, the KV cache and a step's activations occupy, the time of a prefill of 512 tokens and of a
decoded token; on a GPU with and without CUDA graphs, which must give the same tokens.
"""

from __future__ import annotations

import statistics
import sys
import time
import zlib
from functools import partial

import torch
from mxharness.device import Device, open_device
from mxharness.functional import Yarn
from mxharness.model import toy
from mxharness.model.checkpoint import Checkpoint, Stored
from mxharness.model.config import ModelConfig, Weight, weights
from mxharness.model.generation import GPTInferenceAdapter
from mxharness.mxfp4 import Quantized

SHAPES = {
    "toy": toy.GPT_OSS,
    "smollm2": ModelConfig(
        "llama", layers=30, hidden=576, ffn=1536, heads=9, kv_heads=3, head_size=64, vocabulary=49152, context=8192,
        norm_epsilon=1e-5, rope_base=1e5,
    ),
    "gpt-oss-20b": ModelConfig(
        "gpt-oss", layers=24, hidden=2880, ffn=2880, heads=64, kv_heads=8, head_size=64, vocabulary=201088,
        context=131072, norm_epsilon=1e-5, rope_base=150000.0, yarn=Yarn(), tied=False, windows=(128, None) * 12,
        experts=32, chosen=4, swiglu_alpha=1.702, swiglu_limit=7.0,
    ),
}  # fmt: skip
PREFILL, REPEATS = 512, 5


def random_checkpoint(config: ModelConfig, where: torch.device) -> Checkpoint:
    """Random bytes for every weight, made on the device when they are read, each time the same."""

    def read(weight: Weight) -> torch.Tensor | Quantized:
        generator = torch.Generator(where).manual_seed(zlib.crc32(weight.name.encode()))
        if not weight.packed:
            noise = torch.randn(weight.shape, generator=generator, device=where)
            return 1 + 0.1 * noise if weight.name.endswith("norm") else 0.02 * noise
        *lead, columns = weight.shape
        draw = partial(torch.randint, generator=generator, dtype=torch.uint8, device=where)
        # Random codes have a root mean square of 3.1: with these scales a row of 2880 about keeps its input's size.
        return Quantized(draw(0, 256, (*lead, columns // 2)), draw(118, 121, (*lead, columns // 32)))

    stored = {weight.name: Stored(weight.shape, "MXFP4", partial(read, weight)) for weight in weights(config)}
    return Checkpoint("random", "0" * 64, config, stored, None)


def generate(adapter: GPTInferenceAdapter, device: Device, count: int) -> tuple[list[int], float, float]:
    """Greedy tokens after a prompt of PREFILL, the seconds of the fastest prefill and of a token, the median."""
    config = adapter.decoder.config
    length = min(PREFILL, config.context - count)
    prompt = torch.randint(config.vocabulary, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    prefills, times, tokens = [], [], []
    for repeat in range(REPEATS):
        state = adapter.allocate_state(length + count)
        device.synchronize()
        start = time.perf_counter()
        adapter.prefill(prompt, state)
        device.synchronize()
        prefills.append(time.perf_counter() - start)
        if repeat == REPEATS - 1:
            for _ in range(count):
                start = time.perf_counter()
                tokens += adapter.decode_next_token(state)
                times.append(time.perf_counter() - start)
            usage = adapter.get_vram_usage()
            print(
                f"{usage.total / 1e9:.3f} GB: weights {usage.weights / 1e9:.3f}, KV cache {usage.kv_cache / 1e9:.3f}, "
                f"activations {usage.activations / 1e9:.3f}, at most {usage.peak_activations / 1e9:.3f}"
            )
            if device.name == "cuda":
                print(f"{torch.cuda.memory_allocated() / 1e9:.3f} GB as the device reports")
        adapter.free_state(state)
    return tokens, min(prefills), statistics.median(times)


def main(name: str = "gpt-oss-20b", count: str = "64") -> None:
    """Print memory and times of a shape."""
    device = open_device()
    checkpoint = random_checkpoint(SHAPES[name], device.torch_device)
    found = []
    for graphs in (False, True) if device.name == "cuda" else (False,):
        adapter = GPTInferenceAdapter(device, graphs=graphs)
        adapter.load_weights_mxfp4(checkpoint)
        tokens, prefill, decode = generate(adapter, device, int(count))
        how = "CUDA graphs" if graphs else "no graphs"
        print(f"{name} on {device.device_class}, {how}: prefill {1e3 * prefill:.2f} ms, token {1e3 * decode:.3f} ms")
        found.append(tokens)
    if any(tokens != found[0] for tokens in found):
        raise SystemExit("CUDA graphs gave other tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
