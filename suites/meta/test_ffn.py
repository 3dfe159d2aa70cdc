"""Norms and feed-forward layers as functions: what they refuse, before anything is launched, and what they share."""

from __future__ import annotations

import math

import pytest
import torch
from mxharness import functional, mxfp4
from mxharness.device import open_device
from mxharness.errors import UserError
from mxharness.execution import Fenced

K, WIDTH = 64, 96


def weight(N, columns):
    return mxfp4.quantize(torch.randn(N, columns, generator=torch.Generator().manual_seed(N)))


X = torch.randn(3, K, generator=torch.Generator().manual_seed(0)).bfloat16()
UP, GATE, DOWN = weight(WIDTH, K), weight(WIDTH, K), weight(K, WIDTH)
ONES = torch.ones(K)


def strided(tensor):
    return tensor.repeat_interleave(2, 1)[:, ::2]


def misaligned(tensor):
    return torch.cat((tensor.flatten()[:1], tensor.flatten()))[1:].reshape(tensor.shape)


REFUSED = {
    "rms_norm": [
        (lambda f, d: f(X.float(), ONES, device=d), "x must be bfloat16 or float16, not torch.float32"),
        (lambda f, d: f(X[:0], ONES, device=d), r"x must be \(M, K\) with at least one row, not \(0, 64\)"),
        (lambda f, d: f(X[0], ONES, device=d), r"x must be \(M, K\) with at least one row, not \(64,\)"),
        (lambda f, d: f(X, ONES[:63], device=d), r"the norm's weight must be float32 of shape \(64,\)"),
        (lambda f, d: f(X, ONES.half(), device=d), r"the norm's weight must be bfloat16 of shape \(64,\)"),
        (lambda f, d: f(X, ONES, 0.0, device=d), "eps must be a positive number, not 0.0"),
        (lambda f, d: f(X, ONES, math.nan, device=d), "eps must be a positive number, not nan"),
        (lambda f, d: f(X, ONES, residual=X.half(), device=d), r"residual must be bfloat16 of shape \(3, 64\)"),
        (lambda f, d: f(X, ONES, residual=X[:2], device=d), r"residual must be bfloat16 of shape \(3, 64\)"),
        (lambda f, d: f(strided(X), ONES, device=d), r"x must be contiguous, it has strides \(128, 2\)"),
        (lambda f, d: f(misaligned(X), ONES, device=d), "x must be 16-byte aligned, its address is 2 past"),
    ],
    "layer_norm": [
        (lambda f, d: f(X, ONES, ONES.bfloat16(), device=d), r"the norm's bias must be float32 of shape \(64,\)"),
        (lambda f, d: f(X, ONES, ONES[:1], device=d), r"the norm's bias must be float32 of shape \(64,\)"),
    ],
    "ffn_forward": [
        (lambda f, d: f(X.float(), UP, DOWN, device=d), "x must be bfloat16 or float16, not torch.float32"),
        (lambda f, d: f(X[:0], UP, DOWN, device=d), r"x must be \(M, K\) with at least one row, not \(0, 64\)"),
        (
            lambda f, d: f(X, DOWN, UP, device=d),
            r"up must be \(64, 64\) to fit down \(96, 64\) and x \(M, 64\), not \(64, 96\)",
        ),
        (lambda f, d: f(X[:, :32].clone(), UP, DOWN, device=d), r"up must be \(96, 32\)"),
        (lambda f, d: f(X, UP, mxfp4.Quantized(DOWN[0], DOWN[1][:, :2]), device=d), "down codes must be"),
        (lambda f, d: f(X, mxfp4.Quantized(UP[0].int(), UP[1]), DOWN, device=d), "up codes and scales must be uint8"),
        (
            lambda f, d: f(X, UP, DOWN, activation="relu", device=d),
            "no activation 'relu' without a gate; there are gelu, gelu_tanh",
        ),
        (lambda f, d: f(X, UP, DOWN, activation="swiglu", device=d), "no activation 'swiglu' without a gate"),
        (lambda f, d: f(strided(X), UP, DOWN, device=d), "x must be contiguous"),
    ],
    "ffn_forward_bias": [
        (lambda f, d: f(X, UP, ONES, DOWN, ONES, device=d), r"up_bias must be float32 of shape \(96,\)"),
        (
            lambda f, d: f(X, UP, torch.ones(WIDTH), DOWN, ONES.half(), device=d),
            r"down_bias must be float32 of shape \(64,\)",
        ),
    ],
    "swiglu_ffn_forward": [
        (lambda f, d: f(X, DOWN, UP, DOWN, device=d), r"gate must be \(96, 64\) to fit down \(64, 96\)"),
    ],
    "ffn_residual": [
        (
            lambda f, d: f(X, UP, weight(32, WIDTH), ONES, device=d),
            "down must give back x's 64 features to be added to it, not 32",
        ),
        (lambda f, d: f(X, UP, DOWN, ONES, gate=GATE, device=d), "no activation 'gelu' with a gate; there are swiglu"),
        (lambda f, d: f(X, UP, DOWN, ONES, norm="batch", device=d), "no norm 'batch'; there are rms, layer"),
        (
            lambda f, d: f(X, UP, DOWN, ONES, norm_bias=ONES, device=d),
            "RMSNorm has no bias; norm_bias is for norm='layer'",
        ),
        (lambda f, d: f(X, UP, DOWN, ONES, eps=-1.0, device=d), "eps must be a positive number, not -1.0"),
        (lambda f, d: f(X, UP, DOWN, ONES, residual=X[:1], device=d), r"residual must be bfloat16 of shape \(3, 64\)"),
    ],
    "swiglu": [
        (lambda f, d: f(X.double(), device=d), "x must be float32, bfloat16 or float16, not torch.float64"),
        (lambda f, d: f(X[:, :63].clone(), device=d), r"x must be \(M, 2 I\) .*, not \(3, 63\)"),
        (lambda f, d: f(X[:0], device=d), r"x must be \(M, 2 I\) .*, not \(0, 64\)"),
        (lambda f, d: f(X, limit=0.0, device=d), "limit must be positive, not 0.0"),
        (lambda f, d: f(X, limit=math.nan, device=d), "limit must be positive, not nan"),
        (lambda f, d: f(X, alpha=math.inf, device=d), "alpha must be a number, not inf"),
        (lambda f, d: f(strided(X), device=d), "x must be contiguous"),
    ],
}


