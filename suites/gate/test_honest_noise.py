"""An honest candidate's noise, which widens the limit, and what is none."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from mxharness.gate import noise
from mxharness.model import toy
from mxharness.model.checkpoint import values

from .made import CPU, windows


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_overflows_is_no_noise(value):
    honest = windows(0.0, 0.01, kl=2e-3)
    assert noise.level(honest) == pytest.approx(2e-3)
    broken = replace(honest[5], kl=np.where(np.arange(255) == 7, value, 2e-3))
    assert noise.level([*honest[:5], broken, *honest[6:]]) == 0


def test_a_candidate_with_other_words_is_no_honest_one():
    """Its KL, were it noise, would widen the limit to 20 nats."""
    assert noise.level(windows(6.4, 0.01, kl=6.65, same=0.016)) == 0
    assert noise.level(windows(0.0, 0.01, kl=6e-3, same=0.96)) == pytest.approx(6e-3)


def test_an_honest_candidate_does_not_overflow_in_its_norms(reading):
    """States past 256, whose squares are no fp16: the norm is float32 inside, as on the kernels."""
    model = toy.checkpoint()
    wide = values(model.tensors["embedding"]) * 3000
    tensors = {**model.tensors, "embedding": replace(model.tensors["embedding"], read=lambda: wide)}
    large = replace(model, tensors=tensors, config=replace(model.config))
    runner = noise.honest(large, "fp16", CPU)
    states = runner.hidden_states(torch.from_numpy(reading.ids[None, :32].astype(np.int64)))
    assert states.dtype == torch.float16
    assert states.isfinite().all()
    assert (states.double().square().mean(-1) > 0.01).all()  # what overflows is divided by infinity
