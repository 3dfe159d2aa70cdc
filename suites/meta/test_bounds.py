"""Propagated bounds hold for what they claim to bound, and are not many times larger."""

from __future__ import annotations

import pytest
import torch
from mxharness import bounds
from mxharness.bounds import Bounded


def noisy(x: Bounded, generator: torch.Generator) -> torch.Tensor:
    """A value at an end of its interval or inside it."""
    where = torch.rand(x.value.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return x.value + x.error * torch.where(where.abs() > 0.5, where.sign(), where)


def bounded(shape, generator, size=1e-3):
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return Bounded(x, size * torch.rand(shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("K", [1, 33, 257])
def test_a_contraction_in_float32_stays_within_its_error(K):
    generator = torch.Generator().manual_seed(K)
    x, w = bounded((5, K), generator), torch.randn((7, K), generator=generator).double()
    w = w.float().double()
    found = bounds.contraction(x, w, chain=K + 1)  # one for x itself, which is rounded to float32 below
    worst = torch.zeros(5, 7)
    for _ in range(50):
        moved = noisy(x, generator)
        y = torch.zeros(5, 7)
        for k in range(K):
            y += moved[:, k, None].float() * w[:, k].float()
        worst = torch.maximum(worst, ((y.double() - found.value).abs() / found.error).float())
    assert 0.05 < worst.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_adds_half_a_unit(dtype):
    x = bounds.exact(torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    found = bounds.rounded(x, dtype)
    ratio = (x.value.to(dtype).double() - x.value).abs() / found.error
    assert 0.9 < ratio.max() <= 1


@pytest.mark.parametrize("function", [torch.tanh, torch.erf, torch.nn.functional.silu, torch.nn.functional.gelu])
def test_an_elementwise_function_stays_within_its_error(function):
    generator = torch.Generator().manual_seed(1)
    x = bounded((20_000,), generator, size=0.1)
    found = bounds.apply(function, x, roundoff=1e-9)
    ratio = torch.stack([(function(noisy(x, generator)) - found.value).abs() / found.error for _ in range(20)])
    assert 0.8 < ratio.max() <= 1


def test_a_product_takes_both_errors():
    generator = torch.Generator().manual_seed(2)
    a, b = bounded((5000,), generator, size=0.1), bounded((5000,), generator, size=0.2)
    found = bounds.apply(torch.mul, a, b)
    ratio = torch.stack(
        [(noisy(a, generator) * noisy(b, generator) - found.value).abs() / found.error for _ in range(50)]
    )
    assert 0.8 < ratio.max() <= 1
