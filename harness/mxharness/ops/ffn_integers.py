"""Inputs of feed-forward layers, and of what follows a gate, all of whose projections are sums of integers.

A projection's sum is exact where its input is an integer multiple of one quantum. An activation's output is that only
where its curve is straight: numbers so far from zero that gelu is the identity or 0, and the sigmoid 1 or 0. So the
scales of the weight before it are raised until the smallest result but 0 lies there.
"""

from __future__ import annotations

import numpy as np
import torch

from mxharness import regimes
from mxharness.op import Case, Tensors

GELU = 5
"""Up's scales times 2^5: results are multiples of 16, where 1 + erf is 2 or 0 in float64 too."""
GATE = {"bf16": 8, "fp16": 6}
"""The gate's: multiples of 128, whose e^-x no float32 holds, or of 32: then half holds no smaller result than 0."""
UP = -8
"""Up's beside a gate, so that the product of both stays in half's range."""
DOWN = -6
"""Down's, for the same reason."""
SPREAD = 1
"""Between the exponents of scales: longer sums would round, a result's integers having more digits than an input's."""


def inputs(case: Case, M: int, K: int, I: int, gated: bool, normed: bool) -> dict[str, torch.Tensor]:  # noqa: E741  the intermediate size
    """X (M, K), and codes and scales of up and gate (I, K) and down (K, I); with a norm what it takes, too.

    Most gates are positive, as four columns of x and of the gate's weight are: a negative one leaves nothing.
    """
    found = _normalised(case, M, K) if normed else {"x": regimes.activations(case, (M, K))}
    if gated and not normed:
        found["x"] = found["x"].clamp(-1, 1)
        found["x"][:, :4] = 1
    shifts = {"up": UP, "gate": GATE[case.dtype], "down": DOWN} if gated else {"up": GELU, "down": DOWN}
    for name, shift in shifts.items():
        shape = (K, I) if name == "down" else (I, K)
        codes, scales = regimes.integer_weights(case, shape, name, SPREAD, shift)
        if name == "gate":
            codes[:, :2] = 0x77  # 6, four times
        found |= {f"{name}_codes": codes, f"{name}_scales": scales}
    return found


def biases(case: Case, K: int, I: int) -> Tensors:  # noqa: E741
    """Of up (I) and down (K), float32, multiples of what their sums are multiples of."""
    return {"up_bias": regimes.bias(case, I, "up_bias") * 2.0 ** (GELU - 1), "down_bias": regimes.bias(case, K, "down")}


def _normalised(case: Case, M: int, K: int) -> dict[str, torch.Tensor]:
    """X, residual, and a norm's parameters: each row's sum is plus or minus one power of two, its mean 0.

    So its norm is plus or minus the weight but for eps, and rounds to that; with a bias, an odd number next to even
    weights, to their sum.
    """
    rng = regimes.generator(case, "stream")
    signs = np.stack([rng.permutation(np.resize([1.0, -1.0], K - 8)) for _ in range(M)])
    ends = np.array([1.0] * 4 + [-1.0] * 4)
    whole = np.concatenate([np.broadcast_to(ends[:4], (M, 4)), signs, np.broadcast_to(ends[4:], (M, 4))], 1)
    stream = torch.from_numpy(np.ldexp(whole, rng.integers(0, 3, (M, 1))))
    found = {}
    if "residual" in case.options:
        found["residual"] = regimes.activations(case, (M, K), "residual")
        stream = stream - found["residual"].double()
    found["x"] = stream.to(regimes.DTYPES[case.dtype])
    weight = rng.choice([2.0, 4.0], K)
    found["norm_weight"] = torch.from_numpy(weight).to(torch.float32)
    if "layer" in case.options:
        found["norm_bias"] = torch.from_numpy(rng.choice([-1.0, 1.0], K)).to(torch.float32)
    return found
