"""`mxharness quantize`: what is written and what is left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mxharness import mxfp4
from mxharness.errors import UserError
from mxharness.model import safetensors_file, toy
from mxharness.model.checkpoint import Checkpoint, packed, values
from mxharness.model.load import load
from mxharness.model.quantising import quantise
from mxharness.mxfp4 import Quantized
from safetensors.numpy import save_file

ARCHITECTURES = list(toy.CONFIGS)


def same_weights(read: Checkpoint, original: Checkpoint, rules: tuple[str, str] = ("floor", "even")) -> list[str]:
    """Names of weights that are neither what they were nor, where they are MXFP4, their quantisation by the rules."""
    wrong = []
    for name, stored in read.tensors.items():
        before, now = original.tensors[name], stored.read()
        if isinstance(now, Quantized):
            wanted = packed(before, *rules)
            right = torch.equal(now.codes, wanted.codes) and torch.equal(now.scales, wanted.scales)
        else:
            right = torch.equal(now, values(before))
        wrong += [] if right else [name]
    return wrong


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rules", [("floor", "even"), ("even", "away")])
def test_written_files_hold_the_model(tmp_path: Path, architecture: str, rules: tuple[str, str]) -> None:
    model = toy.checkpoint(toy.CONFIGS[architecture])
    scale, tie = rules
    for name in ("one.gguf", "one"):
        quantise(model, tmp_path / name, scale_rule=scale, tie_rule=tie)
    quantise(tmp_path / "one.gguf", tmp_path / "two")
    quantise(tmp_path / "one", tmp_path / "two.gguf", scale_rule=scale, tie_rule=tie)
    quantise(tmp_path / "one.gguf", tmp_path / "three.gguf")
    quantise(tmp_path / "one", tmp_path / "three")
    for name in ("one.gguf", "one", "two.gguf", "two", "three.gguf", "three"):
        read = load(tmp_path / name)
        assert replace(read.config, norm_epsilon=1e-5) == model.config
        # transformers reads no MXFP4 attention in gpt-oss: what was quantised for GGUF is decoded there, exactly.
        decoded = architecture == "gpt-oss" and name == "two"
        assert same_weights(read, load(tmp_path / "one.gguf") if decoded else model, rules) == []
        packed_names = {one.rsplit(".", 1)[-1] for one, stored in read.tensors.items() if stored.format == "MXFP4"}
        experts = {"gate_up", "down"}
        attention = {"q", "k", "v", "o"}
        if architecture == "llama":
            assert packed_names == attention | {"gate", "up", "down"}
        else:
            assert packed_names == (experts | attention if "gguf" in name else experts)
    assert load(tmp_path / "two.gguf").vocabulary == load(tmp_path / "one.gguf").vocabulary == model.vocabulary


def test_what_is_mxfp4_stays_and_is_not_counted(tmp_path: Path) -> None:
    model = toy.checkpoint(toy.GPT_OSS)
    first = quantise(model, tmp_path / "one.gguf", skip=["*attn*"])
    assert {row.why for row in first.rows if row.after == "MXFP4"} == {"as stored"}
    assert first.sqnr is None
    second = quantise(
        tmp_path / "one.gguf", tmp_path / "two.gguf", scale_rule="ceil", only=["*.attn*"], skip=["*down_exps.weight"]
    )
    experts = [row for row in second.rows if "exps.weight" in row.name]
    assert [(row.before, row.after, row.why) for row in experts] == [("MXFP4", "MXFP4", "as stored")] * 6
    assert {row.name for row in second.rows if row.sqnr is not None} == {
        f"blk.{i}.attn_{what}.weight" for i in range(2) for what in ("q", "k", "v", "output")
    }
    assert same_weights(load(tmp_path / "two.gguf"), model, ("ceil", "even")) == []


def test_sqnr_is_the_ratio_of_energies(tmp_path: Path) -> None:
    model = toy.checkpoint()
    report = quantise(model, tmp_path / "toy.gguf", only=["*ffn_down*"])
    exact = [values(model.tensors[f"layers.{i}.down"]).double() for i in range(2)]
    noise = [mxfp4.dequantize(*mxfp4.quantize(one.float())).double() - one for one in exact]
    rows = {row.name: row for row in report.rows}
    for i in range(2):
        wanted = float(10 * torch.log10(exact[i].square().sum() / noise[i].square().sum()))
        assert rows[f"blk.{i}.ffn_down.weight"].sqnr == pytest.approx(wanted, rel=1e-12)
    both = sum(float(one.square().sum()) for one in exact) / sum(float(one.square().sum()) for one in noise)
    assert report.sqnr == pytest.approx(10 * np.log10(both), rel=1e-12)
    assert rows["blk.0.ffn_up.weight"].sqnr is None
    assert rows["blk.0.ffn_up.weight"].why == "not among --only"
    assert rows["blk.0.ffn_down.weight"].nbytes == 64 * 96 // 32 * 17


# Any architecture


@pytest.fixture
def unknown(tmp_path: Path) -> Path:
    """A folder of an architecture that nobody has heard of."""
    rng = np.random.default_rng(0)
    shapes = {
        "embed.weight": (40, 64),
        "block.proj.weight": (48, 64),
        "block.router.weight": (4, 64),
        "block.norm.weight": (64,),
        "block.odd.weight": (8, 40),
        "block.cube.weight": (2, 8, 32),
        "block.table": (8, 32),
    }
    tensors = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    folder = tmp_path / "unknown"
    folder.mkdir()
    save_file({**tensors, "block.ids": np.arange(64, dtype=np.int64).reshape(2, 32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "novel", "kept": [1, 2]}))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "code.py").write_text("raise SystemExit")
    return folder


def test_an_unknown_architecture_in_safetensors(tmp_path: Path, unknown: Path) -> None:
    report = quantise(unknown, tmp_path / "out")
    why = {row.name: row.why for row in report.rows}
    assert why == {
        "block.cube.weight": "compressed-tensors holds matrices called .weight only",
        "block.ids": "I64 is not decoded",
        "block.norm.weight": "no matrix",
        "block.odd.weight": "rows of 40, no multiple of 32",
        "block.proj.weight": "",
        "block.router.weight": "a router",
        "block.table": "compressed-tensors holds matrices called .weight only",
        "embed.weight": "transformers reads MXFP4 in linear layers only",
    }
    before = safetensors_file.read(unknown / "model.safetensors")
    after = safetensors_file.read(tmp_path / "out" / "model.safetensors")
    kept = [name for name in before if name != "block.proj.weight"]
    assert set(after) == {*kept, "block.proj.weight_packed", "block.proj.weight_scale"}
    for name in kept:
        assert safetensors_bytes(after[name]) == safetensors_bytes(before[name])
    wanted = mxfp4.quantize(safetensors_file.rows(before["block.proj.weight"]))
    assert torch.equal(safetensors_file.rows(after["block.proj.weight_packed"]), wanted.codes)
    assert torch.equal(safetensors_file.rows(after["block.proj.weight_scale"]), wanted.scales)
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert document["kept"] == [1, 2]
    assert document["quantization_config"]["ignore"] == sorted(
        ["lm_head", "block.cube", "block.ids", "block.odd", "block.router", "block.table", "embed"]
    )
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer_config.json"]  # no code is carried along


def safetensors_bytes(entry: safetensors_file.Entry) -> bytes:
    return entry.path.read_bytes()[entry.offset : entry.offset + entry.nbytes]


def test_an_unknown_architecture_in_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="not tried: a GGUF file of gguf-py's")
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "novel")
    writer.add_custom_alignment(64)
    writer.add_array("novel.list", [1, -2, 3])
    writer.add_float64("novel.number", 0.1)
    writer.add_file_type(1)
    experts = rng.standard_normal((3, 8, 64), dtype=np.float32)
    table = gguf.quantize(rng.standard_normal((8, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up_exps.weight", experts.astype(np.float16))
    writer.add_tensor("token_embd.weight", table, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.scale", np.ones(5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quantise(tmp_path / "in.gguf", tmp_path / "out.gguf")
    read = gguf.GGUFReader(tmp_path / "out.gguf")
    assert read.fields["novel.list"].contents() == [1, -2, 3]
    assert read.fields["novel.number"].contents() == 0.1
    assert read.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_MXFP4_MOE
    assert read.fields["mxharness.quantization"].contents() == "mxfp4 (floor, even)"
    tensors = {tensor.name: tensor for tensor in read.tensors}
    assert all(tensor.data_offset % 64 == 0 for tensor in read.tensors)
    assert tensors["token_embd.weight"].data.tobytes() == table.tobytes()
    assert tensors["blk.0.scale"].data.tobytes() == np.ones(5, np.float32).tobytes()
    wanted = mxfp4.quantize(torch.from_numpy(experts.astype(np.float16)))
    done = tensors["blk.0.ffn_up_exps.weight"]
    assert done.tensor_type == gguf.GGMLQuantizationType.MXFP4
    assert done.data.tobytes() == mxfp4.to_layout(wanted, "gguf").data.numpy().tobytes()


def test_pieces_of_a_large_tensor_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantise(toy.checkpoint(), tmp_path / "float.gguf", only=["*ffn_up*"])
    whole = quantise(tmp_path / "float.gguf", tmp_path / "whole.gguf")
    monkeypatch.setattr("mxharness.model.parts.PIECE", 200)  # three rows of 64
    pieces = quantise(tmp_path / "float.gguf", tmp_path / "pieces.gguf")
    assert [row.sqnr for row in pieces.rows] == [row.sqnr and pytest.approx(row.sqnr, rel=1e-12) for row in whole.rows]
    assert (tmp_path / "pieces.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_patterns_that_fit_nothing_or_too_little(tmp_path: Path, unknown: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"--only 'blk\.\*' fits no tensor; there is, for one, '"):
        quantise(unknown, out, only=["blk.*"])
    with pytest.raises(UserError, match=r"--skip 'none' fits no tensor"):
        quantise(unknown, out, skip=["none"])
    with pytest.raises(UserError, match=r"nothing would be MXFP4 of 8 tensors"):
        quantise(unknown, out, skip=["*.proj.*"])
    with pytest.raises(UserError, match="only llama and gpt_oss can be run"):
        quantise(unknown, tmp_path / "out.gguf")
    with pytest.raises(UserError, match="no scale rule 'up'; there are floor, even, rceil, ceil"):
        quantise(unknown, out, scale_rule="up")
    with pytest.raises(UserError, match=r"a GGUF file's name ends in .gguf"):
        quantise(unknown, out, "gguf")
    floats = replace(toy.stable(toy.GPT_OSS), name="floats")
    with pytest.raises(UserError, match="all its experts in MXFP4 or none; these patterns choose some"):
        quantise(floats, out, skip=["model.layers.0.mlp.experts.down_proj"])
    assert not out.exists()
