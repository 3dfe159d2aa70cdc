"""SmolLM2: transformers' perplexity, the kernels', the text's tokens; the model that commands take."""

from __future__ import annotations

import hashlib
import math
import os

import numpy as np
import pytest
from mxharness import agreement, cli, fetch, perplexity, text
from mxharness.commands.common import DEFAULT_MODEL
from mxharness.commands.perplexity import require_model
from mxharness.device import Device, open_device
from mxharness.errors import UserError
from mxharness.gate import compared
from mxharness.gate.verdict import Rules, judge
from mxharness.model import decoder, load, reference
from mxharness.model.checkpoint import Checkpoint
from mxharness.model.runner import Runner
from mxharness.model.tokenizer import encode, ids_sha256
from mxharness.protocols import Span

# SmolLM2 in float32, tokens 257 to 511 of the embedded text: transformers 5.23, eager attention, torch 2.13, on a CPU.
SMOLLM2_REFERENCE = 48.24443398
SMOLLM2_2048 = 39.53935330  # likewise, the first 2,048 tokens in windows of 512, tokens 257 to 511 of each
SMOLLM2_MXFP4 = (138.65068, 96.73764)  # our float32 on the decoded weights, the first two windows and the others
SMOLLM2_IDS = "54e9eb47f0e9cdc8671cfe5fb052391ce791ef5fa1eab27cc7ddf06cb39c7b2b"


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    path = fetch.cached("smollm2")
    if path is None:
        pytest.skip("not measured: SmolLM2's perplexity; `mxharness fetch smollm2` puts the model into the cache")
    return load.load(path)


@pytest.fixture(scope="module")
def decoded_and_kernels(smollm2: Checkpoint, device: Device) -> tuple[Runner, Runner]:
    """Its decoded weights in float32, and our kernels; on the host device in float32 arithmetic, which is faster."""
    place = open_device("host", fast=True) if device.name == "host" else device
    return reference.decoded(smollm2), decoder.kernels(smollm2, place, "fp16")


def test_smollm2_has_transformers_perplexity(smollm2: Checkpoint) -> None:
    reading = perplexity.read(smollm2, text.load_text("default"), tokens=2048)
    result = perplexity.measure(reading, reference.float32(smollm2))
    assert ids_sha256(reading.ids[:512]) == SMOLLM2_IDS
    assert result.spans == tuple(Span(i, i + 512, i + 257) for i in (0, 512, 1024, 1536))
    assert abs(math.exp(result.nll[:255].mean(dtype="float64")) / SMOLLM2_REFERENCE - 1) <= 1e-4
    assert abs(result.perplexity / SMOLLM2_2048 - 1) <= 1e-4


@pytest.mark.parametrize("half", [0, 1], ids=["first", "second"])
def test_smollm2_through_the_kernels_passes_its_gate(
    smollm2: Checkpoint, decoded_and_kernels: tuple[Runner, Runner], half: int
) -> None:
    """2,048 tokens, two windows for each of two workers, where one is free."""
    reading = perplexity.read(smollm2, text.load_text("default"), tokens=2048)
    windows = list(compared.together(*decoded_and_kernels, reading.ids)(reading.available[2 * half : 2 * half + 2]))
    decoded, own = (
        float(np.concatenate([getattr(window, name) for window in windows]).mean())
        for name in ("reference", "candidate")
    )
    found = judge(windows, Rules(agreement.LIMITS["fp16"].relative))
    assert sum(len(window.kl) for window in windows) == 2 * 255
    assert abs(math.exp(decoded) / SMOLLM2_MXFP4[half] - 1) <= 1e-3
    assert abs(math.expm1(own - decoded)) <= 1e-3 * math.sqrt(2)  # 1e-3 for all four: half as many tokens vary more
    assert found.divergence.upper < found.limit
    assert found.same > 0.95


def test_wikitext_has_303415_tokens(smollm2: Checkpoint) -> None:
    if not os.environ.get("MXHARNESS_WIKITEXT"):
        pytest.skip("not measured: the tokens of WikiText-2; MXHARNESS_WIKITEXT names no file")
    ids = encode(smollm2.vocabulary, text.load_text("wikitext-2").text)
    assert len(ids) == 303_415
    assert hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest() == (
        "18e663b61dd00f49796c8a6ae498b7dbe009cac4a2eaf3c67fa7d81baf47d945"
    )


def test_commands_take_the_same_model_where_none_is_named() -> None:
    defaults = {
        name: parameter.default
        for name, command in cli.commands.commands.items()
        for parameter in command.params
        if parameter.name == "model"
    }
    assert {"perplexity", "gate", "generate", "run"} <= set(defaults)
    assert set(defaults.values()) == {DEFAULT_MODEL}


def test_a_model_that_is_not_there_names_those_that_are() -> None:
    for name, message in (
        ("none.gguf", "no model file none.gguf; by name there are"),
        ("none", "no model 'none'; there"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            require_model(name)
        assert all(model in str(caught.value) for model in ("embedded", "embedded-original", "smollm2"))
