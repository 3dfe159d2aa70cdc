"""A real model's perplexity: decoder, file, tokens, windows, texts and verdicts, on models checked by hand."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mxharness import fetch, perplexity, text
from mxharness.device import Device
from mxharness.errors import Unavailable, UserError
from mxharness.model import backend as backends
from mxharness.model import gguf, llama
from mxharness.model.backend import Activations, Backend
from mxharness.model.gguf import ModelFile, Vocabulary
from mxharness.model.tokenizer import encode
from mxharness.protocols import PROTOCOLS, Protocol, Span, select, spans

CONFIG = llama.LlamaConfig(
    layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, head_size=16, vocabulary=259,
    rope_base=1e4, norm_epsilon=1e-5, context=128, tied=True,
)  # fmt: skip
TOY = Protocol("toy", 32, 32, 17, 17, False, "windows of 32, second half")
SAMPLE = text.Text("sample", "sample (not WikiText-2)", "In 2004, 1 of 12 bytes <|end|> were naïve.\n" * 6, "0" * 64)

# SmolLM2 in float32, tokens 257 to 511 of the embedded text: transformers 5.23, eager attention, torch 2.13, on a CPU.
SMOLLM2_REFERENCE = 48.24443398
SMOLLM2_IDS = "54e9eb47f0e9cdc8671cfe5fb052391ce791ef5fa1eab27cc7ddf06cb39c7b2b"


def byte_vocabulary() -> Vocabulary:
    """GPT-2's 256 byte symbols, two merges and a special token; the symbols are its documented byte-to-unicode map."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    symbols = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]
    return Vocabulary((*symbols, "12", "th", "<|end|>"), ("1 2", "t h"), "smollm")


def random_weights(config: llama.LlamaConfig = CONFIG, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights at a scale that gives logits of a few units, so that attention and likelihoods are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "q": (64, 64),
        "k": (32, 64),
        "v": (32, 64),
        "o": (64, 64),
        "gate": (96, 64),
        "up": (96, 64),
        "down": (64, 96),
    }
    weights = {}
    for name in llama.weight_names(config):
        what = name.rsplit(".", 1)[-1]
        shape = (64,) if what.endswith("norm") else sizes.get(what, (config.vocabulary, 64))
        noise = torch.randn(shape, generator=generator)
        weights[name] = 1 + 0.1 * noise if what.endswith("norm") else 0.25 * noise
    return weights


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModelFile:
    monkeypatch.setitem(PROTOCOLS, "toy", TOY)
    return ModelFile("toy", "1" * 64, CONFIG, random_weights(), byte_vocabulary())


def measure(
    file: ModelFile,
    backend: Backend[torch.Tensor] | None = None,
    *,
    windows: int | None = 64,
    tokens: int | None = None,
    batch: int | None = None,
    progress: bool = False,
) -> perplexity.Result:
    return perplexity.measure(
        file,
        SAMPLE,
        backend or backends.float32(),
        "toy",
        windows=windows,
        tokens=tokens,
        batch=batch,
        progress=progress,
    )


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
    assert list(file.weights) == list(weights)
    assert [name for name in weights if not torch.equal(file.weights[name], weights[name])] == []


