"""Train the embedded model: a small gpt-oss, from the tokens that prepare.py made, in a few minutes on one GPU.

    python examples/embedded_model/train.py DATA OUT [--steps 1300] [--compile]

DATA holds tokens.bin and data.json. Writes OUT/weights.npz, every weight as the bits of a bfloat16, by the names of
mxharness.model.config, and OUT/training.json: how it went. Runs on a CPU too, in hours. The same machine, torch and
number of steps give the same order of batches; a GPU's sums are not the same from run to run, the published hashes
are of the weights that were kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from mxharness.functional.rope import Yarn, rope_table
from mxharness.model import config as models
from mxharness.model import reference
from mxharness.model.config import ModelConfig

CONFIG = ModelConfig(
    architecture="gpt-oss", layers=6, hidden=192, ffn=96, heads=8, kv_heads=2, head_size=32, vocabulary=1024,
    context=1024, norm_epsilon=1e-5, rope_base=1e4, yarn=Yarn(factor=4.0, original_context=256), tied=False,
    windows=(128, None, 128, None, 128, None), experts=8, chosen=2, swiglu_alpha=1.702, swiglu_limit=7.0,
)  # fmt: skip
LENGTH = CONFIG.context
BALANCE = 0.01
"""Weight of the loss that spreads tokens over experts: Fedus et al., Switch Transformers, arXiv 2101.03961, (4)."""
ROUTER_SIZE, HEAD_SIZE = 1e-3, 1e-4
"""Weights of the squared log partition of the router's scores and of the logits, which keep both from growing until
training falls apart: Zoph et al., ST-MoE, arXiv 2202.08906, (5); Chowdhery et al., PaLM, arXiv 2204.02311, 5."""
DROPOUT = 0.1
"""Of what the experts add to the stream, while training."""
SPIKE = 4.0
"""A step whose gradient is so many times longer than those before it is left out."""
WARM = 30
"""Steps whose time is not typical: compilation, memory."""


def initial(device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    """Matrices normal with a deviation of 0.6 / sqrt(columns), what adds to the stream smaller by the depth."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for weight in models.weights(CONFIG):
        last = weight.name.rsplit(".", 1)[-1]
        if last.endswith("norm"):
            value = torch.ones(weight.shape)
        elif len(weight.shape) == 1 or last.endswith("bias"):
            value = torch.zeros(weight.shape)
        else:
            spread = 0.3 if last == "embedding" else 0.6 / math.sqrt(weight.shape[-1])
            value = torch.randn(weight.shape, generator=generator) * spread
            if last in {"o", "down"}:
                value /= math.sqrt(2 * CONFIG.layers)
        found[weight.name] = value.to(device).requires_grad_()
    return found


