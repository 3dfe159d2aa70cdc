"""The embedded model: its files, its weights, what it makes of a text it has not seen."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from mxharness import perplexity
from mxharness.errors import UserError
from mxharness.model import config as models
from mxharness.model import embedded, load, reference
from mxharness.model.checkpoint import packed
from mxharness.model.tokenizer import decode, encode
from mxharness.text import load_text

TOKENS = 2048
"""The first of the held-out text: 4 windows of 512, their second halves scored."""
FLOAT32, MXFP4 = 21.302175908525253, 22.49515075428548
"""Perplexity per token there, torch 2.13 on a CPU."""


@pytest.fixture(scope="module")
def original():
    return embedded.embedded(original=True)


@pytest.fixture(scope="module")
def quantised():
    return embedded.embedded()


def test_what_is_stored_in_mxfp4_is_the_original_by_the_ocp_rule(original, quantised):
    assert quantised.config == original.config
    for weight in models.weights(original.config):
        exact, stored = original.tensors[weight.name], quantised.tensors[weight.name]
        assert (exact.format, stored.format) == ("BF16", "MXFP4" if weight.packed else "BF16"), weight.name
        if weight.packed:
            assert all(torch.equal(*pair) for pair in zip(packed(exact), packed(stored), strict=True)), weight.name
        else:
            assert torch.equal(exact.read(), stored.read()), weight.name


def test_it_has_every_part_of_gpt_oss(original):
    config = original.config
    assert config.architecture == "gpt-oss"
    assert {128, None} == set(config.windows)
    assert config.yarn
    assert config.yarn.factor * config.yarn.original_context == config.context
    assert not config.tied
    assert 1 < config.chosen < config.experts
    sinks = torch.cat([original.tensors[f"layers.{i}.sinks"].read() for i in range(config.layers)])
    assert len(sinks.unique()) > 1  # learnt, not as they began


def test_its_tokens_are_any_text(quantised):
    text = load_text("default").text
    ids = encode(quantised.vocabulary, text)
    assert decode(quantised.vocabulary, ids.tolist()) == text
    assert int(ids.max()) < quantised.config.vocabulary - 1  # the last is the end token, which no text holds
    assert quantised.ends == (quantised.config.vocabulary - 1,)
    anything = "\0\x7f\u00e9\U0001f600<|endoftext|>"
    assert decode(quantised.vocabulary, encode(quantised.vocabulary, anything).tolist()) == anything


def test_perplexity_of_a_text_it_has_not_seen(original, quantised):
    readings = (
        (reference.float32(original), perplexity.read(original, load_text("default"), "windows-512-half", TOKENS)),
        (reference.decoded(quantised), perplexity.read(quantised, load_text("default"), "windows-512-half", TOKENS)),
    )
    found = [perplexity.measure(reading, runner, windows=None).perplexity for runner, reading in readings]
    assert math.isclose(found[0], FLOAT32, rel_tol=1e-4)  # another order of sums may move a token to another expert
    assert math.isclose(found[1], MXFP4, rel_tol=1e-4)


@pytest.mark.long("transformers")
def test_transformers_computes_the_same(original):
    transformers = pytest.importorskip("transformers", reason="not compared: the embedded model with transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        embedded.folder("embedded-original"), dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.from_numpy(encode(original.vocabulary, load_text("default").text)[:300]).long()[None]
    runner = reference.float32(original)
    with torch.inference_mode():
        theirs, ours = peer(ids).logits[0], runner.logits(runner.hidden_states(ids)[0])
    assert float((theirs - ours).abs().max() / theirs.abs().max()) <= 1e-4


def test_models_are_loaded_by_name(original, quantised):
    for name, checkpoint in (("embedded", quantised), ("embedded-original", original)):
        assert load.load(name).sha256 == checkpoint.sha256
        assert load.load(name).name == name
        assert load.find(name) == embedded.folder(name)


def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    shutil.copytree(embedded.folder("embedded").parent, tmp_path / "embedded")
    monkeypatch.setattr(embedded, "_root", lambda: tmp_path / "embedded")
    weights = tmp_path / "embedded" / "mxfp4" / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    with pytest.raises(UserError, match=r"mxfp4/model.safetensors is not the file that was published"):
        load.load("embedded")
    assert embedded.embedded(original=True).name == "embedded-original"
    weights.unlink()
    with pytest.raises(UserError, match=r"mxfp4/model.safetensors is not the file that was published"):
        load.find("embedded")
