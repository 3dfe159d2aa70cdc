"""A model's decoder, file and tokens, against transformers and on cases checked by hand."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mxharness.errors import UserError
from mxharness.model import backend as backends
from mxharness.model import gguf, llama
from mxharness.model.tokenizer import encode
from mxharness.model.toy import CONFIG, byte_vocabulary, random_weights


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest error by the largest value; NaN counts as infinite."""
    worst = float((got.double() - wanted.double()).abs().max() / wanted.abs().max())
    return math.inf if math.isnan(worst) else worst


# The decoder


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_is_transformers_decoder(tied: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="not measured: the decoder against transformers' own")
    config = replace(CONFIG, tied=tied)
    weights = random_weights(config)
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.hidden,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    ).eval()
    names = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {what: f"self_attn.{what}_proj" for what in "qkvo"} | {
        what: f"mlp.{what}_proj" for what in ("gate", "up", "down")
    }
    state = {"model.embed_tokens.weight": weights["embedding"], "model.norm.weight": weights["final_norm"]}
    state["lm_head.weight"] = weights["embedding" if tied else "head"]
    for name, weight in weights.items():
        if name.startswith("layers."):
            prefix, what = name.rsplit(".", 1)
            state[f"model.{prefix}.{names[what]}.weight"] = weight
    peer.load_state_dict(state)

    ids = torch.randint(0, config.vocabulary, (3, 64), generator=torch.Generator().manual_seed(1))
    model = llama.build(config, weights, backends.float32())
    with torch.inference_mode():
        got = llama.logits(model, llama.hidden_states(model, ids).reshape(-1, config.hidden)).view(3, 64, -1)
        single = peer(ids).logits
        double = peer.double()(ids).logits
    # Its float64 run is the yardstick: this decoder may be a few times as far from it as its float32 run is.
    assert double.abs().max() > 5
    assert difference(got, double) <= max(4 * difference(single, double), 1e-6)
    nll = torch.nn.functional.cross_entropy(got[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    wanted = torch.nn.functional.cross_entropy(double[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(float(nll) - float(wanted)) <= 1e-5


def test_decoder_refuses_what_does_not_fit() -> None:
    model = llama.build(CONFIG, random_weights(), backends.float32())
    with pytest.raises(UserError, match="a window of 129 tokens does not fit the model's context of 128"):
        llama.hidden_states(model, torch.zeros(1, 129, dtype=torch.int64))
    with pytest.raises(UserError, match="token ids from 0 to 259; the model has 0 to 258"):
        llama.hidden_states(model, torch.tensor([[0, 259]]))


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
    file = gguf.load(path)
    assert file.config.layers == CONFIG.layers
    assert replace(file.config, norm_epsilon=CONFIG.norm_epsilon) == CONFIG  # the epsilon is stored in float32
    assert abs(file.config.norm_epsilon - CONFIG.norm_epsilon) < 1e-12
    assert file.vocabulary == byte_vocabulary()
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(file.weights) == sorted(weights)
    assert [name for name in weights if not torch.equal(file.weights[name], weights[name])] == []


def test_gguf_file_that_cannot_be_run_is_one_sentence(tmp_path: Path) -> None:
    weights = random_weights()
    with pytest.raises(UserError, match=r"no model file .*; `mxharness fetch smollm2` gets one"):
        gguf.load(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("this is no model file, only a text of some length")
    with pytest.raises(UserError, match="is no GGUF file: its first four bytes are not GGUF"):
        gguf.load(tmp_path / "text.gguf")
    whole = write_gguf(tmp_path / "whole.gguf", weights).read_bytes()
    for size in (20, 3000, len(whole) // 2, len(whole) - 1000):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"is a damaged or incomplete GGUF file of {size:,} bytes"):
            gguf.load(tmp_path / "cut.gguf")
    with pytest.raises(UserError, match="of kind 'llama'; only byte-level BPE"):
        gguf.load(write_gguf(tmp_path / "spm.gguf", weights, tokenizer="llama"))
    with pytest.raises(UserError, match="architecture 'bert'; only llama and gpt-oss can be run"):
        gguf.load(write_gguf(tmp_path / "bert.gguf", weights, architecture="bert"))
    weights.pop("layers.1.up")
    with pytest.raises(UserError, match=r"no tensor 'blk.1.ffn_up.weight'"):
        gguf.load(write_gguf(tmp_path / "short.gguf", weights))


# Tokens


def test_digits_stand_alone_and_special_names_are_text() -> None:
    vocabulary = byte_vocabulary()

    def words(value: str, pre: str = "smollm") -> list[str]:
        return [vocabulary.tokens[i] for i in encode(replace(vocabulary, pre_tokenizer=pre), value)]

    assert words("the 12") == ["th", "e", "Ġ", "1", "2"]
    assert words("the 12", "gpt-2") == ["th", "e", "Ġ", "12"]
    assert words("<|end|>") == list("<|end|>")
    assert words("é") == ["Ã", "©"]
    with pytest.raises(UserError, match="no pre-tokenizer 'qwen2'; there are gpt-2, smollm"):
        words("a", "qwen2")
