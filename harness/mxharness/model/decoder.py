"""The decoder of config.py on the project's kernels, from token ids to logits: Llama and gpt-oss.

The residual stream and everything a kernel gives is bf16 or fp16, rounded once per kernel; sums are float32. torch
holds and reshapes tensors and computes nothing. A token's bits do not depend on the batch, nor on whether it came with
others or alone: every kernel has its order of sums per token. Source of the layers: config.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from mxharness import mxfp4
from mxharness.errors import UserError
from mxharness.functional.attention import grouped_query_attention
from mxharness.functional.embedding import embedding_lookup_batch
from mxharness.functional.ffn import swiglu_ffn_forward
from mxharness.functional.kv_cache import STORAGE, KVCache, kv_cache
from mxharness.functional.lm_head import lm_head_forward
from mxharness.functional.moe import moe_forward
from mxharness.functional.norm import rms_norm
from mxharness.functional.quantize import quantize
from mxharness.functional.rope import HEAD_DIMS, Rope, rope_table
from mxharness.model.config import weights
from mxharness.model.runner import Runner, check_ids, weights_words
from mxharness.mxfp4 import BLOCK, Quantized

if TYPE_CHECKING:
    from mxharness.device import Device
    from mxharness.model.checkpoint import Checkpoint
    from mxharness.model.config import ModelConfig

Activations = Literal["fp16", "bf16"]
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)


@dataclass(frozen=True)
class Dense:
    """SwiGLU: gate and up (F, hidden), down (hidden, F)."""

    gate: Quantized
    up: Quantized
    down: Quantized


@dataclass(frozen=True)
class Experts:
    """A mixture, as `moe_forward` takes it."""

    router: torch.Tensor
    """(E, hidden) of the activations' dtype: rounded, where it was wider."""
    router_bias: torch.Tensor
    gate_up: Quantized
    gate_up_bias: torch.Tensor
    down: Quantized
    down_bias: torch.Tensor


@dataclass(frozen=True)
class Layer:
    """One layer's weights on the device."""

    attention_norm: torch.Tensor
    qkv: Quantized
    """((H + 2 Hkv) D, hidden): the rows of q, then of k, then of v."""
    qkv_bias: torch.Tensor | None
    output: Quantized
    output_bias: torch.Tensor | None
    sinks: torch.Tensor | None
    window: int | None
    ffn_norm: torch.Tensor
    ffn: Dense | Experts


