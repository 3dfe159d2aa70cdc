"""Models that must pass and weights that must fail: the toy, and the embedded model beside its baseline."""

from __future__ import annotations

import pytest
import torch
from mxharness import perplexity, text
from mxharness.gate import compared, defects, judged, sequence, stored, verdict
from mxharness.model import embedded, reference, toy
from mxharness.protocols import select

from .made import RULES


def through_the_gate(reading, healthy, spoilt):
    candidate = compared.together(reference.float32(healthy), reference.float32(spoilt), reading.ids)
    return sequence.run(reading.available[:12], [(candidate, RULES)])[0]


def test_the_same_bytes_pass(reading):
    healthy = defects.quantised(toy.checkpoint(), defects.everything)
    found = through_the_gate(reading, healthy, healthy)
    assert (found.verdict, found.divergence.mean, found.change.mean, found.same) == ("pass", 0.0, 0.0, 1.0)


@pytest.mark.parametrize("name", ["ties-away", "flipped-codes", "other-scale-rule"])
def test_spoilt_weights_fail(reading, name):
    model = toy.checkpoint()
    healthy, spoilt = (defects.quantised(model, defects.everything, d) for d in (None, defects.DEFECTS[name]))
    found = through_the_gate(reading, healthy, spoilt)
    assert found.verdict == "fail"
    assert found.divergence.lower > found.limit


def test_defects_are_as_large_as_they_say():
    matrix = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    healthy = defects.quantize(matrix)
    shares = {}
    for name, defect in defects.DEFECTS.items():
        codes, scales = defect.spoil(matrix, torch.Generator().manual_seed(1))
        bits = (codes ^ healthy.codes).to(torch.int64)
        elements = sum(int(((bits >> shift) & 15 != 0).sum()) for shift in (0, 4)) / matrix.numel()
        zero = (codes.reshape(-1, 16) == 0).all(-1).double().mean().item()
        shares[name] = (elements, (scales != healthy.scales).double().mean().item(), zero)
    assert shares["flipped-codes"] == (pytest.approx(0.01, rel=0.05), 0, 0)
    assert shares["doubled-scales"] == (0, pytest.approx(1e-3, rel=0.2), 0)
    assert shares["zeroed-blocks"][1:] == (0, pytest.approx(3e-4, rel=0.6))
    assert shares["ties-away"][0] > 1e-3
    assert shares["ties-away"][1] == 0
    assert shares["other-scale-rule"][1] > 0.05


# The embedded model


@pytest.fixture(scope="module")
def kept():
    return stored.load(stored.find("embedded"))


@pytest.fixture(scope="module")
def tokens():
    return perplexity.read(embedded.embedded(), text.load_text("default"))


def test_the_embedded_model_passes_its_baseline(device):
    found = judged.judge_model(
        embedded.embedded(), text.load_text("default"), device, ("fp16",), "windows-512-half", windows=4,
        baseline="embedded", original=embedded.embedded(original=True),
    )  # fmt: skip
    assert found.passed, found.judgements["fp16"].reason
    assert found.cost.lower > 0.02  # of log perplexity: what MXFP4 costs this model is seen


@pytest.mark.parametrize("name", [None, *defects.DEFECTS])
def test_planted_defects_of_the_embedded_model(kept, tokens, name):
    original = embedded.embedded(original=True)
    defect = defects.DEFECTS[name] if name else None
    candidate = reference.float32(defects.quantised(original, defects.everything, defect))
    spans = select(kept.spans, 8 if name == "zeroed-blocks" else 4)  # the rarest defect takes more tokens to be seen
    found = verdict.judge(list(compared.against(kept, candidate, tokens.ids)(spans)), RULES)
    if name is None:
        assert found.verdict == "pass", found.reason
        assert found.divergence.mean < 1e-6
    else:
        assert found.verdict == "fail", found.reason
