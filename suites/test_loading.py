"""Model files become checkpoints without losing a bit: GGUF, safetensors, a transformers model in memory, tokenizers.

Files are written by gguf-py and transformers, so that what is read here was not made by the same hands.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mxharness import mxfp4
from mxharness.errors import UserError
from mxharness.model import gguf_file, huggingface, tokenizer, toy
from mxharness.model.checkpoint import Stored, Vocabulary, packed, values
from mxharness.model.config import ModelConfig
from mxharness.model.gguf import gguf_name, halves
from mxharness.model.load import load
from mxharness.model.transformers import from_transformers
from mxharness.mxfp4 import Quantized

TEXT = "Héllo wörld 😀 12345 «naïve» I'LL don't\n\n  x\t日本語 <|end|>"


@pytest.fixture
def gguf() -> ModuleType:
    found: ModuleType = pytest.importorskip("gguf", reason="gguf is not installed; not compared: GGUF files")
    return found


@pytest.fixture
def transformers() -> ModuleType:
    found: ModuleType = pytest.importorskip("transformers", reason="not compared: models that transformers saves")
    return found


def write(writer: Any) -> None:  # noqa: ANN401  gguf ships no types
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def same(one: torch.Tensor | Quantized, other: torch.Tensor | Quantized) -> bool:
    if isinstance(one, Quantized) and isinstance(other, Quantized):
        return torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)
    return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)


def test_every_mxfp4_byte_of_a_gguf_file_is_kept(tmp_path: Path, gguf: ModuleType) -> None:
    # Every scale but NaN in every row, every byte of codes at every place of a block.
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (256, 255, 17), dtype=np.uint8)
    blocks[:, :, 0] = np.arange(255)
    blocks[:, :, 1:] = (np.arange(256)[:, None, None] + 17 * np.arange(16)) % 256
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "none")
    writer.add_tensor("all", blocks.reshape(256, -1), raw_dtype=gguf.GGMLQuantizationType.MXFP4)
    write(writer)
    read = gguf_file.rows(gguf_file.read(tmp_path / "all.gguf").tensors["all"])
    assert isinstance(read, Quantized)
    assert mxfp4.to_layout(read, "gguf").data.numpy().tobytes() == blocks.tobytes()
    low, high = blocks[..., 1:] & 15, blocks[..., 1:] >> 4
    codes = np.concatenate((low, high), -1).reshape(256, -1)  # element j in low nibbles, j + 16 in high ones
    assert np.array_equal(mxfp4.unpack(read.codes).numpy(), codes)
    assert np.array_equal(read.scales.numpy(), blocks[..., 0])
    with np.errstate(over="ignore"):  # 6 * 2^127
        decoded = gguf.dequantize(blocks.reshape(256, -1), gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(mxfp4.dequantize(*read).numpy(), decoded)


@pytest.mark.parametrize("form", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q6_K"])
def test_other_formats_are_decoded_as_gguf_py_does(tmp_path: Path, gguf: ModuleType, form: str) -> None:
    kind = gguf.GGMLQuantizationType[form]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(1)
    if form.endswith("K"):  # gguf-py decodes these and cannot make them: random bytes, with scales that are finite
        data = rng.integers(0, 60, (64, 512 // block * size), dtype=np.uint8)
    else:
        data = gguf.quantize(rng.standard_normal((64, 512), dtype=np.float32), kind)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "none")
    writer.add_tensor("before", np.ones(3, np.float32))
    writer.add_tensor("one", data, raw_dtype=kind)
    write(writer)
    entry = gguf_file.read(tmp_path / "one.gguf").tensors["one"]
    assert (entry.shape, entry.format) == ((64, 512), form)
    wanted = gguf.dequantize(data, kind)
    read, part = gguf_file.rows(entry), gguf_file.rows(entry, 5, 9)
    assert isinstance(read, torch.Tensor)
    assert isinstance(part, torch.Tensor)
    assert np.array_equal(read.numpy(), wanted)
    assert np.array_equal(part.numpy(), wanted[5:9])


def converted(gguf: ModuleType, path: Path, *, fused: bool, truncate: bool = False) -> None:
    """The toy gpt-oss as llama.cpp's converter writes it."""
    model = toy.checkpoint(toy.GPT_OSS)
    config = replace(model.config, yarn=replace(model.config.yarn, truncate=truncate))
    writer = gguf.GGUFWriter(path, "gpt-oss")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.ffn)
    writer.add_expert_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config.yarn.factor)
    writer.add_rope_scaling_orig_ctx_len(config.yarn.original_context)
    writer.add_sliding_window(8)
    writer.add_expert_count(config.experts)
    writer.add_expert_used_count(config.chosen)
    writer.add_eos_token_id(258)
    for name, stored in model.tensors.items():
        read = stored.read()
        target = gguf_name(name, "gpt-oss")
        kind = gguf.GGMLQuantizationType.MXFP4 if isinstance(read, Quantized) else gguf.GGMLQuantizationType.F32
        tensor = mxfp4.to_layout(read, "gguf").data.numpy() if isinstance(read, Quantized) else read.numpy()
        parts = {target: tensor}
        if "gate_up" in name:
            gate, up = tensor[:, 0::2], tensor[:, 1::2]
            both = {target: np.concatenate((gate, up), 1)}
            parts = both if fused else dict(zip(halves(target), (gate, up), strict=True))
        for key, value in parts.items():
            writer.add_tensor(key, np.ascontiguousarray(value), raw_dtype=kind)
    write(writer)


