"""The gate's statistics against closed forms, its divergence against the sum over all words."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mxharness.gate import divergence, statistics

# Statistics


@pytest.mark.parametrize("freedom", [1, 2, 3, 10, 63, 591])
def test_students_t_is_the_incomplete_beta_function(freedom):
    mpmath = pytest.importorskip("mpmath", reason="not compared: Student's t with mpmath's")
    for t in (-30.0, -2.5, -0.1, 0.0, 0.7, 1.67, 12.0):
        tail = float(mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True)) / 2
        assert statistics.student_cdf(t, freedom) == pytest.approx(tail if t < 0 else 1 - tail, abs=1e-13)
    quantile = statistics.student_quantile(0.95, freedom)
    assert statistics.student_cdf(quantile, freedom) == pytest.approx(0.95, abs=1e-12)


def test_windows_are_the_units():
    generator = np.random.default_rng(0)
    means = generator.normal(size=12)
    found = statistics.clustered(means * 255, np.full(12, 255.0))
    assert found.mean == pytest.approx(means.mean(), rel=1e-12)
    assert found.error == pytest.approx(means.std(ddof=1) / math.sqrt(12), rel=1e-12)
    assert found.upper - found.mean == pytest.approx(1.795884818704043 * found.error, rel=1e-12)
    assert (found.windows, found.tokens) == (12, 12 * 255)
    short = statistics.clustered(np.array([100.0, 1.0]), np.array([100.0, 1.0]))
    assert (short.mean, short.error) == (1.0, 0.0)
    one = statistics.clustered(np.array([3.0]), np.array([10.0]))
    assert (one.lower, one.upper) == (-math.inf, math.inf)


def test_holm_is_the_step_down_procedure():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0]
    assert statistics.holm([0.02]) == [0.02]


# Divergence


def pair(scale, rows=400, words=700):
    generator = torch.Generator().manual_seed(0)
    p = 3 * torch.randn(rows, words, generator=generator)
    return p, p + scale * torch.randn(rows, words, generator=generator)


@pytest.mark.parametrize("scale", [1e-3, 0.05, 0.3, 2.0])
def test_the_estimate_is_unbiased_and_the_bound_a_bound(scale):
    p, q = pair(scale)
    p_log, q_log = p.double().log_softmax(-1), q.double().log_softmax(-1)
    kl = (p_log.exp() * (p_log - q_log)).sum(-1)
    full = divergence.in_full(p, q)
    assert (full.kl - kl).abs().max() <= 1e-6 + 1e-5 * scale
    found = [divergence.from_cells(divergence.cells(p, 16, 8, seed), q) for seed in range(24)]
    estimates = torch.stack([each.kl.mean() for each in found])
    error = float(estimates.std() / math.sqrt(len(found)))
    assert abs(float(estimates.mean() - kl.mean())) <= 4 * error + 1e-9
    assert (found[0].bound <= kl + 1e-6).all()
    assert 0 < found[0].bound.mean() < 0.9 * kl.mean()  # so the estimate, not the bound, is what is judged
    assert torch.equal(full.same, p.argmax(-1) == q.argmax(-1))
    assert torch.equal(found[0].same, full.same)


def test_a_small_vocabulary_is_stored_whole():
    p, q = pair(0.1, words=40)
    cells = divergence.cells(p, 64, 16, 0)
    assert (cells.top.shape[1], cells.drawn.shape[1]) == (40, 0)
    found, full = divergence.from_cells(cells, q), divergence.in_full(p, q)
    assert (found.kl - full.kl).abs().max() <= 1e-6
    assert (found.bound - full.kl).abs().max() <= 1e-6


def test_a_candidate_that_is_the_reference_has_no_divergence():
    p, _ = pair(0.0)
    for found in (divergence.in_full(p, p), divergence.from_cells(divergence.cells(p, 16, 8, 0), p)):
        assert found.kl.abs().max() == 0
        assert found.bound.abs().max() <= 1e-6
        assert found.same.all()
