"""A Llama model from a GGUF file: configuration, float32 weights, vocabulary.

GGUF stores the rows of the query and key projections in the order of llama.cpp's interleaved rotary embedding,
pairs (2i, 2i + 1) of a head side by side (`permute` in llama.cpp's converter). `load` puts them back into the order
(i, i + D/2) that llama.py rotates. The order of rows changes no MXFP4 code: blocks run along the input dimension.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxharness.errors import Unavailable, UserError
from mxharness.model.llama import LlamaConfig, weight_names

if TYPE_CHECKING:
    import torch

# llama.py's name of a weight, without "layers.<i>.": its GGUF name, without "blk.<i>."
_NAMES = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


@dataclass(frozen=True)
class Vocabulary:
    """What a byte-level BPE tokenizer is made of."""

    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    pre_tokenizer: str
    """tokenizer.ggml.pre: the name of the rule that cuts text before merging, for example "smollm"."""


@dataclass(frozen=True)
class ModelFile:
    """A model as read from disk; tensors are float32 on the CPU."""

    name: str
    sha256: str
    """Of the whole file."""
    config: LlamaConfig
    weights: Mapping[str, torch.Tensor]
    vocabulary: Vocabulary


def load(path: Path) -> ModelFile:
    """Read a GGUF file of architecture "llama" and decode every tensor to float32.

    Raises UserError for a missing file, another format, architecture or tokenizer, and for missing tensors;
    Unavailable without gguf.
    """
    reader = _open(path)
    fields = {name: field.contents for name, field in reader.fields.items()}

    def field(name: str) -> Any:  # noqa: ANN401 -- a GGUF value is an int, a float, a str, a bool or a list of them
        if name not in fields:
            raise UserError(f"{path.name} has no field '{name}'; it is no complete Llama model")
        return fields[name]()

    architecture = field("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path.name} holds a model of architecture '{architecture}'; only llama can be run")
    kind = field("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UserError(f"{path.name} has a tokenizer of kind '{kind}'; only byte-level BPE (gpt2) can be run")
    heads = field("llama.attention.head_count")
    hidden = field("llama.embedding_length")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = LlamaConfig(
        layers=field("llama.block_count"),
        hidden=hidden,
        ffn=field("llama.feed_forward_length"),
        heads=heads,
        kv_heads=field("llama.attention.head_count_kv"),
        head_size=hidden // heads,
        vocabulary=len(field("tokenizer.ggml.tokens")),
        rope_base=field("llama.rope.freq_base"),
        norm_epsilon=field("llama.attention.layer_norm_rms_epsilon"),
        context=field("llama.context_length"),
        tied="output.weight" not in tensors,
    )
    if field("llama.rope.dimension_count") != config.head_size or "rope_freqs.weight" in tensors:
        raise UserError(f"{path.name} rotates part of a head or scales its frequencies; only plain RoPE can be run")
    return ModelFile(
        name=path.stem,
        sha256=file_sha256(path),
        config=config,
        weights={name: _decode(path, tensors, name, config) for name in weight_names(config)},
        vocabulary=Vocabulary(
            tokens=tuple(field("tokenizer.ggml.tokens")),
            merges=tuple(field("tokenizer.ggml.merges")),
            pre_tokenizer=field("tokenizer.ggml.pre"),
        ),
    )


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def gguf_name(name: str) -> str:
    """GGUF's name of one of llama.py's weights: "layers.3.q" is "blk.3.attn_q.weight"."""
    *layer, last = name.split(".")
    return ".".join((*(("blk", layer[1]) if layer else ()), _NAMES[last], "weight"))


def _open(path: Path) -> Any:  # noqa: ANN401 -- gguf ships no types
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise Unavailable("reading a model needs the package gguf: pip install 'mxharness[model]'") from error
    if not path.is_file():
        raise UserError(f"no model file {path}; `mxharness fetch smollm2` gets one")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is no GGUF file: its first four bytes are not GGUF")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:  # numpy's words about a shape say nothing to the reader
        raise UserError(
            f"{path} is a damaged or incomplete GGUF file of {path.stat().st_size:,} bytes; get it again"
        ) from error


def _decode(path: Path, tensors: Mapping[str, Any], name: str, config: LlamaConfig) -> torch.Tensor:
    import gguf
    import numpy as np
    import torch

    source = gguf_name(name)
    if source not in tensors:
        raise UserError(f"{path.name} has no tensor '{source}'; it is no complete Llama model")
    tensor = tensors[source]
    values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    heads = {"q": config.heads, "k": config.kv_heads}.get(name.rsplit(".", 1)[-1])
    if heads is None:
        return values
    return values.view(heads, config.head_size // 2, 2, -1).transpose(1, 2).reshape(values.shape)
