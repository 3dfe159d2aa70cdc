"""Hugging Face's names and layouts of llama and gpt-oss, for files and for models in memory.

gpt-oss' experts are (E, K, N) where they are floats, inputs first, and are turned to (E, N, K) here; in MXFP4 they are
`_blocks` (E, N, K/32, 16) and `_scales` (E, N, K/32). compressed-tensors' `mxfp4-pack-quantized` keeps a linear layer
as `weight_packed` (N, K/2) and `weight_scale` (N, K/32). Both have the linear nibble order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mxharness.errors import UserError
from mxharness.model.checkpoint import Stored, collect
from mxharness.model.config import Architecture, ModelConfig, Weight

if TYPE_CHECKING:
    import torch

    from mxharness.functional.rope import Yarn
    from mxharness.mxfp4 import Quantized

ARCHITECTURES: dict[str, Architecture] = {"llama": "llama", "gpt_oss": "gpt-oss"}
"""transformers' model_type: the name here."""
PACKED_FORMAT = "mxfp4-pack-quantized"
_OUTER = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
_LAYER = {
    "attention_norm": "input_layernorm.weight",
    **{what: f"self_attn.{what}_proj.weight" for what in "qkvo"},
    **{f"{what}_bias": f"self_attn.{what}_proj.bias" for what in "qkvo"},
    "sinks": "self_attn.sinks",
    "ffn_norm": "post_attention_layernorm.weight",
}
_DENSE = {what: f"mlp.{what}_proj.weight" for what in ("gate", "up", "down")}
_EXPERTS = {
    "router": "mlp.router.weight",
    "router_bias": "mlp.router.bias",
    **{
        what: f"mlp.experts.{what.replace('_bias', '')}_proj{'_bias' if 'bias' in what else ''}"
        for what in ("gate_up", "gate_up_bias", "down", "down_bias")
    },
}
_IGNORED = "rotary_emb.inv_freq"
"""Frequencies that old versions of transformers saved; they follow from the configuration."""


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint, under its name there."""

    shape: tuple[int, ...]
    format: str
    read: Callable[[], torch.Tensor]
    """As stored, float32 or uint8, on the CPU."""


def name_of(name: str, architecture: Architecture) -> str:
    """Hugging Face's name of a weight: "layers.3.q" is "model.layers.3.self_attn.q_proj.weight"."""
    if name in _OUTER:
        return _OUTER[name]
    _, layer, what = name.split(".")
    return f"model.layers.{layer}.{(_LAYER | (_EXPERTS if architecture == 'gpt-oss' else _DENSE))[what]}"