def loss_of(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean NLL of ids (B, T + 1) in nats, and what is added to it; products in bf16."""
    added = []

    def every_expert(config: ModelConfig, layer: reference.Weights, x: torch.Tensor) -> torch.Tensor:
        """reference.feed_forward in two large products: every expert computes every token, no shape depends on data."""
        with torch.autocast(x.device.type, enabled=False):
            scores, chosen, shares = reference.route(config, layer, x.float())
        share = torch.zeros_like(scores).scatter(1, chosen, shares)  # (R, E)
        used = (share > 0).float().mean(dim=0) / config.chosen
        balance = config.experts * (used * scores.softmax(dim=-1).mean(dim=0)).sum()
        added.append(BALANCE * balance + ROUTER_SIZE * scores.logsumexp(dim=-1).square().mean())
        gate_up = torch.nn.functional.linear(x, layer["gate_up"].flatten(0, 1), layer["gate_up_bias"].flatten())
        h = reference.swiglu(config, gate_up.view(len(x), config.experts, -1)) * share.unsqueeze(-1)
        y = h.flatten(1) @ layer["down"].transpose(1, 2).flatten(0, 1) + share @ layer["down_bias"]
        return torch.nn.functional.dropout(y, DROPOUT)

    with torch.autocast(ids.device.type, torch.bfloat16):
        states = reference.hidden_states(CONFIG, weights, ids[:, :-1], every_expert)
        logits = reference.logits(CONFIG, weights, states).flatten(0, 1).float()
    nll = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    return nll, torch.stack(added).mean() + HEAD_SIZE * logits.logsumexp(dim=-1).square().mean()


@torch.no_grad()
def validate(weights: dict[str, torch.Tensor], tokens: torch.Tensor, size: int) -> float:
    """Nats per byte of text, `size` bytes, whose tokens these are; float32, sparse experts, windows of LENGTH."""
    total = 0.0
    for start in range(0, len(tokens) - 1, LENGTH):
        ids = tokens[start : start + LENGTH + 1]
        states = reference.hidden_states(CONFIG, weights, ids[None, :-1])[0]
        total += float(
            torch.nn.functional.cross_entropy(reference.logits(CONFIG, weights, states), ids[1:], reduction="sum")
        )
    return total / size


def train(
    weights: dict[str, torch.Tensor], tokens: torch.Tensor, data: dict[str, Any], options: argparse.Namespace
) -> tuple[int, list[dict[str, float]]]:
    """AdamW on random pieces of the training tokens: the number of steps taken and the curve.

    Ends with the weights of the lowest validation loss, which is computed every 200 steps.
    """
    device = tokens.device
    training, validation = tokens[: data["training_tokens"]], tokens[data["training_tokens"] :]
    matrices = {weight.name for weight in models.weights(CONFIG) if weight.packed or weight.name.endswith("router")}
    groups = [
        {"params": [value for name, value in weights.items() if name in matrices], "weight_decay": options.decay},
        {"params": [value for name, value in weights.items() if name not in matrices], "weight_decay": 0.0},
    ]
    best, kept = math.inf, {name: value.detach().clone() for name, value in weights.items()}
    usual, left_out = math.inf, 0
    optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    compute = torch.compile(loss_of) if options.compile else loss_of
    generator = torch.Generator().manual_seed(options.seed + 1)
    within = torch.arange(LENGTH + 1, device=device)

    curve: list[dict[str, float]] = []
    steps, step, begin, warm = options.steps, 0, clock(device), 0.0
    while step < steps:
        if step == WARM:
            warm = clock(device)
        if step == 2 * WARM and math.isfinite(options.seconds):
            each = (clock(device) - warm) / WARM
            steps = min(steps, step + max(1, int((options.seconds - clock(device) + begin) / each)))
            print(f"{each:.3f} s a step, {steps} steps", flush=True)
        rate = options.rate * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(0, len(training) - LENGTH - 1, (options.batch, 1), generator=generator).to(device)
        nll, added = compute(weights, training[starts + within])
        torch.autograd.backward(nll + added)
        length = float(torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0))
        if length <= SPIKE * usual:
            optimizer.step()
            usual = length if math.isinf(usual) else 0.95 * usual + 0.05 * length
        else:  # NaN comes here too
            left_out += 1
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0 or step in {1, 10, steps}:
            row = {"step": step, "training_nats_per_token": float(nll.detach()), "added": float(added.detach())}
            row |= {"gradient": usual, "left_out": left_out}
            if step % 200 == 0 or step == steps:
                row["validation_nats_per_byte"] = validate(weights, validation, data["validation_bytes"])
                if row["validation_nats_per_byte"] < best:
                    best = row["validation_nats_per_byte"]
                    kept = {name: value.detach().clone() for name, value in weights.items()}
            row["seconds"] = clock(device) - begin
            curve.append({key: round(value, 5) for key, value in row.items()})
            print(curve[-1], flush=True)
    with torch.no_grad():
        for name, value in weights.items():
            value.copy_(kept[name])
    return steps, curve


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Train, round to bfloat16, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--seconds", type=float, default=math.inf, help="take fewer steps where they would take longer")
    parser.add_argument("--batch", type=int, default=64, help=f"sequences of {LENGTH} a step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    data = json.loads((options.data / "data.json").read_text())
    stream = np.fromfile(options.data / "tokens.bin", "<u2")
    if hashlib.sha256(stream.tobytes()).hexdigest() != data["tokens_sha256"]:
        parser.error("tokens.bin is not the file that data.json describes")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = torch.from_numpy(stream.astype(np.int64)).to(device)
    # Once and on the device: nothing in a step then waits for the host or cuts the compiled graph.
    table = rope_table(LENGTH, CONFIG.head_size, CONFIG.rope_base, scaling=CONFIG.yarn).to(device)
    vars(reference)["rope_table"] = lambda length, *_, **__: table[:length]

    torch.manual_seed(options.seed)
    weights = initial(device, options.seed)
    begin = clock(device)
    steps, curve = train(weights, tokens, data, options)
    seconds = clock(device) - begin

    rounded = {name: value.detach().to(torch.bfloat16) for name, value in weights.items()}
    bits = {name: value.cpu().view(torch.int16).numpy().view("<u2") for name, value in rounded.items()}
    np.savez(options.out / "weights.npz", **cast("dict[str, Any]", bits))
    exact = {name: value.float() for name, value in rounded.items()}
    validation = tokens[data["training_tokens"] :]
    record = {
        "config": asdict(CONFIG),
        "parameters": sum(value.numel() for value in weights.values()),
        "tokens_sha256": data["tokens_sha256"],
        "weights_sha256": hashlib.sha256(b"".join(value.tobytes() for value in bits.values())).hexdigest(),
        "steps": steps,
        "sequences_per_step": options.batch,
        "tokens_per_sequence": LENGTH,
        "learning_rate": options.rate,
        "weight_decay": options.decay,
        "seed": options.seed,
        "dropout": DROPOUT,
        "compiled": options.compile,
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "device_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "validation_nats_per_byte": validate(exact, validation, data["validation_bytes"]),
        "curve": curve,
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "curve"}, indent=1))


if __name__ == "__main__":
    main()
