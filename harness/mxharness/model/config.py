"""What a decoder is made of: sizes, constants, and the names and shapes of its weights; Llama and gpt-oss.

    x <- E[id]
    x <- x + Wo attention(rope(Wq n(x)), rope(Wk n(x)), Wv n(x));   x <- x + ffn(n(x));   logits = Whead n(x)

Llama: ffn is SwiGLU, no biases. gpt-oss: biases on q, k, v and o, a learnt sink per head, every other layer sees a
sliding window, YaRN, and ffn is a mixture of experts. Sources: Touvron et al., arXiv 2302.13971; OpenAI, gpt-oss model
card, arXiv 2508.10925.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mxharness.functional.rope import Yarn

Architecture = Literal["llama", "gpt-oss"]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one model."""

    architecture: Architecture
    layers: int
    hidden: int
    ffn: int
    """Of one expert, where there are experts."""
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    """Longest sequence the model was trained for."""
    norm_epsilon: float
    rope_base: float
    yarn: Yarn | None = None
    tied: bool = True
    """The head is the embedding."""
    windows: tuple[int | None, ...] = ()
    """For each layer the sliding window, None where a query sees everything before it; () for none anywhere."""
    experts: int = 0
    """0: the layer's ffn is dense."""
    chosen: int = 0
    """Experts a token goes to."""
    swiglu_alpha: float = 1.0
    swiglu_limit: float | None = None

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer."""
        return self.windows[layer] if self.windows else None


@dataclass(frozen=True)
class Weight:
    """One weight's place in a model."""

    name: str
    shape: tuple[int, ...]
    packed: bool
    """Whether it is held in MXFP4; the others are norms, biases, sinks and the router, float32."""


def weights(config: ModelConfig) -> Iterator[Weight]:
    """Every weight: "embedding", "layers.<i>.<what>", "final_norm" and, unless tied, "head".

    Matrices are (N, K), rows are outputs; experts' are (E, N, K). Rows of q and k are in the order that rotates pairs
    (i, i + D/2); rows of gpt-oss' gate_up alternate, even rows are the gate.
    """
    hidden, q, kv = config.hidden, config.heads * config.head_size, config.kv_heads * config.head_size
    yield Weight("embedding", (config.vocabulary, hidden), packed=True)
    for i in range(config.layers):
        yield Weight(f"layers.{i}.attention_norm", (hidden,), packed=False)
        for what, rows, columns in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            yield Weight(f"layers.{i}.{what}", (rows, columns), packed=True)
            if config.architecture == "gpt-oss":
                yield Weight(f"layers.{i}.{what}_bias", (rows,), packed=False)
        if config.architecture == "gpt-oss":
            yield Weight(f"layers.{i}.sinks", (config.heads,), packed=False)
        yield Weight(f"layers.{i}.ffn_norm", (hidden,), packed=False)
        yield from (Weight(f"layers.{i}.{name}", shape, packed) for name, shape, packed in _ffn(config))
    yield Weight("final_norm", (hidden,), packed=False)
    if not config.tied:
        yield Weight("head", (config.vocabulary, hidden), packed=True)


def _ffn(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    hidden, ffn, experts = config.hidden, config.ffn, config.experts
    if not experts:
        yield "gate", (ffn, hidden), True
        yield "up", (ffn, hidden), True
        yield "down", (hidden, ffn), True
        return
    yield "router", (experts, hidden), False
    yield "router_bias", (experts,), False
    yield "gate_up", (experts, 2 * ffn, hidden), True
    yield "gate_up_bias", (experts, 2 * ffn), False
    yield "down", (experts, hidden, ffn), True
    yield "down_bias", (experts, hidden), False
