"""What quantising a part of a model costs: against the gate's own measurement, and formats against their owners."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from mxharness import cli, perplexity, roundtrip, sensitivity
from mxharness.commands import perplexity as commands
from mxharness.errors import Unavailable, UserError
from mxharness.gate import compared, defects
from mxharness.model import reference, toy
from mxharness.model.config import weights as weights_of
from mxharness.plot import Bar, bars_file
from mxharness.roundtrip import FORMATS

from . import toys
from .toys import SAMPLE

CPU = torch.device("cpu")


@pytest.fixture
def reading(monkeypatch):
    return toys.reading(monkeypatch)


def name_of(change):
    return change.name


def test_a_part_alone_costs_what_the_gate_measures_of_it(reading):
    model = toy.checkpoint()
    layer = next(change for change in sensitivity.changes(model) if change.name == "layer 1")
    found = sensitivity.measure(model, reading, [layer], CPU, windows=6)
    spoilt = defects.quantised(model, lambda weight: weight.name.startswith("layers.1."))
    spans = perplexity.select(reading.available, 6)
    seen = list(compared.together(reference.float32(model), reference.float32(spoilt), reading.ids)(spans))
    (loss,) = found.losses
    assert loss.kl.mean == pytest.approx(np.mean([window.kl.mean() for window in seen]), rel=1e-12)
    assert loss.kl.mean > 0.01
    assert loss.moved.mean == pytest.approx(np.mean([(w.candidate - w.reference).mean() for w in seen]), abs=1e-12)
    assert loss.same == np.mean([window.same.mean() for window in seen])
    assert loss.kl.windows == found.windows == 6
    assert found.mean_nll == pytest.approx(np.mean([window.reference.mean() for window in seen]), abs=1e-12)


def test_parts_are_all_that_is_quantised():
    for config in (toy.LLAMA, toy.GPT_OSS):
        model = toy.checkpoint(config)
        asked = {change.name: change for change in sensitivity.changes(model, ["roles", "layers"])}
        packed = {weight.name for weight in weights_of(config) if weight.packed}
        heads = ["embedding and head"] if config.tied else ["embedding", "head"]
        assert list(asked) == [
            heads[0],
            "attention",
            "ffn",
            *heads[1:],
            "all linear layers",
            "everything",
            "layer 0",
            "layer 1",
        ]
        assert set(asked["everything"].weights) == packed
        for parts in (["attention", "ffn", *heads], ["layer 0", "layer 1", *heads], ["all linear layers", *heads]):
            whole = [name for part in parts for name in asked[part].weights]
            assert sorted(whole) == sorted(packed)
        assert not any("router" in name or "norm" in name for name in packed)
    with pytest.raises(UserError, match="no group 'heads'; there are roles, layers, formats"):
        sensitivity.changes(model, ["heads"])


def test_many_changes_are_measured_as_one_alone_is(reading):
    pytest.importorskip("gguf", reason="not measured: formats of llama.cpp beside MXFP4")
    model = toy.checkpoint()
    asked = sensitivity.changes(model)
    found = sensitivity.measure(model, reading, asked, CPU, windows=3)
    assert [loss.change for loss in found.losses] == list(asked)
    by_name = {(loss.change.group, loss.change.name): loss for loss in found.losses}
    assert by_name["roles", "everything"].kl == by_name["formats", "MXFP4 floor"].kl
    last = asked[-2]  # in another group of those that share a pass
    assert sensitivity.measure(model, reading, [last], CPU, windows=3).losses[0].kl == by_name["formats", last.name].kl
    ranked = found.ranked("formats")
    assert [loss.kl.mean for loss in ranked if loss.kl] == sorted((x.kl.mean for x in ranked if x.kl), reverse=True)
    order = [loss.change.name for loss in ranked]
    assert order.index("MXFP4 floor") < order.index("Q5_0") < order.index("Q8_0") < order.index("F16")


def test_rows_that_do_not_fit_a_format_are_said_to_fall_back(reading):
    pytest.importorskip("gguf", reason="not measured: a format that others fall back to")
    model = toy.checkpoint()  # rows of 64, 96 and 128
    asked = [change for change in sensitivity.changes(model, ["formats"]) if change.name in {"Q4_K", "Q5_0"}]
    found = {loss.change.name: loss for loss in sensitivity.measure(model, reading, asked, CPU, windows=2).losses}
    assert found["Q4_K"].fell_back == {"Q5_0": asked[0].weights}
    assert not found["Q5_0"].fell_back
    assert found["Q4_K"].kl == found["Q5_0"].kl
    assert roundtrip.fitting(FORMATS["Q4_K"], 512).name == "Q4_K"
    assert roundtrip.fitting(FORMATS["Q4_K"], 576).name == "Q5_0"
    assert roundtrip.fitting(FORMATS["Q4_K"], 100).name == roundtrip.fitting(FORMATS["Q8_0"], 100).name == "F16"
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(roundtrip.restored(FORMATS["Q4_K"], x)[1], roundtrip.restored(FORMATS["Q5_0"], x[1]))


def test_ggml_and_gguf_py_write_the_same():
    pytest.importorskip("llama_cpp", reason="not compared: ggml's quantiser, which llama-cpp-python brings")
    x = torch.randn(7, 512, generator=torch.Generator().manual_seed(1))
    for name in ("Q8_0", "Q5_0", "Q4_0"):
        assert torch.equal(roundtrip._ggml(x, name), roundtrip.restored(FORMATS[name], x))
    error = {name: float((roundtrip.restored(FORMATS[name], x) - x).square().mean()) for name in FORMATS}
    assert error["Q5_0"] < error["Q4_K"] < error["Q4_0"]


def test_without_gguf_a_format_says_what_it_needs(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(Unavailable, match=r"needs gguf, .*: pip install 'mxharness\[model\]'"):
        roundtrip.restored(FORMATS["Q8_0"], torch.ones(1, 32))


def test_what_cannot_be_measured_stays_in_the_table(reading, monkeypatch, capsys, tmp_path):
    pytest.importorskip("gguf", reason="not tried: formats of llama.cpp without its library")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else real(name))
    roundtrip.ggml.cache_clear()
    model = toy.checkpoint(replace(toy.LLAMA, ffn=256, context=512))
    monkeypatch.setattr(commands, "load", lambda *_: (model, SAMPLE))
    options = ["sensitivity", "--model", "toy", "--protocol", "windows-512-all", "--windows", "2", "--device", "host"]
    try:
        picture = tmp_path / "plot.svg"
        with pytest.raises(SystemExit) as ended:
            cli.main([*options, "--only", "formats", "--only", "roles", "--plot", str(picture)])
        out = capsys.readouterr().out
        assert ended.value.code == 0
        assert "not measured: Q4_K needs llama-cpp-python" in out
        assert "Each role alone in MXFP4 (floor)" in out
        assert "<svg" in picture.read_text()
        with pytest.raises(SystemExit):
            cli.main([*options, "--only", "layers", "--json", "--plot", str(tmp_path / "plot.png")])
        document = json.loads(capsys.readouterr().out)
        with pytest.raises(Unavailable, match="pip install llama-cpp-python"):
            roundtrip.restored(FORMATS["Q4_K"], torch.zeros(1, 256))
    finally:
        roundtrip.ggml.cache_clear()
    assert [loss["name"] for loss in document["losses"]] == ["layer 0", "layer 1"]
    assert document["losses"][0]["kl"]["lower"] < document["losses"][0]["kl"]["mean"]


def test_a_plot_is_a_picture(tmp_path):
    bars = {"some": [Bar("a", 0.1, 0.05, 0.15), Bar("b", 1e-4, -1e-4, 3e-4), Bar("c", 0.2, -math.inf, math.inf)]}
    bars_file(tmp_path / "x.png", "title", bars, "KL")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"a plot is a \.png or \.svg file, not 'x\.gif'"):
        bars_file(tmp_path.__class__("x.gif"), "title", bars, "KL")