def test_gguf_file_that_cannot_be_run_is_one_sentence(tmp_path: Path) -> None:
    weights = random_weights()
    with pytest.raises(UserError, match=r"no model file .*; `mxharness fetch smollm2` gets one"):
        gguf.load(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("this is no model file, only a text of some length")
    with pytest.raises(UserError, match="is no readable GGUF file"):
        gguf.load(tmp_path / "text.gguf")
    with pytest.raises(UserError, match="of kind 'llama'; only byte-level BPE"):
        gguf.load(write_gguf(tmp_path / "spm.gguf", weights, tokenizer="llama"))
    with pytest.raises(UserError, match="architecture 'bert'; only llama can be run"):
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


# Windows


def test_windows_of_512_and_their_scored_tokens() -> None:
    half, every = (spans(PROTOCOLS[name], 303_415) for name in ("windows-512-half", "windows-512-all"))
    assert half[0] == Span(0, 512, 257)
    assert half[-1] == Span(591 * 512, 592 * 512, 591 * 512 + 257)
    assert sum(span.stop - span.first for span in half) == 592 * 255
    assert sum(span.stop - span.first for span in every) == 302_512
    assert [span.start // 512 for span in select(half, 64)] == list(range(0, 568, 9))
    assert select(half, None) == select(half, 592) == select(half, 1000) == half
    with pytest.raises(UserError, match="cannot measure 0 windows"):
        select(half, 0)


@pytest.mark.parametrize("tokens", [2, 1023, 1024, 1025, 1536, 1537, 65_536])
def test_the_sliding_window_scores_every_token_once(tokens: int) -> None:
    windows = spans(PROTOCOLS["sliding-1024-512"], tokens)
    assert [t for span in windows for t in range(span.first, span.stop)] == list(range(1, tokens))
    assert {span.stop - span.start for span in windows[:-1]} <= {1024}
    assert [span.start for span in windows] == [512 * i for i in range(len(windows))]


@pytest.mark.parametrize(
    ("name", "least"), [("windows-512-half", 512), ("windows-512-all", 512), ("sliding-1024-512", 2)]
)
def test_a_text_too_short_has_no_window(name: str, least: int) -> None:
    assert spans(PROTOCOLS[name], least - 1) == ()
    assert len(spans(PROTOCOLS[name], least)) == 1


# The measurement


@pytest.mark.parametrize("batch", [1, 3])
def test_scored_likelihoods_are_the_protocols(toy: ModelFile, batch: int) -> None:
    ids = encode(toy.vocabulary, SAMPLE.text)
    assert len(ids) == 264
    result = measure(toy, windows=3, batch=batch)
    assert result.spans == (Span(0, 32, 17), Span(64, 96, 81), Span(128, 160, 145))
    model = llama.build(CONFIG, toy.weights, backends.float32())
    wanted = []
    for start in (0, 64, 128):
        window = torch.from_numpy(ids[start : start + 32].astype(np.int64))
        logits = llama.logits(model, llama.hidden_states(model, window[None])[0]).double().numpy()
        odds = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        wanted += [-odds[t - 1, window[t]] for t in range(17, 32)]
    assert result.scored == len(wanted) == 45
    assert np.abs(result.nll - np.array(wanted)).max() <= 1e-5
    assert math.isclose(result.perplexity, math.exp(np.mean(wanted)), rel_tol=1e-6)
    assert result.windows_available == 8


def test_a_result_states_what_fixes_it(toy: ModelFile) -> None:
    result = measure(toy, tokens=100)
    ids = encode(toy.vocabulary, SAMPLE.text)[:100]
    assert (result.tokens, result.windows, result.windows_available, result.scored) == (100, 3, 3, 45)
    document = json.loads(json.dumps(result.to_json()))
    assert document["ids_sha256"] == hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
    assert document["text_sha256"] == SAMPLE.sha256
    assert document["model_sha256"] == toy.sha256
    assert document["text"] == "sample (not WikiText-2)"
    assert (document["weights"], document["activations"], document["arithmetic"]) == (
        "float32",
        "fp32",
        "torch float32",
    )
    assert document["nll_sha256"] == hashlib.sha256(result.nll.tobytes()).hexdigest()
    assert document["tokens_per_second"] > 0


def test_a_bar_with_tokens_per_second_goes_to_stderr(toy: ModelFile, capsys: pytest.CaptureFixture[str]) -> None:
    measure(toy, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "256/256" in shown.err
    assert "tok/s" in shown.err
    measure(toy)
    assert capsys.readouterr().err == ""


def test_nothing_to_score_is_an_error(toy: ModelFile) -> None:
    with pytest.raises(UserError, match=r"sample .* gives 31 tokens, toy needs 32"):
        measure(toy, tokens=31)
    with pytest.raises(UserError, match="no protocol 'windows'; there are windows-512-half, windows-512-all"):
        perplexity.measure(toy, SAMPLE, backends.float32(), "windows")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_fail(toy: ModelFile, value: float) -> None:
    plain = backends.float32()
    heads = []

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = plain.linear(x, weight)
        if len(weight) == CONFIG.vocabulary:
            heads.append(y)
            if len(heads) == 2:
                y[4:] = value
        return y

    with pytest.raises(perplexity.NotFiniteError) as caught:
        measure(toy, replace(plain, linear=linear), windows=3)
    assert "11 of 15 scored tokens of the window at token 64 have a NaN or infinite" in str(caught.value)
    assert "the first is token 85 " in str(caught.value)


def test_a_broken_model_has_an_infinite_perplexity_and_no_traceback(toy: ModelFile) -> None:
    plain = backends.float32()
    broken = replace(plain, linear=lambda x, weight: plain.linear(x, weight) * (1e6 if len(weight) == 259 else 1))
    result = measure(toy, broken)
    assert result.perplexity == math.inf
    assert perplexity.compare(measure(toy), result).relative == math.inf


def test_only_the_same_tokens_are_compared(toy: ModelFile) -> None:
    result = measure(toy)
    same = perplexity.compare(result, measure(toy))
    assert same == perplexity.Comparison(relative=0.0, largest_token=0.0, bitwise=True)
    for what in ("model_sha256", "text_sha256", "ids_sha256", "protocol"):
        with pytest.raises(UserError, match=f"cannot be compared, their {what} differs: .* and other"):
            perplexity.compare(result, replace(result, **{what: "other"}))
    with pytest.raises(UserError, match="their spans differs: 8 and 4 windows"):
        perplexity.compare(result, measure(toy, windows=4))


def test_the_relative_difference_is_of_perplexities(toy: ModelFile) -> None:
    result = measure(toy)
    worse = replace(result, nll=result.nll + np.float32(0.25), mean_nll=result.mean_nll + 0.25)
    compared = perplexity.compare(result, worse)
    assert math.isclose(compared.relative, math.exp(0.25) - 1, rel_tol=1e-12)
    assert math.isclose(compared.largest_token, 0.25, rel_tol=1e-5)
    assert not compared.bitwise


# MXFP4


def test_decoded_weights_are_the_formats(toy: ModelFile) -> None:
    """Every matrix, the tied embedding included, has at most 15 values and a power of two per block of 32."""
    model = llama.build(CONFIG, toy.weights, backends.decoded())
    levels = {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0}
    assert set(model.matrices) == {name for name in toy.weights if not name.endswith("norm")}
    for name, matrix in model.matrices.items():
        assert matrix.shape == toy.weights[name].shape
        blocks, original = (m.reshape(-1, 32).double() for m in (matrix, toy.weights[name]))
        scale = 2.0 ** (torch.floor(torch.log2(original.abs().amax(1, keepdim=True))) - 2)
        assert set((blocks / scale).abs().unique().tolist()) <= levels
        assert ((blocks - original).abs() / scale).max() <= 2  # saturation: 8 - 6
    result = measure(toy, backends.decoded())
    assert result.weights == "mxfp4 (floor, even)"
    assert perplexity.compare(measure(toy), result).largest_token > 1e-3


@pytest.mark.parametrize("activations", ["fp16", "bf16"])
def test_kernels_agree_with_float32_on_the_decoded_weights(
    toy: ModelFile, device: Device, activations: Activations
) -> None:
    found = perplexity.triple(toy, SAMPLE, device, "toy", activations=activations)
    assert found.passed, found.message
    assert found.agreement.largest_token > 0  # it did go through rounded activations
    assert found.limit.relative == {"fp16": 1e-3, "bf16": 5e-3}[activations]
    assert found.kernels.activations == activations
    assert (found.kernels.device_class, found.kernels.arithmetic) == (device.device_class, device.arithmetic)
    document = json.loads(json.dumps(found.to_json()))
    assert document["passed"] is True
    assert document["kernels"]["weights"] == document["decoded"]["weights"] == "mxfp4 (floor, even)"
    assert document["original"]["weights"] == "float32"


def test_a_triple_past_its_limit_fails_and_says_how_far(toy: ModelFile, device: Device) -> None:
    honest = perplexity.triple(toy, SAMPLE, device, "toy")
    for shift, passed in ((2e-3, False), (-2e-3, False), (5e-4, True), (-5e-4, True)):
        wrong = replace(honest, agreement=replace(honest.agreement, relative=shift))
        assert wrong.passed is passed
        assert f"{shift:+.2e} relative, {'within' if passed else 'past'} 0.001" in wrong.message


def test_unknown_activations_are_refused() -> None:
    with pytest.raises(UserError, match="no activations 'fp8'; there are fp16, bf16"):
        backends.kernels(SimpleNamespace(), "fp8")  # type: ignore[arg-type]  # the error is what is tested


# Texts


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no WikiText-2, no hub."""
    monkeypatch.setenv("MXHARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MXHARNESS_WIKITEXT", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return tmp_path


ROWS = ["", " = Robert Boulter = \n", "", " Robert is an actor , naïve in 2004 . \n", ""]
LINES = " \n = Robert Boulter = \n \n Robert is an actor , naïve in 2004 . \n \n"


def test_rows_become_the_original_lines() -> None:
    assert text.join_rows(ROWS) == LINES


def test_a_parquet_and_a_text_file_give_one_text(folder: Path) -> None:
    pytest.importorskip("datasets", reason="not measured: reading texts through datasets")
    import pandas as pd

    pd.DataFrame({"text": ROWS}).to_parquet(folder / "rows.parquet")
    (folder / "wiki.test.raw").write_bytes(LINES.encode())
    rows, lines = (text.load_text(str(folder / name)) for name in ("rows.parquet", "wiki.test.raw"))
    digest = hashlib.sha256(LINES.encode()).hexdigest()
    assert rows.text == lines.text == LINES
    assert rows.sha256 == lines.sha256 == digest
    assert lines.label == f"wiki.test.raw, sha256 {digest[:12]} (not WikiText-2)"  # the name makes it nothing
    pd.DataFrame({"words": ROWS}).to_parquet(folder / "other.parquet")
    with pytest.raises(UserError, match="cannot be read as a parquet file with a column 'text'"):
        text.load_text(str(folder / "other.parquet"))


def test_the_hash_makes_a_text_wikitext(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="not measured: reading texts through datasets")
    path = folder / "anything.txt"
    path.write_bytes(LINES.encode())
    monkeypatch.setenv("MXHARNESS_WIKITEXT", str(path))
    for source in ("auto", "wikitext-2"):
        with pytest.raises(UserError, match=r"MXHARNESS_WIKITEXT names .*anything.txt, whose text has sha256"):
            text.load_text(source)
    monkeypatch.setattr(text, "WIKITEXT2_SHA256", hashlib.sha256(LINES.encode()).hexdigest())
    for source in ("auto", "wikitext-2", str(path)):
        assert text.load_text(source).label == "WikiText-2 raw test"
    monkeypatch.setenv("MXHARNESS_WIKITEXT", str(folder / "gone"))
    with pytest.raises(UserError, match="and there is no such file"):
        text.load_text("auto")


def test_the_hubs_rows_are_checked_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="not measured: reading texts through datasets")
    asked = []

    def load_dataset(*names: str, split: str) -> dict[str, list[str]]:
        asked.append((*names, split))
        return {"text": ROWS}

    with monkeypatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(Unavailable, match="WikiText-2's raw test split has 173c87a5"):
            text.load_text("wikitext-2")
        assert not (folder / "cache" / "wiki.test.raw").exists()
        patch.setattr(text, "WIKITEXT2_SHA256", hashlib.sha256(LINES.encode()).hexdigest())
        assert text.load_text("wikitext-2").label == "WikiText-2 raw test"
        assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")] * 2
    monkeypatch.setattr(text, "WIKITEXT2_SHA256", hashlib.sha256(LINES.encode()).hexdigest())
    assert text.load_text("wikitext-2") == text.Text(
        "wikitext-2", "WikiText-2 raw test", LINES, hashlib.sha256(LINES.encode()).hexdigest()
    )


def test_without_a_hub_the_embedded_text_stands_in_and_says_so(folder: Path) -> None:
    with pytest.raises(
        Unavailable, match=r"http://127.0.0.1:9 is out of reach .* and MXHARNESS_WIKITEXT names no file"
    ):
        text.load_text("wikitext-2")
    found = text.load_text("auto")
    assert found.name == "default"
    assert "not WikiText-2" in found.label
    assert "out of reach" in found.note
    assert replace(found, note="") == text.load_text("default")
    assert len(found.text.encode()) == 65_470
    with pytest.raises(UserError, match="no text 'wikitext'; there are auto, wikitext-2, default"):
        text.load_text("wikitext")


# The real model


@pytest.fixture(scope="module")
def smollm2() -> ModelFile:
    path = fetch.cached("smollm2")
    if path is None:
        pytest.skip("not measured: SmolLM2's perplexity; `mxharness fetch smollm2` puts the model into the cache")
    return gguf.load(path)


def test_smollm2_has_transformers_perplexity(smollm2: ModelFile) -> None:
    result = perplexity.measure(smollm2, text.load_text("default"), backends.float32(), windows=1, tokens=512)
    assert result.ids_sha256 == SMOLLM2_IDS
    assert result.spans == (Span(0, 512, 257),)
    assert abs(result.perplexity / SMOLLM2_REFERENCE - 1) <= 1e-4


def test_wikitext_has_303415_tokens(smollm2: ModelFile) -> None:
    if not os.environ.get("MXHARNESS_WIKITEXT"):
        pytest.skip("not measured: the tokens of WikiText-2; MXHARNESS_WIKITEXT names no file")
    ids = encode(smollm2.vocabulary, text.load_text("wikitext-2").text)
    assert len(ids) == 303_415
    assert hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest() == (
        "18e663b61dd00f49796c8a6ae498b7dbe009cac4a2eaf3c67fa7d81baf47d945"
    )
