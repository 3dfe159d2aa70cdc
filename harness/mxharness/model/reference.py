"""The decoder of config.py in torch alone: what the kernels' decoder is compared with, and what trains.

    x <- E[id]
    x <- x + Wo attention(rope(Wq n(x)), rope(Wk n(x)), Wv n(x));   x <- x + ffn(n(x))
    logits = Whead n(x),        n(x) = g * x / sqrt(mean(x^2) + epsilon)

Every product is written out: no fused attention, which may pick a reduced precision. The functions work in the
weights' dtype, float32 for results and float64 to judge these, and autograd goes through them. Sources: Touvron et
al., arXiv 2302.13971 (Llama); openai/gpt-oss, gpt_oss/torch/model.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear, silu

from mxharness import mxfp4
from mxharness.errors import UserError
from mxharness.functional.rope import rope_table
from mxharness.model import config as models
from mxharness.model.checkpoint import packed, values
from mxharness.model.runner import Runner, check_ids, weights_words

if TYPE_CHECKING:
    from mxharness.model.checkpoint import Checkpoint, Stored
    from mxharness.model.config import ModelConfig

Weights = Mapping[str, torch.Tensor]
"""By the names of `config.weights`, all of one floating dtype and on one device."""
Ffn = Callable[["ModelConfig", Weights, torch.Tensor], torch.Tensor]
"""(config, the layer's weights by their last names, x (R, hidden)) -> (R, hidden)."""
QUERIES = 64
"""That are computed with together: what a query attends to ends with it, so the first ones cost less than the last."""


def hidden_states(config: ModelConfig, weights: Weights, ids: torch.Tensor, ffn: Ffn | None = None) -> torch.Tensor:
    """The final normed states (B, T, hidden), of the weights' dtype, of ids (B, T) int64 on the weights' device.

    ffn: in place of `feed_forward`, for one who wants to see or schedule the experts differently.
    """
    x = weights["embedding"][ids]  # (B, T, hidden)
    turns = rope_table(ids.shape[1], config.head_size, config.rope_base, scaling=config.yarn).to(x)
    windows = [config.window(i) for i in range(config.layers)]
    unseen = {window: _unseen(ids.shape[1], window).to(x.device) for window in set(windows)}
    for i, window in enumerate(windows):
        prefix = f"layers.{i}."
        layer = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        x = x + _attention(config, layer, _norm(config, x, layer["attention_norm"]), turns, unseen[window])
        normed = _norm(config, x, layer["ffn_norm"])
        x = x + (ffn or feed_forward)(config, layer, normed.flatten(0, 1)).view_as(x)
    return _norm(config, x, weights["final_norm"])


def logits(config: ModelConfig, weights: Weights, states: torch.Tensor) -> torch.Tensor:
    """The head: states (..., hidden) -> (..., vocabulary)."""
    return linear(states, weights["embedding" if config.tied else "head"])


def feed_forward(config: ModelConfig, layer: Weights, x: torch.Tensor) -> torch.Tensor:
    """SwiGLU of x (R, hidden), or for a mixture the weighted sum over the experts that `route` gives each row.

    An expert computes only its own rows, so that nothing an expert holds reaches a row that did not choose it.
    """
    if not config.experts:
        return linear(silu(linear(x, layer["gate"])) * linear(x, layer["up"]), layer["down"])
    _, chosen, shares = route(config, layer, x)
    y = torch.zeros_like(x)
    for expert in range(config.experts):
        rows, slots = (chosen == expert).nonzero(as_tuple=True)
        gate_up = linear(x[rows], layer["gate_up"][expert], layer["gate_up_bias"][expert])
        returned = linear(swiglu(config, gate_up), layer["down"][expert], layer["down_bias"][expert])
        y = y.index_add(0, rows, returned * shares[rows, slots, None])
    return y


def route(config: ModelConfig, layer: Weights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Router logits (R, experts), the ids (R, chosen) of the largest, and the softmax (R, chosen) over these alone."""
    scores = linear(x, layer["router"], layer["router_bias"])
    largest, chosen = scores.topk(config.chosen, dim=-1)
    return scores, chosen, largest.softmax(dim=-1)


def swiglu(config: ModelConfig, gate_up: torch.Tensor) -> torch.Tensor:
    """(..., 2 ffn), gate and up side by side -> (..., ffn): g sigmoid(alpha g) (u + 1), both clipped to the limit."""
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    if config.swiglu_limit is not None:
        gate, up = gate.clamp(max=config.swiglu_limit), up.clamp(-config.swiglu_limit, config.swiglu_limit)
    return gate * torch.sigmoid(config.swiglu_alpha * gate) * (up + 1)


def float32(checkpoint: Checkpoint, torch_device: torch.device | None = None) -> Runner:
    """The weights as the checkpoint holds them, in float32 torch; what it stores in MXFP4 is decoded, exactly.

    Raises UserError where torch is set to multiply float32 with reduced precision.
    """
    return _runner("float32", checkpoint, torch_device, weights_words(checkpoint), values)


def decoded(
    checkpoint: Checkpoint, torch_device: torch.device | None = None, scale_rule: str = "floor", tie_rule: str = "even"
) -> Runner:
    """Float32 torch on the values that the kernels' MXFP4 weights have: the reference of the kernels' decoder.

    Every weight that config.py calls packed is rounded along its rows, or is as stored where the checkpoint holds
    MXFP4. Raises UserError for an unknown rule and where torch multiplies float32 with reduced precision.
    """

    def decode(stored: Stored) -> torch.Tensor:
        return mxfp4.dequantize(*packed(stored, scale_rule, tie_rule))[..., : stored.shape[-1]]

    return _runner("decoded", checkpoint, torch_device, weights_words(checkpoint, f"{scale_rule}, {tie_rule}"), decode)


def _runner(
    name: str,
    checkpoint: Checkpoint,
    torch_device: torch.device | None,
    words: str,
    decode: Callable[[Stored], torch.Tensor],
) -> Runner:
    if torch.get_float32_matmul_precision() != "highest":
        raise UserError("torch multiplies float32 with reduced precision; call set_float32_matmul_precision('highest')")
    config, where = checkpoint.config, torch_device or torch.device("cpu")
    device_class = "cpu"
    if where.type == "cuda":
        device_class = "sm_{}{}".format(*torch.cuda.get_device_capability(where))
    weights = {
        weight.name: (decode if weight.packed else values)(checkpoint.tensors[weight.name]).to(where)
        for weight in models.weights(config)
    }

    def states_of(ids: torch.Tensor) -> torch.Tensor:
        check_ids(config, ids)
        return hidden_states(config, weights, ids.to(where))

    return Runner(
        config=config,
        name=name,
        weights=words,
        activations="fp32",
        arithmetic="torch float32",
        device_class=device_class,
        torch_device=where,
        hidden_states=states_of,
        logits=lambda states: logits(config, weights, states),
    )


def _norm(config: ModelConfig, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # half overflows at 256, squared
    return (wide * (wide.square().mean(dim=-1, keepdim=True) + config.norm_epsilon).rsqrt() * gain).to(x.dtype)


def _unseen(length: int, window: int | None) -> torch.Tensor:
    """(T, T) bool: which keys a query does not attend to, later ones and those before its window."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    return ~(seen if window is None else seen.triu(1 - window))


def _attention(
    config: ModelConfig, layer: Weights, x: torch.Tensor, turns: torch.Tensor, unseen: torch.Tensor
) -> torch.Tensor:
    """Causal attention of normed states x (B, T, hidden); heads // kv_heads queries share a key and a value."""
    batch, length, _ = x.shape

    def heads(what: str) -> torch.Tensor:  # (B, H, T, D)
        projected = linear(x, layer[what], layer.get(f"{what}_bias"))
        return projected.view(batch, length, -1, config.head_size).transpose(1, 2)

    shape = (batch, config.kv_heads, config.heads // config.kv_heads)
    q = (_rotate(heads("q"), turns) * (1 / math.sqrt(config.head_size))).view(*shape, length, -1)
    k, v = _rotate(heads("k"), turns), heads("v")
    parts = []
    for first in range(0, length, QUERIES):
        rows, keys = slice(first, first + QUERIES), slice(first + QUERIES)  # which none of these looks past
        scores = q[..., rows, :].flatten(2, 3) @ k[..., keys, :].mT
        scores = scores.view(*shape, -1, scores.shape[-1]).masked_fill_(unseen[rows, keys], -math.inf)
        if "sinks" in layer:  # one more column, which every query may attend to and which has no value
            sinks = layer["sinks"].to(scores).view(*shape[1:], 1, 1).expand(*scores.shape[:-1], 1)
            attention = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
        else:
            attention = scores.softmax(dim=-1)
        parts.append((attention.flatten(2, 3) @ v[..., keys, :]).view(*shape, -1, config.head_size))
    mixed = torch.cat(parts, dim=3).flatten(1, 2)  # (B, H, T, D)
    return linear(mixed.transpose(1, 2).flatten(2), layer["o"], layer.get("o_bias"))


def _rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + D/2) of x (B, H, T, D) by turns (T, D/2, 2), cosine and sine."""
    cosine, sine = turns.unbind(-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