@dataclass(frozen=True)
class Decoder:
    """A model on a device; `build` makes one."""

    config: ModelConfig
    device: Device
    dtype: torch.dtype
    """Of the activations."""
    words: str
    """What `Runner.weights` says."""
    embedding: Quantized
    layers: tuple[Layer, ...]
    final_norm: torch.Tensor
    head: Quantized
    """The embedding itself where the model is tied."""
    rope: Rope

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor: MXFP4 weights, norms, biases, sinks, the router and the table of angles."""
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in _tensors(self)}.values())


def build(
    checkpoint: Checkpoint,
    device: Device,
    activations: Activations = "fp16",
    scale_rule: str = "floor",
    tie_rule: str = "even",
) -> Decoder:
    """Move a model to a device, tensor by tensor: MXFP4 as stored, other matrices quantised there by these rules.

    Raises UserError for other activations, unknown rules and for sizes that the kernels do not take.
    """
    if activations not in ACTIVATIONS:
        raise UserError(f"no activations '{activations}'; there are {', '.join(ACTIVATIONS)}")
    config, dtype = checkpoint.config, STORAGE[activations]
    _check_sizes(config)

    def packed(name: str) -> Quantized:
        stored = checkpoint.tensors[name].read()
        if isinstance(stored, Quantized):
            return Quantized(device.upload(stored.codes), device.upload(stored.scales))
        rows = device.upload(stored.float()).flatten(0, -2)
        parts = quantize(rows, scale_rule, tie_rule, device=device)
        return Quantized(*(part.reshape(*stored.shape[:-1], -1) for part in parts))

    def plain(name: str, to: torch.dtype = torch.float32) -> torch.Tensor:
        stored = checkpoint.tensors[name].read()
        values = mxfp4.dequantize(*stored) if isinstance(stored, Quantized) else stored
        return device.upload(values.to(to))

    def layer(i: int) -> Layer:
        at = f"layers.{i}."
        three = [packed(f"{at}{what}") for what in ("q", "k", "v")]
        biased = f"{at}q_bias" in checkpoint.tensors
        return Layer(
            attention_norm=plain(f"{at}attention_norm"),
            qkv=Quantized(*(torch.cat(parts) for parts in zip(*three, strict=True))),
            qkv_bias=torch.cat([plain(f"{at}{what}_bias") for what in ("q", "k", "v")]) if biased else None,
            output=packed(f"{at}o"),
            output_bias=plain(f"{at}o_bias") if biased else None,
            sinks=plain(f"{at}sinks") if f"{at}sinks" in checkpoint.tensors else None,
            window=config.window(i),
            ffn_norm=plain(f"{at}ffn_norm"),
            ffn=experts(at) if config.experts else Dense(*(packed(f"{at}{what}") for what in ("gate", "up", "down"))),
        )

    def experts(at: str) -> Experts:
        return Experts(
            router=plain(f"{at}router", dtype),
            router_bias=plain(f"{at}router_bias"),
            gate_up=packed(f"{at}gate_up"),
            gate_up_bias=plain(f"{at}gate_up_bias"),
            down=packed(f"{at}down"),
            down_bias=plain(f"{at}down_bias"),
        )

    embedding = packed("embedding")
    table = rope_table(config.context, config.head_size, config.rope_base, scaling=config.yarn)
    return Decoder(
        config=config,
        device=device,
        dtype=dtype,
        words=weights_words(checkpoint, f"{scale_rule}, {tie_rule}"),
        embedding=embedding,
        layers=tuple(layer(i) for i in range(config.layers)),
        final_norm=plain("final_norm"),
        head=embedding if config.tied else packed("head"),
        rope=Rope(device.upload(table)),
    )


def caches(decoder: Decoder, batch: int, length: int, dtype: str | None = None) -> tuple[KVCache, ...]:
    """A zeroed KV cache for every layer; dtype "bf16" or "fp16", which must be the activations' (default), or "mxfp4".

    Raises UserError as `kv_cache`.
    """
    return tuple(_cache(decoder, batch, length, dtype) for _ in decoder.layers)


def step(
    decoder: Decoder,
    ids: torch.Tensor,
    state: Sequence[KVCache],
    positions: torch.Tensor,
    *,
    validate: bool = True,
) -> torch.Tensor:
    """The final normed states (B, T, hidden) of ids (B, T) int64 on the device; their keys and values are appended.

    state: a cache for every layer, holding the positions before. positions (B) int32 on the device: of each sequence's
    first new token. validate=False: neither ids nor positions are looked at, so that nothing waits for a GPU and a
    graph can be captured; the caller answers for them. Raises UserError as the kernels' functions.
    """
    config, device = decoder.config, decoder.device
    B, T = ids.shape
    x = embedding_lookup_batch(ids, decoder.embedding, dtype=decoder.dtype, validate=validate, device=device)
    x, branch = x.view(B * T, -1), None
    for layer, cache in zip(decoder.layers, state, strict=True):
        normed, x = _add_and_norm(decoder, x, branch, layer.attention_norm)
        branch = grouped_query_attention(
            normed.view(B, T, -1), layer.qkv, layer.output, cache, positions, bias=layer.qkv_bias,
            output_bias=layer.output_bias, rope=decoder.rope, window=layer.window, sinks=layer.sinks,
            validate=validate, device=device,
        ).view(B * T, -1)  # fmt: skip
        normed, x = _add_and_norm(decoder, x, branch, layer.ffn_norm)
        branch = _feed_forward(config, layer.ffn, normed, device)
    normed, _ = _add_and_norm(decoder, x, branch, decoder.final_norm)
    return normed.view(B, T, -1)


def logits(decoder: Decoder, states: torch.Tensor) -> torch.Tensor:
    """States (R, hidden) -> (R, vocabulary) float32."""
    return lm_head_forward(states, decoder.head, device=decoder.device)


def kernels(
    checkpoint: Checkpoint,
    device: Device,
    activations: Activations = "fp16",
    scale_rule: str = "floor",
    tie_rule: str = "even",
) -> Runner:
    """The model on the kernels, for whoever reads whole sequences. Raises UserError as `build`."""
    return runner(build(checkpoint, device, activations, scale_rule, tie_rule))


def runner(decoder: Decoder) -> Runner:
    """The decoder as a `Runner`: sequences from position 0, with keys and values in the activations' dtype."""
    config, device = decoder.config, decoder.device

    def hidden_states(ids: torch.Tensor) -> torch.Tensor:
        check_ids(config, ids)
        B, T = ids.shape
        positions = device.upload(torch.zeros(B, dtype=torch.int32))
        # Every layer is done with its keys and values before the next one begins: one layer's room is enough.
        scratch = (_cache(decoder, B, T, None),) * config.layers
        return step(decoder, device.upload(ids), scratch, positions, validate=False)

    return Runner(
        config=config,
        name="kernels",
        weights=decoder.words,
        activations=_name(decoder.dtype),
        arithmetic=device.arithmetic,
        device_class=device.device_class,
        torch_device=device.torch_device,
        hidden_states=hidden_states,
        logits=lambda states: logits(decoder, states),
    )


