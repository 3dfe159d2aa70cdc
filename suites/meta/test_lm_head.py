"""Top-p and a sample count exactly: at a boundary one unit of mass, 2^-40 of the largest token's, decides the token.

A few tokens are the right ones when many blocks choose them, by parts of groups in two rounds, three or four.
The judge allows for the rounding of every mass and leaves such a unit open. Here the masses are integers that are known
from the bits of the exponential, and Python's integers say which token is right.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mxharness import mxfp4
from mxharness.functional import lm_head
from mxharness.ops import elementary_bits, sampling

ONE, UNITS = 1 << 40, 1 << 32
"""The largest token's mass; the units that shares are counted in."""


def mass(z: np.ndarray) -> np.ndarray:
    """floor(exp32(z) 2^40), z <= 0."""
    return np.ldexp(elementary_bits.exp(z).astype(np.float64), 40).astype(np.int64)


def logit_of(weight: int) -> np.float32:
    """A logit below 0 of which the kernel makes this mass."""
    near = np.float32(np.log(weight / ONE)).view(np.uint32).astype(np.int64) + np.arange(-64, 65)
    z = near.astype(np.uint32).view(np.float32)
    return z[np.flatnonzero(mass(z) == weight)[0]]


def at_a_boundary(tokens: int, share: int) -> np.ndarray:
    """Two rows of equal tokens and a small last one: the share ends within a unit past, and before, a token's end."""
    short = -tokens * share % UNITS  # of a whole number of tokens, in units of 2^-32
    least = short * ONE // share
    return np.array([[0.0] * tokens + [logit_of(weight)] for weight in (least + 1, least)], dtype=np.float32)


@pytest.mark.parametrize("tokens", [3, 5, 7])
def test_a_sample_is_right_to_the_last_unit(device, tokens):
    step = 1 << 8  # of uniforms, in units of 2^-32
    share = UNITS // tokens // step * step
    z = at_a_boundary(tokens, share)
    ends = mass(z).cumsum(-1).tolist()
    assert ends[0][-1] == ends[1][-1] + 1
    right = [next(i for i, end in enumerate(row) if end > row[-1] * share // UNITS) for row in ends]
    assert right == [1, 0]
    ids, logits = device.empty((2,), torch.int64), device.upload(torch.from_numpy(z))
    uniforms = device.upload(torch.full((2,), share / UNITS))
    device.launch("lm_head.cu", "lm_head_sample", (2,), (32,), ids, logits, uniforms, z.shape[1])
    device.synchronize()
    assert ids.tolist() == right


@pytest.mark.parametrize("tokens", [3, 5, 7])
def test_a_nucleus_is_right_to_the_last_unit(device, tokens):
    share = UNITS // tokens
    z = at_a_boundary(tokens, share)
    ends = mass(z).cumsum(-1).tolist()
    assert ends[0][-1] == ends[1][-1] + 1
    right = [next(i for i, end in enumerate(row) if end >= -(-row[-1] * share // UNITS)) for row in ends]
    assert right == [1, 0]
    last, logits = device.empty((2,), torch.int64), device.upload(torch.from_numpy(z))
    y = device.empty(tuple(z.shape), torch.float32)
    device.launch("lm_head.cu", "lm_head_topp", (2,), (32,), y, last, logits, z.shape[1], np.int64(share))
    device.synchronize()
    assert last.tolist() == right
    assert y.isfinite().sum(-1).tolist() == [2, 1]


@pytest.mark.parametrize(("V", "k"), [(1025, 512), (2049, 1), (4099, 50), (17_000, 256), (40_000, 50)])
def test_tokens_that_many_blocks_choose_are_the_first_in_order(device, V, k):
    """Every logit 17 times, all 0 and all zeros of both signs; then one past float32's range, a NaN, 600 infinities."""
    numbers = torch.Generator().manual_seed(V)
    drawn = torch.randn(-(-V // 17), 32, generator=numbers)
    weight = mxfp4.quantize(drawn.repeat(17, 1)[torch.randperm(V, generator=numbers)])
    scales = weight.scales.clone()
    scales[V // 2] = 254
    broken = scales.clone()
    broken[V // 3] = 255
    codes, many = torch.full_like(weight.codes, 0x22), torch.full_like(weight.scales, 127)
    codes[:600], many[:600] = 0x77, 251  # more of them than k, in fewer groups; of the last row all others are 1024
    x = torch.randn(4, 32, generator=numbers)
    x[1], x[2], x[3] = 0, x[2] * 2.0**-140, 1024 * torch.eye(32)[0]
    x = device.upload(x.bfloat16())
    for these in (weight, (weight.codes, scales), (weight.codes, broken), (codes, many)):
        stored = mxfp4.Quantized(*map(device.upload, these))
        stages = lm_head.logit_stages(x, stored, top_k=k, device=device)
        device.synchronize()
        z, last = stages["logits"].cpu(), stages["top_k_last"].cpu()
        assert torch.equal(last, sampling.top_k(z, k).value)
        right, y = sampling.filtered(z, last), stages["top_k"].cpu()
        assert torch.equal(y.where(~y.isnan(), 7), right.where(~right.isnan(), 7))
        ids = lm_head.greedy_stages(x, stored, device=device)["ids"]
        device.synchronize()
        assert torch.equal(ids.cpu(), sampling.greedy(z).value)
