"""What stands in a model file beside its weights: GGUF's keys, Hugging Face's config.json, and the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mxharness.errors import UserError
from mxharness.model import gguf_file
from mxharness.model.checkpoint import Checkpoint, Vocabulary
from mxharness.model.config import ModelConfig
from mxharness.model.gguf import SWIGLU
from mxharness.model.gguf_file import GgufFile, key
from mxharness.model.huggingface import PACKED_FORMAT
from mxharness.model.tokenizer import from_json

FILE_TYPE = 38
"""llama.cpp's LLAMA_FTYPE_MOSTLY_MXFP4_MOE, its one file type with MXFP4; what counts is each tensor's own type."""
NOTE = "mxharness.quantization"
"""The key of our own: scale rule and tie rule."""
_CONTROL, _NORMAL = 3, 1


def copied_keys(file: GgufFile, rules: str) -> list[bytes]:
    """A GGUF file's keys as they are, but for the file type and the note."""
    ours = _notes(rules)
    return [gguf_file.raw_key(file, name) for name in file.keys if name not in ours] + list(ours.values())


def gguf_keys(model: Checkpoint, rules: str) -> list[bytes]:
    """The keys that llama.cpp needs of a model. Raises UserError for what GGUF cannot say."""
    config = model.config
    architecture = config.architecture
    values: dict[str, object] = {
        "block_count": config.layers,
        "context_length": config.context,
        "embedding_length": config.hidden,
        "feed_forward_length": config.ffn,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "attention.layer_norm_rms_epsilon": float(config.norm_epsilon),
        "rope.dimension_count": config.head_size,
        "rope.freq_base": float(config.rope_base),
        "vocab_size": config.vocabulary,
    }
    values |= _yarn_keys(config)
    if architecture == "gpt-oss":
        values |= _moe_keys(config)
    keys = [key("general.architecture", architecture), key("general.name", model.name)]
    keys += [key(f"{architecture}.{name}", value) for name, value in values.items()]
    return keys + _tokenizer_keys(model) + list(_notes(rules).values())


def hf_config(config: ModelConfig, ends: Sequence[int]) -> dict[str, Any]:
    """The config.json of a model."""
    moe = config.architecture == "gpt-oss"
    document: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM" if moe else "LlamaForCausalLM"],
        "model_type": "gpt_oss" if moe else "llama",
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_bias": moe,
    }
    if config.yarn:
        document["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_context,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
            "truncate": config.yarn.truncate,
        }
    if moe:
        widths = {width for width in config.windows if width is not None}
        if len(widths) > 1:
            raise UserError(f"config.json holds one sliding window, and this model has {sorted(widths)}")
        document |= {
            "num_local_experts": config.experts,
            "num_experts_per_tok": config.chosen,
            "sliding_window": widths.pop() if widths else None,
            "layer_types": ["sliding_attention" if w else "full_attention" for w in config.windows]
            or ["full_attention"] * config.layers,
            "swiglu_alpha": config.swiglu_alpha,
            "swiglu_limit": config.swiglu_limit,
        }
    if ends:
        document["eos_token_id"] = list(ends)
    return document


def quantization_config(*, experts: bool, left: Sequence[str]) -> dict[str, Any]:
    """What config.json says of MXFP4; experts: gpt-oss' own form, else compressed-tensors'; left: layers that stay."""
    if experts:
        outer = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        return {"quant_method": "mxfp4", "modules_to_not_convert": outer}
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED_FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": PACKED_FORMAT}},
        # A tied head is no tensor of the file, and a linear layer all the same.
        "ignore": sorted({"lm_head", *left}),
    }


def _notes(rules: str) -> dict[str, bytes]:
    values: dict[str, object] = {
        "general.file_type": FILE_TYPE,
        "general.quantization_version": 2,
        "general.quantized_by": "mxharness",
        NOTE: rules,
    }
    return {name: key(name, value) for name, value in values.items()}


def _yarn_keys(config: ModelConfig) -> dict[str, object]:
    if config.yarn is None:
        return {}
    if config.yarn.truncate == (config.architecture == "gpt-oss"):
        raise UserError(
            f"GGUF has no key for YaRN's truncate, and {config.architecture} is read with "
            f"{config.architecture != 'gpt-oss'}; this model has {config.yarn.truncate}"
        )
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(config.yarn.factor),
        "rope.scaling.original_context_length": config.yarn.original_context,
        "rope.scaling.yarn_beta_fast": float(config.yarn.beta_fast),
        "rope.scaling.yarn_beta_slow": float(config.yarn.beta_slow),
    }


def _moe_keys(config: ModelConfig) -> dict[str, object]:
    widths = {width for width in config.windows if width is not None}
    if (config.swiglu_alpha, config.swiglu_limit) != SWIGLU or len(widths) != 1:
        raise UserError(
            f"GGUF holds gpt-oss with SwiGLU's alpha and limit {SWIGLU} and one sliding window, not "
            f"{(config.swiglu_alpha, config.swiglu_limit)} and {sorted(widths)}"
        )
    return {
        "expert_count": config.experts,
        "expert_used_count": config.chosen,
        "expert_feed_forward_length": config.ffn,
        "attention.sliding_window": widths.pop(),
        "attention.sliding_window_pattern": tuple(width is not None for width in config.windows),
    }


def _tokenizer_keys(model: Checkpoint) -> list[bytes]:
    found = from_json(model.vocabulary) if isinstance(model.vocabulary, Path) else None
    vocabulary, special = found or (model.vocabulary, ())
    if not isinstance(vocabulary, Vocabulary) or len(vocabulary.tokens) != model.config.vocabulary:
        return [key("tokenizer.ggml.model", "none")]
    control = {*special, *model.ends}
    kinds = tuple(_CONTROL if i in control else _NORMAL for i in range(len(vocabulary.tokens)))
    values: dict[str, object] = {
        "model": "gpt2",
        "pre": vocabulary.pre_tokenizer,
        "tokens": vocabulary.tokens,
        "token_type": kinds,
        "merges": vocabulary.merges,
        "add_bos_token": False,
    }
    if model.ends:
        values["eos_token_id"] = model.ends[0]
    return [key(f"tokenizer.ggml.{name}", value) for name, value in values.items() if value != ()]
