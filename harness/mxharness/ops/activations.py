"""References of activation.cuh in float64, with what its roundings may do to first order.

With u the unit roundoff, f(a) computed from a (1 + n u) errs by n u |a f'(a)|; the elementary functions themselves err
by 2 u a unit in the last place (ULP of elementary.py): 2.1 u for tanh, 2 u for erf, 3 u for the sigmoid. What
a sigmoid loses among the subnormal numbers, half a unit of 2^-149 more, its factors may carry up again: that is slack.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from mxharness.bounds import Bounded, apply, gamma
from mxharness.op import Expected

Activation = Callable[..., tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]]
"""From float64 arguments: value, magnitude, chain and slack."""

_TINY = 2.0**-149


def gelu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """X (1 + erf(x / sqrt(2))) / 2: three roundings cover each of the argument's 2, erf's 2, the sum's and product's.

    The argument's are a constant's and a product's.
    """
    a = x / math.sqrt(2)
    erf, slope = torch.special.erf(a), 2 / math.sqrt(math.pi) * (-a.square()).exp()
    value = x / 2 * (1 + erf)
    magnitude = (x / 2).abs() * ((a * slope).nan_to_num(0.0) + erf.abs() + (1 + erf))
    return value, magnitude, 3, torch.zeros_like(x)


def gelu_tanh(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """X (1 + tanh(t)) / 2, t = sqrt(2 / pi) (x + 0.044715 x^3): t carries six roundings, all its terms of one sign."""
    t = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    tanh = torch.tanh(t)
    value = x / 2 * (1 + tanh)
    magnitude = (x / 2).abs() * (2 * (t.abs() / t.cosh().square()).nan_to_num(0.0) + tanh.abs() + (1 + tanh))
    return value, magnitude, 3, torch.zeros_like(x)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Silu(gate) up = gate / (1 + e^-gate) up: the sigmoid's 3 roundings and two products."""
    value = gate * torch.sigmoid(gate) * up
    return value, value.abs(), 5, _TINY * (2 * gate.abs() + 1) * up.abs()


def swiglu_limited(
    gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float
) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Silu with alpha, times up + 1: g / (1 + e^(-alpha g)) (u + 1), g = min(gate, limit), u = up within +-limit.

    Beside the argument's one rounding there are six: the sigmoid's 3, u + 1, two products.
    """
    limit = float(np.float32(limit))
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    a = float(np.float32(alpha)) * g
    sigmoid = torch.sigmoid(a)
    value = g * sigmoid * (u + 1)
    magnitude = value.abs() * (1 + (a.abs() * torch.sigmoid(-a)).nan_to_num(0.0) / 6)
    return value, magnitude, 6, _TINY * (2 * g.abs() + 1) * (u + 1).abs()


def expected(function: Activation, dtype: torch.dtype, *arguments: torch.Tensor) -> Expected:
    """The reference for an output of `dtype` from the exact arguments."""
    value, magnitude, chain, slack = function(*(argument.double() for argument in arguments))
    return Expected(value, magnitude, chain, dtype, slack)


def carried(function: Activation, *arguments: Bounded) -> Bounded:
    """The function of uncertain arguments, its own roundings added, before it is stored."""
    _, magnitude, chain, slack = function(*(argument.value for argument in arguments))
    return apply(lambda *exact: function(*exact)[0], *arguments, roundoff=gamma(chain) * magnitude + slack)
