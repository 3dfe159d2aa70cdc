"""A model from a GGUF file, of architecture llama or gpt-oss: configuration, weights, vocabulary.

GGUF's names and layouts, as llama.cpp's converters write them:
- llama: rows of the query and key projections lie in the order of an interleaved rotary embedding, pairs (2i, 2i + 1)
  of a head side by side; here they are put back into the order (i, i + D/2).
- gpt-oss: gate and up are two tensors, or one with all gate rows before all up rows; here rows alternate, gate first.
The order of rows changes no MXFP4 byte: blocks run along the input dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mxharness.errors import UserError
from mxharness.model.checkpoint import Checkpoint, Stored, Vocabulary, collect
from mxharness.model.config import ModelConfig, Weight
from mxharness.model.gguf_file import GgufFile, rows
from mxharness.model.gguf_file import read as read_file
from mxharness.model.tensorfile import Entry, file_sha256

if TYPE_CHECKING:
    import torch

    from mxharness.functional.rope import Yarn
    from mxharness.mxfp4 import Quantized

T = TypeVar("T")

ARCHITECTURES = ("llama", "gpt-oss")
SWIGLU = (1.702, 7.0)
"""gpt-oss' alpha and limit; GGUF has no keys for them and llama.cpp has them built in."""
_NAMES = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attention_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "o_bias": "attn_output.bias",
    "sinks": "attn_sinks.weight",
    "ffn_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
_GPT_OSS_NAMES = {
    "ffn_norm": "post_attention_norm.weight",
    "router": "ffn_gate_inp.weight",
    "router_bias": "ffn_gate_inp.bias",
    "gate_up": "ffn_gate_up_exps.weight",
    "gate_up_bias": "ffn_gate_up_exps.bias",
    "down": "ffn_down_exps.weight",
    "down_bias": "ffn_down_exps.bias",
}


def read(path: Path) -> Checkpoint:
    """The model in a GGUF file.

    Raises UserError for a missing or damaged file, another architecture or tokenizer, tensors that are missing, of
    another shape, or unknown; the weights themselves are read when they are asked for.
    """
    file = read_file(path)
    config = read_config(file)
    used: set[str] = set()

    def take(name: str) -> Entry:
        if name not in file.tensors:
            raise UserError(f"{path.name} has no tensor '{name}'; it is no complete {config.architecture} model")
        used.add(name)
        return file.tensors[name]

    tensors = collect(config, partial(_stored, config, file, take), path.name)
    if unknown := [name for name in file.tensors if name not in used]:
        raise UserError(
            f"{path.name} has {len(unknown)} tensors that {config.architecture} does not, '{unknown[0]}' the first; "
            "run without them, it would compute something else"
        )
    ends = (file.keys.get(f"tokenizer.ggml.{which}_token_id") for which in ("eos", "eot"))
    return Checkpoint(
        name=path.stem,
        sha256=file_sha256(path),
        config=config,
        tensors=tensors,
        vocabulary=_vocabulary(file),
        ends=tuple(dict.fromkeys(end for end in ends if type(end) is int)),
    )


def gguf_name(name: str, architecture: str = "llama") -> str:
    """GGUF's name of a weight: "layers.3.q" is "blk.3.attn_q.weight"."""
    *layer, last = name.split(".")
    names = _NAMES | (_GPT_OSS_NAMES if architecture == "gpt-oss" else {})
    return ".".join((*(("blk", layer[1]) if layer else ()), names[last]))


def halves(name: str) -> tuple[str, str]:
    """The two tensors that hold gate and up where "ffn_gate_up_exps" is not one."""
    return name.replace("gate_up", "gate"), name.replace("gate_up", "up")


def read_config(file: GgufFile) -> ModelConfig:
    """Sizes and constants from a file's metadata. Raises UserError for another architecture and missing fields."""
    architecture = _field(file, "general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{file.path.name} holds a model of architecture '{architecture}'; "
            f"only {' and '.join(ARCHITECTURES)} can be run"
        )

    def integer(name: str, default: int | None = None) -> int:
        return _field(file, f"{architecture}.{name}", int, default)

    heads, hidden = integer("attention.head_count"), integer("embedding_length")
    head_size = integer("attention.key_length", hidden // max(heads, 1))
    rotated = integer("rope.dimension_count", head_size)
    if rotated != head_size or integer("attention.value_length", head_size) != head_size:
        raise UserError(f"{file.path.name} rotates {rotated} of a head's {head_size} elements; only all can be run")
    if "rope_freqs.weight" in file.tensors:
        raise UserError(f"{file.path.name} scales its rotary frequencies by a table; only plain RoPE and YaRN can run")
    layers = integer("block_count")
    moe = architecture == "gpt-oss"
    alpha, limit = SWIGLU if moe else (1.0, None)
    return ModelConfig(
        architecture="gpt-oss" if moe else "llama",
        layers=layers,
        hidden=hidden,
        ffn=integer("expert_feed_forward_length") if moe else integer("feed_forward_length"),
        heads=heads,
        kv_heads=integer("attention.head_count_kv", heads),
        head_size=head_size,
        vocabulary=file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0,
        context=integer("context_length"),
        norm_epsilon=_field(file, f"{architecture}.attention.layer_norm_rms_epsilon", float),
        rope_base=_field(file, f"{architecture}.rope.freq_base", float, 10000.0),
        yarn=_yarn(file, architecture),
        tied="output.weight" not in file.tensors,
        windows=_windows(file, layers) if moe else (),
        experts=integer("expert_count") if moe else 0,
        chosen=integer("expert_used_count") if moe else 0,
        swiglu_alpha=alpha,
        swiglu_limit=limit,
    )


def _field(file: GgufFile, name: str, kind: type[T], default: T | None = None) -> T:
    value = file.keys.get(name, default)
    if value is None:
        raise UserError(f"{file.path.name} has no field '{name}'; it is no complete model")
    if type(value) is not kind:
        raise UserError(f"{file.path.name}'s field '{name}' is {value!r:.40}, not of type {kind.__name__}")
    return value


def _yarn(file: GgufFile, architecture: str) -> Yarn | None:
    prefix = f"{architecture}.rope.scaling."
    kind = _field(file, prefix + "type", str, "none")
    if kind == "none" or (kind == "linear" and _field(file, prefix + "factor", float, 1.0) == 1.0):
        return None
    factors = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}
    others = [name for name, plain in factors.items() if file.keys.get(prefix + name, plain) != plain]
    if kind != "yarn" or others:
        raise UserError(f"{file.path.name} scales RoPE by '{' and '.join(others) or kind}'; only plain YaRN can be run")
    from mxharness.functional.rope import Yarn

    return Yarn(
        factor=_field(file, prefix + "factor", float),
        original_context=_field(file, prefix + "original_context_length", int),
        beta_fast=_field(file, prefix + "yarn_beta_fast", float, 32.0),
        beta_slow=_field(file, prefix + "yarn_beta_slow", float, 1.0),
        # GGUF has no key for it. gpt-oss was trained without; llama.cpp rounds the ramp's ends for every model.
        truncate=architecture != "gpt-oss",
    )


