"""A stored reference: what it says, which experiments it is no reference of, and files that are none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mxharness.errors import UserError
from mxharness.gate import compared, noise, stored
from mxharness.gate.verdict import Failed
from mxharness.model import reference, toy
from safetensors.numpy import save_file

from .made import CPU


def test_a_stored_reference_says_what_a_run_beside_says(reading, tmp_path):
    model = toy.checkpoint()
    spans = reading.available[:16]
    kept = stored.collect(model, reading, spans, CPU, top=16, drawn=8)
    path = tmp_path / "toy.safetensors"
    stored.save(kept, path)
    again = stored.load(path)
    candidate = noise.honest(model, "bf16", CPU)
    beside = list(compared.together(reference.decoded(model), candidate, reading.ids)(spans))
    for found in (kept, again):
        apart = list(compared.against(found, candidate, reading.ids)(spans))
        for ours, theirs in zip(apart, beside, strict=True):
            assert np.array_equal(ours.candidate, theirs.candidate)
            assert np.array_equal(ours.reference, theirs.reference)
            assert np.array_equal(ours.same, theirs.same)
            assert (ours.bound <= theirs.kl + 1e-6).all()
        kl = [np.mean([window.kl.mean() for window in each]) for each in (apart, beside)]
        assert kl[0] == pytest.approx(kl[1], rel=0.1)
    assert again.cost(again.spans).mean == pytest.approx(kept.cost(kept.spans).mean, rel=1e-12)
    assert path.stat().st_size < 15 * len(spans) * (8 + 6 * 24) + 4000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_sha256": "2" * 64}, "the model is not the baseline's: model_sha256 .* -> 2222"),
        ({"text_sha256": "2" * 64}, "the text is not the baseline's"),
        ({"ids_sha256": "2" * 64}, r"the tokenizer \(the text is the same\) is not the baseline's"),
        ({"protocol": "other"}, "the protocol is not the baseline's: protocol toy -> other"),
    ],
)
def test_another_experiment_is_not_compared(reading, change, message):
    kept = stored.collect(toy.checkpoint(), reading, reading.available[:2], CPU, top=4, drawn=2)
    kept.require(reading, "mxfp4 (floor, even)")
    with pytest.raises(Failed, match=message):
        kept.require(replace(reading, **change), "mxfp4 (floor, even)")
    with pytest.raises(Failed, match="the weights' format is not the baseline's"):
        kept.require(reading, "mxfp4 (even, even)")


def test_files_that_are_no_baseline_are_one_sentence(reading, tmp_path):
    with pytest.raises(UserError, match=r"no gate baseline .*none.safetensors; `mxharness gate create` makes one"):
        stored.load(tmp_path / "none.safetensors")
    path = tmp_path / "toy.safetensors"
    stored.save(stored.collect(toy.checkpoint(), reading, reading.available[:2], CPU, top=4, drawn=2), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is no gate baseline"):
        stored.load(path)
    path.write_bytes(whole.replace(b'"version":"1"', b'"version":"9"'))
    with pytest.raises(UserError, match="of another version"):
        stored.load(path)
    kept = stored.collect(toy.checkpoint(), reading, reading.available[:2], CPU, top=4, drawn=2)
    for name, cut in (("nll", kept.columns["nll"][1:]), ("drawn", kept.columns["drawn"][:, 1:])):
        stored.save(replace(kept, columns={**kept.columns, name: cut}), path)
        with pytest.raises(UserError, match=f"is damaged: {name} is not of 30 rows"):
            stored.load(path)
    cut = np.array([[0, 32], [32, 64]])
    whole = {name: np.ascontiguousarray(column) for name, column in kept.columns.items()}
    save_file({**whole, "windows": cut}, path, {**kept.fixed, "version": "1"})
    with pytest.raises(UserError, match="is damaged: windows is not of three columns"):
        stored.load(path)
    with pytest.raises(UserError, match="no gate baseline 'nothing'; "):
        stored.find("nothing")


def test_a_baseline_whose_noise_is_no_number_is_damaged(reading, tmp_path):
    kept = stored.collect(toy.checkpoint(), reading, reading.available[:2], CPU, top=4, drawn=2)
    for value in ("inf", "nan", "-1", "much"):
        stored.save(replace(kept, fixed={**kept.fixed, "noise_fp16": value}), tmp_path / "toy.safetensors")
        with pytest.raises(UserError, match=f"is damaged: noise_fp16 is {value}, not a finite number of nats"):
            stored.load(tmp_path / "toy.safetensors")
