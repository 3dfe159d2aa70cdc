"""Kernels against float32 on the decoded weights: the three measurements, and the row of a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from mxharness import agreement
from mxharness.commands import model_row
from mxharness.device import Device
from mxharness.gate import defects
from mxharness.model import decoder, reference
from mxharness.model.checkpoint import Checkpoint
from mxharness.model.decoder import Activations
from mxharness.model.runner import Runner
from mxharness.protocols import PROTOCOLS

from ..toys import TOY
from .measuring import SAMPLE, measure, read


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
