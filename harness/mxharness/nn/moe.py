"""A mixture of experts as gpt-oss has it: an unquantised router and two stacks of MXFP4 experts."""

from __future__ import annotations

from typing import Self

import torch

from mxharness import functional
from mxharness.errors import UserError
from mxharness.functional.common import check_pair, integer
from mxharness.functional.moe import MAX_CHOSEN, MAX_EXPERTS
from mxharness.mxfp4 import BLOCK, Quantized
from mxharness.nn.activation import check_activation, gated
from mxharness.nn.linear import rows_of
from mxharness.nn.packed import PackedModule, check_place, check_sizes, pack


class MXFP4Experts(PackedModule):
    """E linear layers (E, N, K) in one module: y_e (E, .., N) = f(x W_e^T + bias_e) for x (.., K), K % 32 == 0.

    activation: None, or "swiglu" as in `MXFP4LinearWithActivation` (y is (E, .., N / 2)). Alone it gives every
    expert's output; `MXFP4MoE` computes only those that the router chooses. Buffers: codes (E, N, K/2), scales
    (E, N, K/32) uint8, bias (E, N) float32. A new module has `torch.nn.Linear`'s random weights for each expert.
    Raises UserError as `MXFP4Linear`, and for K that is no multiple of 32.
    """

    bias: torch.Tensor

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        activation: str | None = None,
        swiglu_limit: float = 7.0,
        alpha: float = 1.702,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype = torch.bfloat16,
        scale_rule: str = "floor",
        tie_rule: str = "even",
    ) -> None:
        check_sizes(num_experts=num_experts, in_features=in_features, out_features=out_features)
        check_place(device, dtype)
        if in_features % BLOCK:
            raise UserError(f"experts' in_features must be a multiple of {BLOCK}, not {in_features}")
        weights, biases = [], []
        for _ in range(num_experts):  # one at a time: all of them unquantised may not fit
            fresh = torch.nn.Linear(in_features, out_features, device=device, dtype=dtype)
            weights.append(pack(fresh.weight.detach(), scale_rule, tie_rule))
            biases.append(fresh.bias.detach())
        weight = Quantized(*(torch.stack(parts) for parts in zip(*weights, strict=True)))
        self._hold(weight, torch.stack(biases), fresh.weight.dtype, activation, swiglu_limit, alpha, compute_dtype)

    @classmethod
    def from_quantized(
        cls,
        weight: Quantized,
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        activation: str | None = None,
        swiglu_limit: float = 7.0,
        alpha: float = 1.702,
        compute_dtype: torch.dtype = torch.bfloat16,
    ) -> Self:
        """A module that holds these codes (E, N, K/2) and scales (E, N, K/32), not copies; no bias is zeros (E, N)."""
        weight = check_pair(weight)
        if weight[0].ndim != 3:
            raise UserError(f"experts' codes are (E, N, K/2), not {tuple(weight[0].shape)}")
        self = cls.__new__(cls)
        bias = torch.zeros(weight[0].shape[:2], device=weight[0].device) if bias is None else bias
        self._hold(weight, bias, dtype, activation, swiglu_limit, alpha, compute_dtype)
        return self

    def _hold(
        self,
        weight: Quantized,
        bias: torch.Tensor,
        dtype: torch.dtype | None,
        activation: str | None,
        swiglu_limit: float,
        alpha: float,
        compute_dtype: torch.dtype,
    ) -> None:
        columns = weight[0].shape[-1] * 2
        PackedModule.__init__(self, weight, columns, dtype, bias)
        if activation is not None:
            check_activation(activation, ("swiglu",), self.codes.shape[1], swiglu_limit, alpha)
        if compute_dtype not in functional.ACTIVATIONS:
            raise UserError(f"compute_dtype must be torch.bfloat16 or torch.float16, not {compute_dtype}")
        self.activation = activation
        self.swiglu_limit = swiglu_limit
        self.alpha = alpha
        self.compute_dtype = compute_dtype

    @property
    def num_experts(self) -> int:
        """E."""
        return self.codes.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Y (E, .., N) or (E, .., N / 2) of x (.., K), of x's dtype."""
        E, N = self.bias.shape
        rows = rows_of(x, self.columns, self.compute_dtype)
        out_dtype = torch.float32 if x.dtype == torch.float32 else None
        if rows.shape[0] == 0:
            y = rows.new_empty((E, 0, N), dtype=x.dtype)
        else:
            y = functional.gemm_batch(rows, self.packed, self.bias, out_dtype=out_dtype)
        y = y.view(E, *x.shape[:-1], N)
        return y if self.activation is None else gated(y, self.alpha, self.swiglu_limit)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        E, N = self.bias.shape
        return f"{E} experts, in_features={self.columns}, out_features={N}, activation={self.activation}"


