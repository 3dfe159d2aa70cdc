"""A linear layer and its activation as one module."""

from __future__ import annotations

import math
from typing import Self

import torch

from mxharness import functional
from mxharness.errors import UserError
from mxharness.functional.common import device_of, single
from mxharness.functional.ffn import GELU, hidden_layer
from mxharness.nn.linear import MXFP4Linear, rows_of

ACTIVATIONS = ("swiglu", *GELU)


class MXFP4LinearWithActivation(torch.nn.Module):
    """f(x W^T + bias) for x (.., in_features); out_features are the rows of W, as in torch.nn.Linear.

    activation: "swiglu" as gpt-oss has it (alpha, swiglu_limit and the "+1" of `functional.swiglu`), "gelu" (with erf)
    or "gelu_tanh". SwiGLU takes the product's columns in pairs, gate first, so out_features is even and y is
    (.., out_features / 2); after the others it is (.., out_features). The product is rounded to x's dtype and
    activated in float32; of a float32 x swiglu takes the unrounded sums, the others compute in compute_dtype. The rest
    is as in `MXFP4Linear`, which holds the weight as `linear`.

    Raises UserError for an activation that does not exist, odd out_features with swiglu, and as `MXFP4Linear`.
    Source: openai/gpt-oss, gpt_oss/torch/model.py.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str = "swiglu",
        swiglu_limit: float = 7.0,
        alpha: float = 1.702,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype = torch.bfloat16,
        scale_rule: str = "floor",
        tie_rule: str = "even",
    ) -> None:
        linear = MXFP4Linear(
            in_features, out_features, bias, device=device, dtype=dtype, compute_dtype=compute_dtype,
            scale_rule=scale_rule, tie_rule=tie_rule,
        )  # fmt: skip
        self._hold(linear, activation, swiglu_limit, alpha)

    @classmethod
    def around(
        cls, linear: MXFP4Linear, *, activation: str = "swiglu", swiglu_limit: float = 7.0, alpha: float = 1.702
    ) -> Self:
        """The activation behind a layer that exists, such as `MXFP4Linear.from_linear(...)`."""
        self = cls.__new__(cls)
        self._hold(linear, activation, swiglu_limit, alpha)
        return self

    def _hold(self, linear: MXFP4Linear, activation: str, swiglu_limit: float, alpha: float) -> None:
        super().__init__()
        if not isinstance(linear, MXFP4Linear):
            raise UserError(f"an activation goes around an MXFP4Linear, not {type(linear).__name__}")
        check_activation(activation, ACTIVATIONS, linear.out_features, swiglu_limit, alpha)
        self.linear = linear
        self.activation = activation
        self.swiglu_limit = swiglu_limit
        self.alpha = alpha

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Y (.., out_features / 2) or (.., out_features) of x (.., in_features), of x's dtype."""
        if self.activation == "swiglu":
            return gated(self.linear(x), self.alpha, self.swiglu_limit)
        rows = rows_of(x, self.linear.in_features, self.linear.compute_dtype)
        if rows.shape[0] == 0:
            return x.new_empty((*x.shape[:-1], self.linear.out_features))
        device = device_of(rows, None)
        y = hidden_layer(device, rows, None, self.linear.packed, self.linear.bias, self.activation)["activated"]
        return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        limits = f", swiglu_limit={self.swiglu_limit}, alpha={self.alpha}" if self.activation == "swiglu" else ""
        return f"activation={self.activation}{limits}"


def check_activation(activation: str, known: tuple[str, ...], N: int, limit: float, alpha: float) -> None:
    """UserError unless N columns can go through the activation."""
    if activation not in known:
        raise UserError(f"no activation '{activation}'; there are {', '.join(known)}")
    if activation == "swiglu" and N % 2:
        raise UserError(f"swiglu takes columns in pairs, gate and up; {N} out_features are no pairs")
    if not math.isfinite(single(alpha, "alpha")):
        raise UserError(f"alpha must be a number, not {alpha}")
    if not single(limit, "swiglu_limit") > 0:
        raise UserError(f"swiglu_limit must be positive, not {limit}")


def gated(y: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """SwiGLU of columns in pairs: (.., 2 I) to (.., I)."""
    half = (*y.shape[:-1], y.shape[-1] // 2)
    if y.numel() == 0:
        return y.new_empty(half)
    return functional.swiglu(y.view(-1, y.shape[-1]), alpha=alpha, limit=limit, interleaved=True).view(half)
