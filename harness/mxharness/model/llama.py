"""The Llama decoder, in float32 torch; every contraction with a weight goes through a Backend.

    x <- E[id]
    x <- x + Wo attention(rope(Wq n(x)), rope(Wk n(x)), Wv n(x));   x <- x + Wdown (silu(Wgate n(x)) * Wup n(x))
    logits = Whead n(x),        n(x) = g * x / sqrt(mean(x^2) + epsilon)

Attention, norms, rotary embedding and the residual stream are float32 on every backend: what differs between two
backends is the weights and the arithmetic of the linear layers and the embedding, and nothing else.
Source: Touvron et al., arXiv 2302.13971; grouped queries: Ainslie et al., arXiv 2305.13245.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from mxharness.errors import UserError

if TYPE_CHECKING:
    import torch

    from mxharness.model.backend import Backend

W = TypeVar("W")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of one model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    rope_base: float
    norm_epsilon: float
    context: int
    """Longest sequence the model was trained for."""
    tied: bool
    """The head is the embedding."""


_NORMS = ("attention_norm", "ffn_norm")
_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


def weight_names(config: LlamaConfig) -> tuple[str, ...]:
    """Every weight of a model: embedding, layers.<i>.<what>, final_norm and, unless tied, head."""
    layers = (f"layers.{i}.{what}" for i in range(config.layers) for what in (*_NORMS, *_LINEARS))
    return ("embedding", *layers, "final_norm", *(() if config.tied else ("head",)))


@dataclass(frozen=True)
class Llama(Generic[W]):
    """A model on a device: `matrices` are a backend's handles, `norms` float32 vectors."""

    config: LlamaConfig
    backend: Backend[W]
    matrices: Mapping[str, W]
    norms: Mapping[str, torch.Tensor]


def build(config: LlamaConfig, weights: Mapping[str, torch.Tensor], backend: Backend[W]) -> Llama[W]:
    """Move a model to a backend's device, once; weights: float32 by `weight_names`, (N, K) or (hidden,)."""
    norms = {name: weights[name].to(backend.torch_device) for name in weight_names(config) if name.endswith("norm")}
    matrices = {name: backend.prepare(weights[name]) for name in weight_names(config) if name not in norms}
    return Llama(config, backend, matrices, norms)


def hidden_states(model: Llama[W], ids: torch.Tensor) -> torch.Tensor:
    """The final normed states: ids (B, T) int64 -> (B, T, hidden) float32.

    Raises UserError for sequences longer than the context and ids outside the vocabulary.
    """
    config, linear = model.config, model.backend.linear
    if ids.shape[1] > config.context:
        raise UserError(f"a window of {ids.shape[1]} tokens does not fit the model's context of {config.context}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocabulary:
        raise UserError(
            f"token ids from {int(ids.min())} to {int(ids.max())}; the model has 0 to {config.vocabulary - 1}"
        )
    ids = ids.to(model.backend.torch_device)
    batch, length = ids.shape
    cosine, sine = _rotations(config, length, ids.device)
    hidden = model.backend.embedding(ids.reshape(-1), model.matrices["embedding"])  # (B T, hidden)

    def heads(x: torch.Tensor) -> torch.Tensor:  # (B T, H D) -> (B, H, T, D)
        return x.view(batch, length, -1, config.head_size).transpose(1, 2)

    for i in range(config.layers):
        weight = {what: model.matrices[f"layers.{i}.{what}"] for what in _LINEARS}
        x = _norm(hidden, model.norms[f"layers.{i}.attention_norm"], config.norm_epsilon)
        q = _rotate(heads(linear(x, weight["q"])), cosine, sine)
        k = _rotate(heads(linear(x, weight["k"])), cosine, sine)
        mixed = _attention(q, k, heads(linear(x, weight["v"])))
        hidden = hidden + linear(mixed.transpose(1, 2).reshape(batch * length, -1), weight["o"])
        x = _norm(hidden, model.norms[f"layers.{i}.ffn_norm"], config.norm_epsilon)
        gate = linear(x, weight["gate"])
        hidden = hidden + linear(gate.sigmoid().mul_(gate).mul_(linear(x, weight["up"])), weight["down"])
    return _norm(hidden, model.norms["final_norm"], config.norm_epsilon).view(batch, length, -1)


def logits(model: Llama[W], states: torch.Tensor) -> torch.Tensor:
    """The head: states (R, hidden) float32 -> (R, vocabulary) float32."""
    return model.backend.linear(states, model.matrices["embedding" if model.config.tied else "head"])


def _norm(x: torch.Tensor, gain: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt() * gain


def _rotations(config: LlamaConfig, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position * base^(-2i/D), (T, D/2) float32, from angles in float64."""
    import torch

    size = config.head_size
    rates = config.rope_base ** (-torch.arange(0, size, 2, dtype=torch.float64, device=device) / size)
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * rates
    return angles.cos().float(), angles.sin().float()


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + D/2) of x (B, H, T, D)."""
    import torch

    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention: q (B, H, T, D), k and v (B, G, T, D) -> (B, H, T, D); H / G queries share a key.

    Written out instead of scaled_dot_product_attention, which may pick reduced precision on a GPU.
    """
    import torch

    batch, heads, length, size = q.shape
    q = q.reshape(batch, k.shape[1], -1, size)  # (B, G, H/G T, D)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(size))
    scores = scores.view(batch, heads, length, length)
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
    weights = scores.masked_fill_(future, -math.inf).softmax(dim=-1)
    return (weights.view(batch, k.shape[1], -1, length) @ v).view(batch, heads, length, size)