def _cache(decoder: Decoder, batch: int, length: int, dtype: str | None) -> KVCache:
    config = decoder.config
    return kv_cache(
        batch, config.kv_heads, length, config.head_size, dtype or _name(decoder.dtype), activations=decoder.dtype,
        device=decoder.device,
    )  # fmt: skip


def _name(dtype: torch.dtype) -> Activations:
    return next(name for name in ACTIVATIONS if STORAGE[name] == dtype)


def _add_and_norm(
    decoder: Decoder, x: torch.Tensor, branch: torch.Tensor | None, gain: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normed residual stream, and the stream with the branch added."""
    epsilon, device = decoder.config.norm_epsilon, decoder.device
    if branch is None:
        return rms_norm(x, gain, epsilon, device=device), x
    return rms_norm(branch, gain, epsilon, residual=x, device=device)


def _feed_forward(config: ModelConfig, ffn: Dense | Experts, x: torch.Tensor, device: Device) -> torch.Tensor:
    if isinstance(ffn, Dense):
        return swiglu_ffn_forward(x, ffn.gate, ffn.up, ffn.down, device=device)
    return moe_forward(
        x, ffn.router, ffn.router_bias, ffn.gate_up, ffn.gate_up_bias, ffn.down, ffn.down_bias, k=config.chosen,
        alpha=config.swiglu_alpha, limit=math.inf if config.swiglu_limit is None else config.swiglu_limit,
        device=device,
    )  # fmt: skip


def _check_sizes(config: ModelConfig) -> None:
    """UserError for a model that the kernels do not take."""
    if config.head_size not in HEAD_DIMS:
        raise UserError(f"heads of {config.head_size}; the kernels take {', '.join(map(str, HEAD_DIMS))}")
    if config.heads % config.kv_heads:
        raise UserError(f"{config.heads} heads cannot share {config.kv_heads} heads of keys evenly")
    for weight in weights(config):
        if len(weight.shape) > 1 and weight.shape[-1] % BLOCK and not weight.name.endswith("bias"):
            raise UserError(
                f"{weight.name} has rows of {weight.shape[-1]}; the kernels take a multiple of {BLOCK} activations"
            )


def _tensors(part: object) -> Iterator[torch.Tensor]:
    """Every tensor in a record of tensors, pairs and records."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, tuple):
        for one in part:
            yield from _tensors(one)
    elif is_dataclass(part):
        for field in fields(part):
            yield from _tensors(getattr(part, field.name))
