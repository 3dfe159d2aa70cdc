"""A real model's perplexity: decoder, file, tokens, windows, texts and verdicts, on models checked by hand."""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mxharness import agreement, cli, fetch, perplexity, text
from mxharness.commands import model_row
from mxharness.commands.common import DEFAULT_MODEL
from mxharness.commands.perplexity import require_model
from mxharness.device import Device, open_device
from mxharness.errors import UserError
from mxharness.gate import compared, defects
from mxharness.gate.verdict import Rules, judge
from mxharness.model import decoder, load, ranks, reference
from mxharness.model import toy as toy_model
from mxharness.model.checkpoint import Checkpoint
from mxharness.model.decoder import Activations
from mxharness.model.runner import Runner
from mxharness.model.tokenizer import encode, ids_sha256
from mxharness.protocols import PROTOCOLS, Protocol, Span, select, spans
from safetensors import safe_open
from safetensors.numpy import save_file

TOY = Protocol("toy", 32, 32, 17, 17, False, "windows of 32, second half")
SAMPLE = text.Text("sample", "sample (not WikiText-2)", "In 2004, 1 of 12 bytes <|end|> were naïve.\n" * 6, "0" * 64)

# SmolLM2 in float32, tokens 257 to 511 of the embedded text: transformers 5.23, eager attention, torch 2.13, on a CPU.
SMOLLM2_REFERENCE = 48.24443398
SMOLLM2_2048 = 39.53935330  # likewise, the first 2,048 tokens in windows of 512, tokens 257 to 511 of each
SMOLLM2_MXFP4 = (
    138.65068,
    96.73764,
)  # this project's float32 on the decoded weights, the first two windows and the others
SMOLLM2_IDS = "54e9eb47f0e9cdc8671cfe5fb052391ce791ef5fa1eab27cc7ddf06cb39c7b2b"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setitem(PROTOCOLS, "toy", TOY)
    return toy_model.checkpoint()


def read(file: Checkpoint, tokens: int | None = None) -> perplexity.Reading:
    return perplexity.read(file, SAMPLE, "toy", tokens)


def measure(
    file: Checkpoint,
    runner: Runner | None = None,
    *,
    tokens: int | None = None,
    **options: Any,  # noqa: ANN401  what `measure` takes
) -> perplexity.Result:
    return perplexity.measure(read(file, tokens), runner or reference.float32(file), **options)


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


# MXFP4


def test_decoded_weights_cost_something_and_say_so(toy: Checkpoint) -> None:
    result = measure(toy, reference.decoded(toy))
    assert result.weights == "mxfp4 (floor, even)"
    assert agreement.compare(measure(toy), result).largest_token > 1e-3


@pytest.mark.parametrize("activations", ["fp16", "bf16"])
def test_kernels_agree_with_float32_on_the_decoded_weights(
    toy: Checkpoint, device: Device, activations: Activations
) -> None:
    found = agreement.triple(toy, read(toy), device, activations=activations)
    assert found.passed, found.message
    assert found.agreement.largest_token > 0  # it did go through rounded activations
    assert found.limit.relative == {"fp16": 5e-3, "bf16": 1e-2}[activations]
    assert found.kernels.activations == activations
    assert (found.kernels.device_class, found.kernels.arithmetic) == (device.device_class, device.arithmetic)
    document = json.loads(json.dumps(found.to_json()))
    assert document["passed"] is True
    assert document["kernels"]["weights"] == document["decoded"]["weights"] == "mxfp4 (floor, even)"
    assert document["original"]["weights"] == "float32"


def test_a_triple_past_its_limit_fails_and_says_how_far(toy: Checkpoint, device: Device) -> None:
    honest = agreement.triple(toy, read(toy), device)
    for shift, passed in ((6e-3, False), (-6e-3, False), (4e-3, True), (-4e-3, True)):
        wrong = replace(honest, agreement=replace(honest.agreement, relative=shift))
        assert wrong.passed is passed
        assert f"{shift:+.2e} relative, {'within' if passed else 'past'} 0.005" in wrong.message


# The real model


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    path = fetch.cached("smollm2")
    if path is None:
        pytest.skip("not measured: SmolLM2's perplexity; `mxharness fetch smollm2` puts the model into the cache")
    return load.load(path)


