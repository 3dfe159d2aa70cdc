"""A model's file and tokens on cases checked by hand."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mxharness.errors import UserError
from mxharness.model import gguf
from mxharness.model.checkpoint import values
from mxharness.model.tokenizer import encode
from mxharness.model.toy import LLAMA as CONFIG
from mxharness.model.toy import byte_vocabulary, checkpoint


def random_weights() -> dict[str, torch.Tensor]:
    return {name: values(stored) for name, stored in checkpoint().tensors.items()}


# The file


def write_gguf(
    path: Path, weights: dict[str, torch.Tensor], architecture: str = "llama", tokenizer: str = "gpt2"
) -> Path:
    """A GGUF file as llama.cpp's converter writes it: rows of q and k permuted for interleaved rotation."""
    writer_module = pytest.importorskip("gguf", reason="not measured: reading a GGUF file")
    writer = writer_module.GGUFWriter(path, architecture)
    writer.add_block_count(CONFIG.layers)
    writer.add_embedding_length(CONFIG.hidden)
    writer.add_feed_forward_length(CONFIG.ffn)
    writer.add_head_count(CONFIG.heads)
    writer.add_head_count_kv(CONFIG.kv_heads)
    writer.add_context_length(CONFIG.context)
    writer.add_rope_dimension_count(CONFIG.head_size)
    writer.add_key_length(CONFIG.head_size)
    writer.add_value_length(CONFIG.head_size)
    writer.add_rope_freq_base(CONFIG.rope_base)
    writer.add_layer_norm_rms_eps(CONFIG.norm_epsilon)
    vocabulary = byte_vocabulary()
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_merges(list(vocabulary.merges))
    for name, weight in weights.items():
        heads = {"q": CONFIG.heads, "k": CONFIG.kv_heads}.get(name.rsplit(".", 1)[-1])
        values = weight.numpy()
        if heads:
            values = values.reshape(heads, 2, CONFIG.head_size // 2, -1).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(gguf.gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_file_is_read_back(tmp_path: Path) -> None:
    weights = random_weights()
    path = write_gguf(tmp_path / "toy.gguf", weights)
    file = gguf.read(path)
    assert file.config.layers == CONFIG.layers
    assert replace(file.config, norm_epsilon=CONFIG.norm_epsilon) == CONFIG  # the epsilon is stored in float32
    assert abs(file.config.norm_epsilon - CONFIG.norm_epsilon) < 1e-12
    assert file.vocabulary == byte_vocabulary()
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(file.tensors) == sorted(weights)
    assert [name for name in weights if not torch.equal(values(file.tensors[name]), weights[name])] == []


def test_gguf_file_that_cannot_be_run_is_one_sentence(tmp_path: Path) -> None:
    weights = random_weights()
    with pytest.raises(UserError, match=r"no model file .*; `mxharness fetch smollm2` gets one"):
        gguf.read(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("this is no model file, only a text of some length")
    with pytest.raises(UserError, match="is no GGUF file: its first four bytes are not GGUF"):
        gguf.read(tmp_path / "text.gguf")
    whole = write_gguf(tmp_path / "whole.gguf", weights).read_bytes()
    for size in (20, 3000, len(whole) // 2, len(whole) - 1000):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"is a damaged or incomplete GGUF file of {size:,} bytes"):
            gguf.read(tmp_path / "cut.gguf")
    with pytest.raises(UserError, match="of kind 'llama'; only byte-level BPE"):
        gguf.read(write_gguf(tmp_path / "spm.gguf", weights, tokenizer="llama"))
    with pytest.raises(UserError, match="architecture 'bert'; only llama and gpt-oss can be run"):
        gguf.read(write_gguf(tmp_path / "bert.gguf", weights, architecture="bert"))
    weights.pop("layers.1.up")
    with pytest.raises(UserError, match=r"no tensor 'blk.1.ffn_up.weight'"):
        gguf.read(write_gguf(tmp_path / "short.gguf", weights))


# Tokens


def test_digits_stand_alone_and_special_names_are_text() -> None:
    vocabulary = byte_vocabulary()

    def words(value: str, pre: str = "smollm") -> list[str]:
        return [vocabulary.tokens[i] for i in encode(replace(vocabulary, pre_tokenizer=pre), value)]

    assert words("the 12") == ["th", "e", "Ġ", "1", "2"]
    assert words("the 12", "gpt-2") == ["th", "e", "Ġ", "12"]
    assert words("<|end|>") == list("<|end|>")
    assert words("é") == ["Ã", "©"]
    with pytest.raises(UserError, match=r"no pre-tokenizer 'bloom'; there are .*gpt-2, .*smollm"):
        words("a", "bloom")
