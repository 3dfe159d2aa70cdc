"""`mxharness generate`: text, what it took, where it ends, and what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from mxharness.cli import main
from mxharness.model import tokenizer, toy

from .generating import generate, loaded, not_a_number


def run(capsys, *arguments):
    """Exit code, standard output and standard error of `mxharness generate`."""
    with pytest.raises(SystemExit) as end:
        main(["generate", *arguments])
    streams = capsys.readouterr()
    return end.value.code, streams.out, streams.err


@pytest.fixture
def command(device, monkeypatch):
    """The command on the toy; its arguments after the prompt."""
    monkeypatch.setattr("mxharness.model.load.load", lambda name: toy.checkpoint())
    return ["--device", device.name, "--max-tokens", "6"]


def test_the_command_writes_text_and_what_it_took(device, command, capsys):
    code, out, err = run(capsys, "The 12th", *command)
    checkpoint = toy.checkpoint()
    ids = tokenizer.encode(checkpoint.vocabulary, "The 12th").tolist()
    tokens = generate(loaded(device), [ids], 6)[0]
    assert code == 0
    assert out == tokenizer.decode(checkpoint.vocabulary, tokens) + "\n"
    assert err.startswith(f"toy llama on {device.device_class}: {len(ids)} tokens read at ")
    assert ", 6 written at " in err
    told = json.loads(run(capsys, "The 12th", *command, "--json", "--kv", "mxfp4", "--temperature", "0.5")[1])
    drawn = generate(loaded(device), [ids], 6, "mxfp4", {"temperature": 0.5})[0]
    assert (told["tokens"], told["text"]) == (drawn, tokenizer.decode(checkpoint.vocabulary, drawn))
    assert told["kv_cache_bytes"] == 2 * 2 * 2 * 17 * (len(ids) + 6)


def test_the_command_ends_where_the_model_ends(device, command, capsys, monkeypatch):
    tokens = json.loads(run(capsys, "a", *command, "--json")[1])["tokens"]
    monkeypatch.setattr("mxharness.model.load.load", lambda name: replace(toy.checkpoint(), ends=(tokens[3],)))
    assert json.loads(run(capsys, "a", *command, "--json")[1])["tokens"] == tokens[: tokens.index(tokens[3])]


def test_the_command_says_what_is_wrong(device, command, capsys, monkeypatch):
    assert run(capsys, "a" * 123, *command)[::2] == (
        2, "mxharness: a prompt of 123 tokens and 6 new ones do not fit the model's context of 128\n",
    )  # fmt: skip
    assert "at least one token" in run(capsys, "", *command)[2]
    assert "top-k keeps 1 to 259" in run(capsys, "a", *command, "--temperature", "1", "--top-k", "300")[2]
    monkeypatch.setattr("mxharness.model.load.load", lambda name: not_a_number())
    code, out, _ = run(capsys, "a", *command)
    assert code == 1
    assert out.startswith("FAIL: the logits of sequence 0 hold NaN")
    assert json.loads(run(capsys, "a", *command, "--json")[1])["passed"] is False


def test_a_byte_level_tokenizer_without_a_decoder_gives_text(tmp_path):
    """Tokens stand for bytes under other symbols: what is written is text, a space and an umlaut included."""
    tokenizers = pytest.importorskip("tokenizers", reason="not checked: text of a tokenizer.json without a decoder")
    words = toy.checkpoint().vocabulary
    bare = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(words.tokens)}, []))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.save(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(tmp_path / "tokenizer.json", "a naïve b")
    assert tokenizer.decode(tmp_path / "tokenizer.json", ids) == "a naïve b"