class MXFP4MoE(torch.nn.Module):
    """Y (.., H) of x (.., H): the router's k best experts for each row, weighted, by `functional.moe_forward`.

    gate: torch.nn.Linear(H, E), not quantised; mlp1: experts (E, 2 I, H) with swiglu; mlp2: experts (E, H, I). A
    float32 x is rounded to mlp1's compute_dtype, and the result is as precise as that. Raises UserError for layers that
    do not fit together.
    """

    def __init__(self, gate: torch.nn.Linear, mlp1: MXFP4Experts, mlp2: MXFP4Experts, experts_per_token: int) -> None:
        super().__init__()
        if not isinstance(gate, torch.nn.Linear) or not all(isinstance(one, MXFP4Experts) for one in (mlp1, mlp2)):
            given = ", ".join(type(one).__name__ for one in (gate, mlp1, mlp2))
            raise UserError(f"a block is a torch.nn.Linear and two MXFP4Experts, not {given}")
        E, H = mlp1.num_experts, mlp1.columns
        wanted = {
            "gate": ((gate.out_features, gate.in_features), (E, H)),
            "mlp2": (tuple(mlp2.bias.shape), (E, H)),
            "mlp1": (tuple(mlp1.bias.shape), (E, 2 * mlp2.columns)),
        }
        for name, (shape, right) in wanted.items():
            if shape != right:
                raise UserError(f"{name} must give {right} experts and features, not {shape}")
        if mlp1.activation != "swiglu" or mlp2.activation is not None:
            raise UserError(f"mlp1 needs swiglu and mlp2 none, not {mlp1.activation} and {mlp2.activation}")
        _check_chosen(experts_per_token, E)
        self.gate, self.mlp1, self.mlp2 = gate, mlp1, mlp2
        self.experts_per_token = experts_per_token

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Y (.., H), of x's dtype; no rows give no rows."""
        rows = rows_of(x, self.mlp1.columns, self.mlp1.compute_dtype)
        if rows.shape[0] == 0:
            return torch.empty_like(x)
        bias = self.gate.bias
        y = functional.moe_forward(
            rows,
            self.gate.weight.detach().to(rows.dtype),
            bias.detach().float() if bias is not None else torch.zeros(self.mlp1.num_experts, device=x.device),
            self.mlp1.packed,
            self.mlp1.bias,
            self.mlp2.packed,
            self.mlp2.bias,
            k=self.experts_per_token,
            alpha=self.mlp1.alpha,
            limit=self.mlp1.swiglu_limit,
        )
        return y.view(x.shape).to(x.dtype)


def create_quantized_mlp_block(
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    experts_per_token: int,
    *,
    swiglu_limit: float = 7.0,
    alpha: float = 1.702,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    scale_rule: str = "floor",
    tie_rule: str = "even",
) -> tuple[torch.nn.Linear, MXFP4Experts, MXFP4Experts]:
    """The layers of gpt-oss' MLP block with random weights: (gate, mlp1, mlp2), for `MXFP4MoE` or alone.

    gate: an unquantised torch.nn.Linear(hidden_size, num_experts) of `dtype`, the router; mlp1: num_experts stacked
    layers hidden_size -> 2 intermediate_size, rows of gate and up in turn, with SwiGLU; mlp2: as many layers
    intermediate_size -> hidden_size. `MXFP4MoE(*layers, experts_per_token)` is the whole block. Both sizes must be
    multiples of 32, num_experts at most 256, experts_per_token at most 8 and num_experts. Raises UserError otherwise.
    """
    check_sizes(hidden_size=hidden_size, intermediate_size=intermediate_size, num_experts=num_experts)
    check_place(device, dtype)
    _check_chosen(experts_per_token, num_experts)
    if hidden_size % BLOCK or intermediate_size % BLOCK:
        raise UserError(
            f"hidden_size and intermediate_size must be multiples of {BLOCK}, not {hidden_size} and {intermediate_size}"
        )
    gate = torch.nn.Linear(hidden_size, num_experts, device=device, dtype=dtype).requires_grad_(requires_grad=False)
    mlp1 = MXFP4Experts(
        num_experts, hidden_size, 2 * intermediate_size, activation="swiglu", swiglu_limit=swiglu_limit, alpha=alpha,
        device=device, dtype=dtype, scale_rule=scale_rule, tie_rule=tie_rule,
    )  # fmt: skip
    mlp2 = MXFP4Experts(
        num_experts, intermediate_size, hidden_size, device=device, dtype=dtype, scale_rule=scale_rule,
        tie_rule=tie_rule,
    )  # fmt: skip
    return gate, mlp1, mlp2


def _check_chosen(k: int, E: int) -> None:
    if not 0 < integer(k, "experts_per_token") <= min(E, MAX_CHOSEN) or E > MAX_EXPERTS:
        raise UserError(
            f"experts_per_token must be from 1 to {MAX_CHOSEN} and to the number of experts, which is at most "
            f"{MAX_EXPERTS}; not {k} of {E}"
        )