def _windows(file: GgufFile, layers: int) -> tuple[int | None, ...]:
    """gpt-oss' sliding windows: every other layer's, the first one included, unless the file says otherwise."""
    window = _field(file, "gpt-oss.attention.sliding_window", int)
    pattern = file.keys.get("gpt-oss.attention.sliding_window_pattern", 2)
    if type(pattern) is int and pattern > 0:
        pattern = tuple(i % pattern < pattern - 1 for i in range(min(layers, 1 << 16)))
    if not isinstance(pattern, tuple) or len(pattern) != layers:
        raise UserError(f"{file.path.name}'s sliding_window_pattern does not say which of {layers} layers slide")
    return tuple(window if slides else None for slides in pattern)


def _stored(config: ModelConfig, file: GgufFile, take: Callable[[str], Entry], weight: Weight) -> Stored:
    what = weight.name.rsplit(".", 1)[-1]
    name = gguf_name(weight.name, config.architecture)
    if what in {"gate_up", "gate_up_bias"}:
        if name in file.tensors:
            entry = take(name)
            return Stored(entry.shape, entry.format, partial(_alternating, entry))
        gate, up = (take(half) for half in halves(name))
        if gate.shape != up.shape or gate.format != up.format:
            raise UserError(f"{file.path.name}'s '{gate.name}' and '{up.name}' differ in shape or format")
        shape = (gate.shape[0], 2 * gate.shape[1], *gate.shape[2:])
        return Stored(shape, gate.format, partial(_alternating, gate, up))
    entry = take(name)
    heads = {"q": config.heads, "k": config.kv_heads}.get(what) if config.architecture == "llama" else None
    return Stored(entry.shape, entry.format, partial(_whole, entry, heads))


def _whole(entry: Entry, heads: int | None = None) -> torch.Tensor | Quantized:
    """A tensor in its shape; heads: put rows of so many heads from pairs side by side into half-split order."""

    def order(tensor: torch.Tensor) -> torch.Tensor:
        if heads:
            tensor = tensor.view(heads, -1, 2, tensor.shape[-1]).transpose(1, 2).contiguous()
        return tensor.view(*entry.shape[:-1], tensor.shape[-1])

    return _each(order, rows(entry))


def _alternating(gate: Entry, up: Entry | None = None) -> torch.Tensor | Quantized:
    """Rows of gate and up in turn, (E, 2F, ...); without `up` the first holds all gate rows, then all up rows."""
    import torch

    from mxharness.mxfp4 import Quantized

    if up is None:
        return _each(lambda t: torch.stack(t.chunk(2, 1), 2).flatten(1, 2), _whole(gate))
    first, second = _whole(gate), _whole(up)
    if isinstance(first, Quantized) and isinstance(second, Quantized):
        return Quantized(*(torch.stack(pair, 2).flatten(1, 2) for pair in zip(first, second, strict=True)))
    assert isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)  # noqa: S101, PT018  of one format
    return torch.stack((first, second), 2).flatten(1, 2)


def _each(
    function: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor | Quantized
) -> torch.Tensor | Quantized:
    from mxharness.mxfp4 import Quantized

    return Quantized(*map(function, tensor)) if isinstance(tensor, Quantized) else function(tensor)


def _vocabulary(file: GgufFile) -> Vocabulary | None:
    kind = _field(file, "tokenizer.ggml.model", str, "none")
    if kind in {"none", "no_vocab"}:
        return None
    if kind != "gpt2":
        raise UserError(f"{file.path.name} has a tokenizer of kind '{kind}'; only byte-level BPE (gpt2) can be run")
    return Vocabulary(
        tokens=_field(file, "tokenizer.ggml.tokens", tuple),
        merges=_field(file, "tokenizer.ggml.merges", tuple),
        pre_tokenizer=_field(file, "tokenizer.ggml.pre", str),
    )
