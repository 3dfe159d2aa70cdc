"""`mxharness gate` on the toy: beside a reference, against a baseline, and what it says of both."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from mxharness import agreement, perplexity
from mxharness.gate import defects, judged, references, stored
from mxharness.model import reference, toy
from mxharness.protocols import select

from ..toys import SAMPLE
from .made import CPU, run


def test_a_baseline_that_does_not_exist_is_told_before_a_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("mxharness.commands.gate.load", lambda model, source: pytest.fail("a model was loaded"))
    assert run(capsys, "gate", "--baseline", "nothing", "--device", "host")[0] == 2


@pytest.mark.long
def test_the_command_judges_beside_and_against_a_baseline(toy_command, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(agreement.LIMITS, "fp16", replace(agreement.LIMITS["fp16"], relative=0.2))
    path = str(tmp_path / "toy.safetensors")
    code, out = run(capsys, "gate", "--json", "--windows", "12", *toy_command)
    beside = json.loads(out)
    assert (code, beside["passed"], beside["gates"]["fp16"]["verdict"]) == (0, True, "pass"), out
    assert beside["gates"]["fp16"]["divergence"]["mean"] > 0
    code, out = run(capsys, "gate", "create", path, *toy_command, "--windows", "12")
    assert code == 0
    assert "12 windows, 180 scored tokens" in out
    code, out = run(capsys, "gate", "--json", "--baseline", path, *toy_command)
    against = json.loads(out)
    assert (code, against["passed"]) == (0, True), out
    assert against["gates"]["fp16"]["change"] == pytest.approx(beside["gates"]["fp16"]["change"])
    assert against["format"]["mean"] != 0
    code, out = run(capsys, "gate", "--baseline", path, *toy_command)
    assert (code, "the same bits" in out, "PASS: kernels with fp16 activations" in out) == (0, True, True), out
    assert run(capsys, "gate", "create", path, *toy_command)[0] == 2


def test_a_moved_reference_fails(toy_command, capsys, tmp_path):
    path = tmp_path / "toy.safetensors"
    kept = judged.make_baseline(toy.checkpoint(), SAMPLE, CPU, "windows-512-half", windows=8, top=4, drawn=2)
    for column in ("nll", "original"):
        moved = {**kept.columns, column: kept.columns[column] + np.float32(0.002)}
        stored.save(replace(kept, columns=moved), path)
        code, out = run(capsys, "gate", "--baseline", str(path), *toy_command)
        assert code == 1
        assert "is not what the baseline holds: -2.00e-03 nats per token over 8 windows" in out


def test_what_the_format_costs_must_not_move_either(toy_command, capsys, tmp_path):
    """Both references stay within what each may move by, in opposite directions."""
    path = tmp_path / "toy.safetensors"
    kept = judged.make_baseline(toy.checkpoint(), SAMPLE, CPU, "windows-512-half", windows=8, top=4, drawn=2)
    moved = {"nll": np.float32(7e-4), "original": np.float32(-7e-4)}
    stored.save(
        replace(kept, columns=kept.columns | {name: kept.columns[name] + by for name, by in moved.items()}), path
    )
    code, out = run(capsys, "gate", "--baseline", str(path), *toy_command)
    assert code == 1
    assert "what the format costs is not what the baseline holds: -1.40e-03 nats per token" in out


def test_a_reference_that_does_not_repeat_itself_is_shown(toy_command, capsys, monkeypatch):
    code, out = run(capsys, "gate", "--windows", "2", "--json", *toy_command)
    assert json.loads(out)["repeated"] == {"windows": 1, "kl": 0.0, "largest": 0.0}, code
    assert "the reference twice, 1 window: the same bits" in json.loads(out)["notes"]
    decoded, generator = reference.decoded, torch.Generator().manual_seed(0)

    def unsteady(*arguments):
        plain = decoded(*arguments)

        def logits(states):
            made = plain.logits(states)
            return made + 1e-3 * torch.randn(made.shape, generator=generator)

        return replace(plain, logits=logits)

    monkeypatch.setattr(reference, "decoded", unsteady)
    _, out = run(capsys, "gate", "--windows", "2", "--json", *toy_command)
    found = json.loads(out)
    assert 1e-7 < found["repeated"]["kl"] < 1e-5
    assert 1e-4 < found["repeated"]["largest"] < 1e-2
    _, out = run(capsys, "gate", "--windows", "2", *toy_command)
    assert "the reference twice, 1 window: NOT the same bits, mean KL " in out


def test_the_formats_cost_is_reported_where_the_original_is_at_hand(reading, capsys, toy_command, monkeypatch):
    _, out = run(capsys, "gate", "--windows", "12", "--json", *toy_command)
    found = json.loads(out)
    model, spans = toy.checkpoint(), select(reading.available, 12)
    decoded, original = (
        perplexity.measure(reading, runner, windows=12)
        for runner in (reference.decoded(model), reference.float32(model))
    )
    assert found["format"]["mean"] == pytest.approx(decoded.mean_nll - original.mean_nll, rel=1e-5)
    assert found["format"]["lower"] < found["format"]["mean"] < found["format"]["upper"]
    assert (found["format"]["windows"], found["format"]["tokens"]) == (12, decoded.scored)
    kept = stored.collect(model, reading, spans, CPU, top=4, drawn=2)
    assert kept.cost(spans).mean == pytest.approx(found["format"]["mean"], rel=1e-5)
    quantised = defects.quantised(model, defects.everything)  # what it was made of is gone
    assert (references.has_original(model), references.has_original(quantised)) == (True, False)
    assert stored.collect(quantised, reading, spans, CPU, top=4, drawn=2).cost(spans) is None
    monkeypatch.setattr("mxharness.commands.gate.load", lambda model, source: (quantised, SAMPLE))
    _, out = run(capsys, "gate", "--windows", "2", "--json", *toy_command)
    assert json.loads(out)["format"] is None
    assert "what the format costs is not known: the weights before MXFP4 are not at hand" in json.loads(out)["notes"]
    monkeypatch.setattr("mxharness.commands.gate.original_of", lambda _: model)
    _, out = run(capsys, "gate", "--windows", "12", "--json", *toy_command)
    assert json.loads(out)["format"] == found["format"]


def test_too_short_a_text_fails(toy_command, capsys):
    code, out = run(capsys, "gate", "--limit", "31", *toy_command)
    assert code == 1
    assert "FAIL: nothing to score: sample (not WikiText-2) gives 31 tokens, windows-512-half needs 32" in out