def read_config(document: Mapping[str, Any], where: str) -> ModelConfig:
    """Sizes and constants from a config.json. Raises UserError for another architecture, missing or wrong fields."""
    kind = document.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"{where} is a model of type '{kind}'; only {' and '.join(ARCHITECTURES)} can be run")

    def integer(name: str, default: int | None = None) -> int:
        return int(_number(document, name, where, default, whole=True))

    hidden, heads, layers = integer("hidden_size"), integer("num_attention_heads"), integer("num_hidden_layers")
    moe = kind == "gpt_oss"
    rope = document.get("rope_parameters") or document.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{where} has no rope_parameters that can be read: {rope!r:.40}")
    base = _number(rope if "rope_theta" in rope else document, "rope_theta", where, 1e4)
    if not moe and document.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where} has the activation '{document['hidden_act']}'; only silu can be run")
    return ModelConfig(
        architecture=ARCHITECTURES[kind],
        layers=layers,
        hidden=hidden,
        ffn=integer("intermediate_size"),
        heads=heads,
        kv_heads=integer("num_key_value_heads", heads),
        head_size=integer("head_dim", hidden // max(heads, 1)),
        vocabulary=integer("vocab_size"),
        context=integer("max_position_embeddings"),
        norm_epsilon=_number(document, "rms_norm_eps", where, 1e-6),
        rope_base=base,
        yarn=_yarn(rope, where),
        tied=bool(document.get("tie_word_embeddings", False)),
        windows=_windows(document, layers, where) if moe else (),
        experts=integer("num_local_experts") if moe else 0,
        chosen=integer("num_experts_per_tok", document.get("experts_per_token")) if moe else 0,
        swiglu_alpha=_number(document, "swiglu_alpha", where, 1.702) if moe else 1.0,
        swiglu_limit=_number(document, "swiglu_limit", where, 7.0) if moe else None,
    )


def tensors(config: ModelConfig, sources: Mapping[str, Source], where: str) -> dict[str, Stored]:
    """A model's weights out of tensors under Hugging Face's names.

    Raises UserError for those that are missing, of another shape, or unknown to the architecture.
    """
    used: set[str] = set()

    def take(name: str) -> Source:
        if name not in sources:
            raise UserError(f"{where} has no tensor '{name}'; it is no complete {config.architecture} model")
        used.add(name)
        return sources[name]

    found = collect(config, partial(_stored, config, sources, take), where)
    skipped = {"lm_head.weight"} if config.tied else set()
    if unknown := [name for name in sources if name not in used | skipped and not name.endswith(_IGNORED)]:
        raise UserError(
            f"{where} has {len(unknown)} tensors that {config.architecture} does not, '{unknown[0]}' the first; "
            "run without them, it would compute something else"
        )
    return found


def ends(*documents: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a text, by config.json and generation_config.json."""
    named = [document.get("eos_token_id") for document in documents]
    flat = [one for value in named for one in (value if isinstance(value, list) else [value])]
    return tuple(dict.fromkeys(one for one in flat if type(one) is int))


def _number(
    document: Mapping[str, Any], name: str, where: str, default: float | None = None, *, whole: bool = False
) -> float:
    value = document.get(name)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{where} has no '{name}'; it is no complete configuration")
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise UserError(f"{where} has {value!r:.40} for '{name}', which is no {'whole ' if whole else ''}number")
    return value


def _yarn(rope: Mapping[str, Any], where: str) -> Yarn | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    others = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(name)]
    if kind != "yarn" or others:
        raise UserError(f"{where} scales RoPE by '{' and '.join(others) or kind}'; only plain YaRN can be run")
    from mxharness.functional.rope import Yarn

    return Yarn(
        factor=_number(rope, "factor", where),
        original_context=int(_number(rope, "original_max_position_embeddings", where, whole=True)),
        beta_fast=_number(rope, "beta_fast", where, 32.0),
        beta_slow=_number(rope, "beta_slow", where, 1.0),
        truncate=bool(rope.get("truncate", True)),
    )


def _windows(document: Mapping[str, Any], layers: int, where: str) -> tuple[int | None, ...]:
    window = document.get("sliding_window", 128)
    if window is None:
        return ()
    window = int(_number(document, "sliding_window", where, 128, whole=True))
    default = [("full_attention", "sliding_attention")[i % 2 == 0] for i in range(min(layers, 1 << 16))]
    kinds = document.get("layer_types") or default
    if not isinstance(kinds, list) or set(map(str, kinds)) - {"sliding_attention", "full_attention"}:
        raise UserError(f"{where} has layers of a kind that cannot be run: {kinds!r:.60}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _stored(
    config: ModelConfig, sources: Mapping[str, Source], take: Callable[[str], Source], weight: Weight
) -> Stored:
    name = name_of(weight.name, config.architecture)
    what = weight.name.rsplit(".", 1)[-1]
    experts = config.architecture == "gpt-oss" and what in {"gate_up", "down"}
    codes, scales = (f"{name}_blocks", f"{name}_scales") if experts else (f"{name}_packed", f"{name}_scale")
    if codes in sources:
        pair = take(codes), take(scales)
        shape = pair[1].shape[:-1] + tuple(32 * size for size in pair[1].shape[-1:])
        wanted = (*pair[1].shape, 16) if experts else (*shape[:-1], shape[-1] // 2)
        if pair[0].shape != wanted or {pair[0].format, pair[1].format} - {"U8", "F8_E8M0"}:
            raise UserError(f"'{codes}' {pair[0].shape} and '{scales}' {pair[1].shape} do not belong together")
        return Stored(shape, "MXFP4", partial(_pair, *pair, scales))
    source = take(name)
    if experts and len(source.shape) == 3:
        E, K, N = source.shape
        return Stored((E, N, K), source.format, partial(_turned, source))
    return Stored(source.shape, source.format, source.read)


def _pair(codes: Source, scales: Source, name: str) -> Quantized:
    from mxharness.model.tensorfile import finite
    from mxharness.mxfp4 import Quantized

    bytes_of_scales = scales.read()
    found = Quantized(codes.read().view(*scales.shape[:-1], scales.shape[-1] * 16), bytes_of_scales)
    finite(found, name, "this model")
    return found


def _turned(source: Source) -> torch.Tensor:
    return source.read().transpose(1, 2).contiguous()
