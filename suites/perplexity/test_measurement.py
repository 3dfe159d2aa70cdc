"""Windows and what is measured in them, on a model that is checked by hand."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from mxharness import agreement, perplexity
from mxharness.errors import UserError
from mxharness.model import reference
from mxharness.model.checkpoint import Checkpoint
from mxharness.model.tokenizer import encode
from mxharness.protocols import PROTOCOLS, Span, select, spans

from .measuring import SAMPLE, measure

# Windows


def test_windows_of_512_and_their_scored_tokens() -> None:
    half, every = (spans(PROTOCOLS[name], 303_415) for name in ("windows-512-half", "windows-512-all"))
    assert half[0] == Span(0, 512, 257)
    assert half[-1] == Span(591 * 512, 592 * 512, 591 * 512 + 257)
    assert sum(span.stop - span.first for span in half) == 592 * 255
    assert sum(span.stop - span.first for span in every) == 302_512
    assert [span.start // 512 for span in select(half, 64)] == list(range(0, 568, 9))
    assert [span.start // 512 for span in select(half, 444)] == [i for i in range(592) if i % 4 != 3]
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
def test_scored_likelihoods_are_the_protocols(toy: Checkpoint, batch: int) -> None:
    ids = encode(toy.vocabulary, SAMPLE.text)
    assert len(ids) == 264
    result = measure(toy, windows=3, batch=batch)
    assert result.spans == (Span(0, 32, 17), Span(64, 96, 81), Span(128, 160, 145))
    model = reference.float32(toy)
    wanted = []
    for start in (0, 64, 128):
        window = torch.from_numpy(ids[start : start + 32].astype(np.int64))
        logits = model.logits(model.hidden_states(window[None])[0]).double().numpy()
        odds = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        wanted += [-odds[t - 1, window[t]] for t in range(17, 32)]
    assert result.scored == len(wanted) == 45
    assert np.abs(result.nll - np.array(wanted)).max() <= 1e-5
    assert math.isclose(result.perplexity, math.exp(np.mean(wanted)), rel_tol=1e-6)
    assert result.windows_available == 8


def test_a_result_states_what_fixes_it(toy: Checkpoint) -> None:
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


def test_a_bar_with_tokens_per_second_goes_to_stderr(toy: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    measure(toy, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "256/256" in shown.err
    assert "tok/s" in shown.err
    measure(toy)
    assert capsys.readouterr().err == ""


def test_nothing_to_score_is_an_error(toy: Checkpoint) -> None:
    with pytest.raises(UserError, match=r"sample .* gives 31 tokens, toy needs 32"):
        measure(toy, tokens=31)
    with pytest.raises(UserError, match="no protocol 'windows'; there are windows-512-half, windows-512-all"):
        perplexity.read(toy, SAMPLE, "windows")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_fail(toy: Checkpoint, value: float) -> None:
    plain, heads = reference.float32(toy), []

    def logits(states: torch.Tensor) -> torch.Tensor:
        y = plain.logits(states)
        heads.append(y)
        if len(heads) == 2:
            y[4:] = value
        return y

    with pytest.raises(perplexity.NotFiniteError) as caught:
        measure(toy, replace(plain, logits=logits), windows=3)
    assert "11 of 15 scored tokens of the window at token 64 have a NaN or infinite" in str(caught.value)
    assert "the first is token 85 " in str(caught.value)


def test_a_broken_model_has_an_infinite_perplexity_and_no_traceback(toy: Checkpoint) -> None:
    plain = reference.float32(toy)
    broken = replace(plain, logits=lambda states: plain.logits(states) * 1e6)
    result = measure(toy, broken)
    assert result.perplexity == math.inf
    assert agreement.compare(measure(toy), result).relative == math.inf


def test_only_the_same_tokens_are_compared(toy: Checkpoint) -> None:
    result = measure(toy)
    same = agreement.compare(result, measure(toy))
    assert same == agreement.Comparison(relative=0.0, largest_token=0.0, bitwise=True)
    for what in ("model_sha256", "text_sha256", "ids_sha256", "protocol"):
        with pytest.raises(UserError, match=f"cannot be compared, their {what} differs: .* and other"):
            agreement.compare(result, replace(result, **{what: "other"}))
    with pytest.raises(UserError, match="their spans differs: 8 and 4 windows"):
        agreement.compare(result, measure(toy, windows=4))


def test_the_relative_difference_is_of_perplexities(toy: Checkpoint) -> None:
    result = measure(toy)
    worse = replace(result, nll=result.nll + np.float32(0.25), mean_nll=result.mean_nll + 0.25)
    compared = agreement.compare(result, worse)
    assert math.isclose(compared.relative, math.exp(0.25) - 1, rel_tol=1e-12)
    assert math.isclose(compared.largest_token, 0.25, rel_tol=1e-5)
    assert not compared.bitwise