def test_smollm2_has_transformers_perplexity(smollm2: Checkpoint) -> None:
    reading = perplexity.read(smollm2, text.load_text("default"), tokens=2048)
    result = perplexity.measure(reading, reference.float32(smollm2))
    assert ids_sha256(reading.ids[:512]) == SMOLLM2_IDS
    assert result.spans == tuple(Span(i, i + 512, i + 257) for i in (0, 512, 1024, 1536))
    assert abs(math.exp(result.nll[:255].mean(dtype="float64")) / SMOLLM2_REFERENCE - 1) <= 1e-4
    assert abs(result.perplexity / SMOLLM2_2048 - 1) <= 1e-4


@pytest.mark.parametrize("half", [0, 1], ids=["first", "second"])
def test_smollm2_through_the_kernels_passes_its_gate(smollm2: Checkpoint, device: Device, half: int) -> None:
    """2,048 tokens, two windows for each of two workers; on the host device in float32 arithmetic, which is faster."""
    reading = perplexity.read(smollm2, text.load_text("default"), tokens=2048)
    place = open_device("host", fast=True) if device.name == "host" else device
    models = reference.decoded(smollm2), decoder.kernels(smollm2, place, "fp16")
    windows = list(compared.together(*models, reading.ids)(reading.available[2 * half : 2 * half + 2]))
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


# Kept on disk, and shared by processes


def test_a_killed_measurement_goes_on_where_it_was(toy: Checkpoint, tmp_path: Path) -> None:
    whole = measure(toy, batch=3)
    plain, calls = reference.float32(toy), []

    def killed(ids: torch.Tensor) -> torch.Tensor:
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain.hidden_states(ids)

    with pytest.raises(KeyboardInterrupt):
        measure(toy, replace(plain, hidden_states=killed), batch=3, keep=perplexity.Keep(tmp_path))
    assert calls == [3, 3, 2]
    folder = tmp_path / "float32"
    (folder / "00000.safetensors").write_bytes(b"half a file")  # not by us: ours appear whole
    save_file({"nll": np.ones(1, np.float32)}, folder / "00002.safetensors")
    with pytest.raises(UserError, match="float32 holds a measurement; --resume goes on with it"):
        measure(toy, batch=3, keep=perplexity.Keep(tmp_path))
    resumed = replace(plain, hidden_states=lambda ids: (calls.append(len(ids)), plain.hidden_states(ids))[1])
    result = measure(toy, resumed, batch=3, keep=perplexity.Keep(tmp_path, resume=True))
    assert calls[3:] == [3, 2]  # the second batch was there
    assert result.nll.tobytes() == whole.nll.tobytes()
    assert sorted(path.name for path in folder.iterdir()) == ["measurement.json", "nll.safetensors"]
    with safe_open(folder / "nll.safetensors", framework="np") as file:
        assert file.get_tensor("nll").tobytes() == whole.nll.tobytes()
        assert [Span(*row) for row in file.get_tensor("windows").tolist()] == list(whole.spans)
        assert file.metadata()["ids_sha256"] == whole.ids_sha256
    again = measure(toy, resumed, batch=3, keep=perplexity.Keep(tmp_path, resume=True))
    assert (calls[5:], again.nll.tobytes(), again.tokens_per_second) == ([], whole.nll.tobytes(), 0)
    (folder / "nll.safetensors").write_bytes(b"half a file")
    again = measure(toy, resumed, batch=3, keep=perplexity.Keep(tmp_path, resume=True))
    assert (calls[5:], again.nll.tobytes()) == ([3, 3, 2], whole.nll.tobytes())


@pytest.mark.parametrize("what", ["model_sha256", "text_sha256", "ids_sha256", "protocol"])
def test_a_changed_experiment_is_not_resumed(toy: Checkpoint, tmp_path: Path, what: str) -> None:
    runner, keep = reference.float32(toy), perplexity.Keep(tmp_path, resume=True)
    perplexity.measure(read(toy), runner, windows=2, keep=keep)
    with pytest.raises(UserError, match=f"another measurement and cannot be resumed: {what} .* -> other"):
        perplexity.measure(replace(read(toy), **{what: "other"}), runner, windows=2, keep=keep)