@pytest.mark.parametrize(
    ("name", "call", "message"), [(name, *refused) for name, calls in REFUSED.items() for refused in calls]
)
def test_bad_input_is_one_sentence_before_any_launch(name, call, message):
    watched = Fenced(open_device("host"))
    with pytest.raises(UserError, match=message):
        call(getattr(functional, name), watched)
    assert watched.launches == 0


def test_functions_are_their_stages():
    """The fused functions have the bits of the single ones, called one after another."""
    normed, s = functional.rms_norm(X, ONES, residual=X.flip(0))
    assert torch.equal(s, (X.float() + X.flip(0).float()).bfloat16())
    assert torch.equal(normed, functional.rms_norm(s, ONES))
    gated = functional.swiglu_ffn_forward(normed, GATE, UP, DOWN).double()
    block = functional.ffn_residual(X, UP, DOWN, ONES, gate=GATE, residual=X.flip(0), activation="swiglu").double()
    both = s.double().abs() + gated.abs()
    assert (block - s.double() - gated).abs().le(2.0**-7 * both).all()  # the update is rounded in one of them alone
    biases = torch.zeros(WIDTH), torch.zeros(K)
    with_bias = functional.ffn_forward_bias(X, UP, biases[0], DOWN, biases[1], activation="gelu_tanh")
    assert torch.equal(with_bias, functional.ffn_forward(X, UP, DOWN, activation="gelu_tanh"))
    assert not torch.equal(with_bias, functional.ffn_forward(X, UP, DOWN))


def test_swiglu_reads_both_arrangements_the_same():
    halves = torch.cat((X[:, 0::2], X[:, 1::2]), 1)
    assert torch.equal(functional.swiglu(halves, interleaved=False), functional.swiglu(X))
    assert not torch.equal(functional.swiglu(halves), functional.swiglu(X))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("alpha", "limit"), [(1.702, 7.0), (1.0, 0.75), (-3.0, 1e30)])
def test_swiglu_of_16_bits_is_that_of_float32_rounded(device, kind, alpha, limit):
    """Every gate there is. A GPU decides from approximations where they are enough, of float32 never."""
    gates = torch.arange(1 << 16).to(torch.int32).to(torch.uint16).view(kind)
    ups = torch.tensor([-8.0, -1.0, -0.9961, -0.3301, 0.0, 1e-3, 0.7148, 2.359, 5.281, 7.0, 1e4, float("inf")]).to(kind)
    x = torch.stack(torch.broadcast_tensors(gates, ups[:, None]), -1).reshape(len(ups), -1)
    both = [
        functional.swiglu(device.upload(given), alpha=alpha, limit=limit, device=device).to(kind).cpu()
        for given in (x, x.float())
    ]
    same = (both[0].view(torch.int16) == both[1].view(torch.int16)) | both[0].isnan() & both[1].isnan()
    assert bool(same.all())