@pytest.mark.parametrize("fused", [False, True])
def test_gpt_oss_of_a_gguf_file(tmp_path: Path, gguf: ModuleType, fused: bool) -> None:
    converted(gguf, tmp_path / "toy.gguf", fused=fused)
    read, made = load(tmp_path / "toy.gguf"), toy.checkpoint(toy.GPT_OSS)
    assert replace(read.config, norm_epsilon=1e-5) == made.config
    assert read.ends == (258,)
    assert read.vocabulary is None
    assert list(read.tensors) == list(made.tensors)
    assert [name for name in made.tensors if not same(read.tensors[name].read(), made.tensors[name].read())] == []
    assert {stored.format for name, stored in read.tensors.items() if name.endswith(("gate_up", "down"))} == {"MXFP4"}


def hugging(transformers: ModuleType, config: ModelConfig) -> Any:  # noqa: ANN401  as transformers types it
    """A model of transformers' with a toy's weights."""
    common = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "eos_token_id": 258,
    }
    if config.yarn is None:
        rope = {"rope_type": "default", "rope_theta": config.rope_base}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, rope_parameters=rope))
    else:
        rope = {
            "rope_type": "yarn",
            "rope_theta": config.rope_base,
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_context,
            "truncate": config.yarn.truncate,
        }
        moe = {"sliding_window": 8, "num_local_experts": config.experts, "num_experts_per_tok": config.chosen}
        model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**common, **moe, rope_parameters=rope))
    state = {}
    for name, stored in toy.checkpoint(config).tensors.items():
        value = values(stored)
        experts = config.experts and value.ndim == 3
        state[huggingface.name_of(name, config.architecture)] = value.mT.contiguous() if experts else value
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (set(missing) - {"lm_head.weight"}, unexpected) == (set(), [])
    return model


@pytest.mark.long("transformers")
@pytest.mark.parametrize("architecture", list(toy.CONFIGS))
def test_what_transformers_holds_and_saves(tmp_path: Path, transformers: ModuleType, architecture: str) -> None:
    config = toy.CONFIGS[architecture]
    model = hugging(transformers, config)
    made = toy.checkpoint(config)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    one = tmp_path / "one"
    for read in (from_transformers(model), load(one), load(one / "model.safetensors"), load(tmp_path / "shards")):
        assert read.config == config
        assert read.ends == (258,)
        assert list(read.tensors) == list(made.tensors)
        wrong = [name for name in made.tensors if not same(values(read.tensors[name]), values(made.tensors[name]))]
        assert wrong == []
    assert load(one).sha256 != load(tmp_path / "shards").sha256
    assert load(one).sha256 == load(one).sha256
    before = from_transformers(model).sha256
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    assert from_transformers(model).sha256 != before