def test_changed_kernels_or_windows_are_not_resumed(
    toy: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, keep = replace(reference.float32(toy), name="kernels"), perplexity.Keep(tmp_path, resume=True)
    perplexity.measure(read(toy), runner, windows=2, keep=keep)
    with pytest.raises(UserError, match="cannot be resumed: windows 2 -> 3"):
        perplexity.measure(read(toy), runner, windows=3, keep=keep)
    monkeypatch.setattr(perplexity, "kernels_sha256", lambda: "other")
    with pytest.raises(UserError, match=r"cannot be resumed: kernels .* -> other"):
        perplexity.measure(read(toy), runner, windows=2, keep=keep)


SHARED = """
import sys
from pathlib import Path
from mxharness import perplexity, text
from mxharness.model import ranks, reference, toy
from mxharness.protocols import PROTOCOLS, Protocol
PROTOCOLS["toy"] = Protocol("toy", 32, 32, 17, 17, False, "")
with ranks.joined() as here:
    file = toy.checkpoint()
    reading = perplexity.read(file, text.Text("sample", "sample", sys.argv[2], "0" * 64), "toy")
    result = perplexity.measure(
        reading, reference.float32(file), batch=3, ranks=here, keep=perplexity.Keep(Path(sys.argv[1]))
    )
    Path(sys.argv[1], f"{here.rank} of {here.count}").write_bytes(result.nll.tobytes())
"""


def test_two_processes_have_the_bits_of_one(toy: Checkpoint, tmp_path: Path) -> None:
    """Three batches on two processes of torchrun's environment, gathered through gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            (sys.executable, "-c", SHARED, str(tmp_path), SAMPLE.text),
            env=environment | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
        )
        for rank in "01"
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = measure(toy, batch=3).nll.tobytes()
    torch.set_num_threads(threads)
    assert (tmp_path / "0 of 2").read_bytes() == (tmp_path / "1 of 2").read_bytes() == alone
    with safe_open(tmp_path / "float32" / "nll.safetensors", framework="np") as file:
        assert file.get_tensor("nll").tobytes() == alone


def test_each_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="2 processes and CUDA_VISIBLE_DEVICES=3: each needs a GPU"), ranks.joined():
        pass


# The row of a run


def row(monkeypatch: pytest.MonkeyPatch, toy: Checkpoint) -> dict[str, Any]:
    monkeypatch.setitem(PROTOCOLS, "windows-512-half", TOY)
    monkeypatch.setattr(model_row, "load", lambda model, source: (toy, SAMPLE))
    return dict(model_row.row_of_run("toy", "host", 4))


def test_a_run_records_the_gate(toy: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    found = row(monkeypatch, toy)
    assert found["passed"], found["message"]
    assert 0 < found["kl"] < 1e-3
    assert found["gate"] in {"pass", "inconclusive"}
    assert f"gate: {found['gate']}, " in found["message"]
    assert found["tokens_scored"] == 60
    decoded, own = (measure(toy, runner, windows=4) for runner in (reference.decoded(toy), None))
    assert found["perplexity_decoded_float32"] == pytest.approx(decoded.perplexity, rel=1e-9)
    assert found["perplexity_original_float32"] == pytest.approx(own.perplexity, rel=1e-9)
    assert found["perplexity"] == pytest.approx(decoded.perplexity, rel=5e-3)
    assert found["change"] == pytest.approx(found["perplexity"] / decoded.perplexity - 1, rel=1e-3)
    for name in ("perplexity", "change", "kl"):
        assert found[f"{name}_lower"] < found[name] < found[f"{name}_upper"]


@pytest.mark.parametrize(("name", "word"), [("flipped-codes", "fail"), ("healthy", "nan")])
def test_a_run_fails_on_its_gate(toy: Checkpoint, monkeypatch: pytest.MonkeyPatch, name: str, word: str) -> None:
    """Kernels that are given spoilt codes, and kernels that give NaN."""
    kernels = decoder.kernels

    def wrong(file: Checkpoint, *arguments: Any) -> Runner:  # noqa: ANN401  passed on
        made = kernels(defects.quantised(file, defects.everything, defects.DEFECTS.get(name)), *arguments)
        if word == "nan":
            made = replace(made, logits=lambda states: torch.full((len(states), 259), math.nan))
        return made

    monkeypatch.setattr(decoder, "kernels", wrong)
    monkeypatch.setitem(agreement.LIMITS, "fp16", replace(agreement.LIMITS["fp16"], relative=10.0))  # KL alone fails
    found = row(monkeypatch, toy)
    assert not found["passed"]
    assert ("gate: fail, mean KL" in found["message"]) is (word == "fail")
    assert ("is NaN or infinite for 15 of 15 tokens" in found["message"]) is (word == "nan")