def test_a_model_in_memory_that_is_none(transformers: ModuleType) -> None:
    with pytest.raises(UserError, match="takes a transformers model, not Linear"):
        from_transformers(torch.nn.Linear(2, 2))  # type: ignore[arg-type]  # what is refused
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, hidden_size=64))
    with pytest.raises(UserError, match=r"no data for 'model.embed_tokens.weight'; load its weights first"):
        from_transformers(empty)
    bert = transformers.BertModel(transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(UserError, match="BertModel is a model of type 'bert'; only llama and gpt_oss can be run"):
        from_transformers(bert)


def test_what_is_mxfp4_is_never_quantised_again() -> None:
    weight = torch.randn(4, 64)
    stored = mxfp4.quantize(weight, "ceil", "away")
    assert same(packed(Stored((4, 64), "MXFP4", lambda: stored), "even", "zero"), stored)
    assert same(packed(Stored((4, 64), "F32", lambda: weight), "even", "zero"), mxfp4.quantize(weight, "even", "zero"))
    assert same(values(Stored((4, 64), "MXFP4", lambda: stored)), mxfp4.dequantize(*stored))


def test_a_head_of_its_own_is_not_the_embedding(tmp_path: Path, transformers: ModuleType) -> None:
    model = hugging(transformers, replace(toy.LLAMA, tied=False))
    model.save_pretrained(tmp_path / "untied")
    config = tmp_path / "untied" / "config.json"
    document = json.loads(config.read_text())
    del document["tie_word_embeddings"]  # False where config.json does not say
    config.write_text(json.dumps(document))
    read = load(tmp_path / "untied")
    assert not read.config.tied
    assert not torch.equal(values(read.tensors["head"]), values(read.tensors["embedding"]))


# Tokenizers


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "llama-bpe", "qwen2", "gpt-4o"])
def test_text_survives_ids(tmp_path: Path, rule: str) -> None:
    pytest.importorskip("tokenizers", reason="not tried: text to token ids and back")
    words = replace(toy.byte_vocabulary(), pre_tokenizer=rule)
    ids = tokenizer.encode(words, TEXT)
    assert 258 not in ids  # <|end|> in a text is text
    assert tokenizer.decode(words, ids.tolist()) == TEXT
    pieces = list(tokenizer.stream(words, ids.tolist()))
    assert len(pieces) == len(ids)
    assert "".join(pieces) == TEXT
    assert "�" not in "".join(pieces)
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(words), encoding="utf-8")
    assert tokenizer.encode(path, TEXT).tolist() == ids.tolist()
    assert tokenizer.from_json(path) == (words, ())


def test_special_tokens_of_a_tokenizer_json(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers", reason="not tried: a tokenizer.json with special tokens")
    words = toy.byte_vocabulary()
    made = library.Tokenizer.from_str(tokenizer.to_json(words))
    made.add_special_tokens(["<|end|>"])
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    ids = tokenizer.encode(path, "a<|end|>").tolist()
    assert 258 not in ids  # its name in a text is text
    assert ids == tokenizer.encode(words, "a<|end|>").tolist()
    assert tokenizer.decode(path, [64, 258]) == "a<|end|>"
    assert tokenizer.from_json(path) == (words, (258,))


def test_cutting_rules_differ() -> None:
    pytest.importorskip("tokenizers", reason="not tried: text to token ids")
    words = toy.byte_vocabulary()
    ids = {rule: tokenizer.encode(replace(words, pre_tokenizer=rule), "12 th") for rule in ("gpt-2", "smollm")}
    assert ids["gpt-2"].tolist() == [256, 220, 257]  # "12" merged; smollm cuts digits apart
    assert ids["smollm"].tolist() == [16, 17, 220, 257]
    whole = replace(words, tokens=(*words.tokens[:-1], "dog"), pre_tokenizer="llama-bpe")  # no merges lead to "dog"
    assert tokenizer.encode(whole, "dog").tolist() == [258]
    assert tokenizer.encode(replace(whole, pre_tokenizer="qwen2"), "dog").tolist() == [67, 78, 70]


def test_a_character_cut_short() -> None:
    pytest.importorskip("tokenizers", reason="not tried: token ids to text")
    words = toy.byte_vocabulary()
    ids = tokenizer.encode(words, "a😀")[:-1].tolist()
    assert list(tokenizer.stream(words, ids)) == ["a", "", "", "", "\ufffd"]
    assert tokenizer.decode(words, ids) == "a\ufffd"
    assert tokenizer.decode(words, [64, 258]) == "a<|end|>"
    with pytest.raises(UserError, match="token ids from 64 to 259; the tokenizer has 0 to 258"):
        tokenizer.decode(words, [64, 259])


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="not tried: damaged tokenizers")
    with pytest.raises(UserError, match="no tokenizer, so it takes token ids"):
        tokenizer.encode(None, "a")
    with pytest.raises(UserError, match="no pre-tokenizer 'klingon'; there are gpt-2, gpt-4o"):
        tokenizer.encode(Vocabulary(("a",), (), "klingon"), "a")
    with pytest.raises(UserError, match="do not belong together"):
        tokenizer.encode(Vocabulary(("a",), ("b c",), "gpt-2"), "a")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": "?"}))
    with pytest.raises(UserError, match="holds no tokenizer"):
        tokenizer.encode(path, "a")
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*tokenizer.json: No such file"):
        tokenizer.encode(path, "a")
