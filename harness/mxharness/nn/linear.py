"""`torch.nn.Linear` with an MXFP4 weight."""

from __future__ import annotations

from typing import Self

import torch
from torch.nn import functional as torch_functional

from mxharness import functional
from mxharness.errors import UserError
from mxharness.functional.common import check_pair, check_tensor
from mxharness.mxfp4 import BLOCK, Quantized
from mxharness.nn.packed import DTYPES, PackedModule, check_place, check_sizes, pack


class MXFP4Linear(PackedModule):
    """y (.., out_features) = x (.., in_features) W^T + bias, in the dtype of x: the bits of `functional.gemm`.

    bfloat16 and float16 are multiplied as they are. A float32 x is rounded to `compute_dtype` (bfloat16 or float16)
    and the float32 sums are returned unrounded. in_features that are no multiple of 32 are padded with zeros. Buffers:
    codes (N, Kp/2) and scales (N, Kp/32) uint8, bias (N) float32 or None.

    A new module has `torch.nn.Linear`'s random weights, rounded by scale_rule and tie_rule (see `mxfp4.quantize`);
    dtype is theirs before that, and what `weight` is given in. Raises UserError for sizes that are not positive and
    for dtypes and rules that do not exist; forward, for inputs of another width or dtype, and for one that wants a
    gradient: the module is for inference.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype = torch.bfloat16,
        scale_rule: str = "floor",
        tie_rule: str = "even",
    ) -> None:
        check_sizes(in_features=in_features, out_features=out_features)
        check_place(device, dtype)
        fresh = torch.nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        weight = pack(fresh.weight.detach(), scale_rule, tie_rule)
        super().__init__(weight, in_features, fresh.weight.dtype, fresh.bias)
        self._set_compute_dtype(compute_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: torch.nn.Linear,
        *,
        compute_dtype: torch.dtype = torch.bfloat16,
        scale_rule: str = "floor",
        tie_rule: str = "even",
    ) -> Self:
        """A module with the weight of `linear` (which stays as it is) in MXFP4 and its bias in float32.

        Raises UserError for another type, and for weights that hold NaN or Inf.
        """
        if not isinstance(linear, torch.nn.Linear):
            raise UserError(f"from_linear takes a torch.nn.Linear, not {type(linear).__name__}")
        return cls.from_quantized(
            pack(linear.weight.detach(), scale_rule, tie_rule),
            linear.bias,
            in_features=linear.in_features,
            dtype=linear.weight.dtype,
            compute_dtype=compute_dtype,
        )

    @classmethod
    def from_quantized(
        cls,
        weight: Quantized,
        bias: torch.Tensor | None = None,
        *,
        in_features: int | None = None,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype = torch.bfloat16,
    ) -> Self:
        """A module that holds these codes (N, K/2) and scales (N, K/32), not copies; in_features defaults to K.

        Raises UserError for tensors that do not belong together.
        """
        weight = check_pair(weight)
        if weight[0].ndim != 2:
            raise UserError(f"a linear layer's codes are (N, K/2), not {tuple(weight[0].shape)}")
        self = cls.__new__(cls)
        columns = weight[0].shape[1] * 2 if in_features is None else in_features
        PackedModule.__init__(self, weight, columns, dtype, bias)
        self._set_compute_dtype(compute_dtype)
        return self

    def _set_compute_dtype(self, dtype: torch.dtype) -> None:
        if dtype not in functional.ACTIVATIONS:
            raise UserError(f"compute_dtype must be torch.bfloat16 or torch.float16, not {dtype}")
        self.compute_dtype = dtype

    @property
    def in_features(self) -> int:
        """K."""
        return self.columns

    @property
    def out_features(self) -> int:
        """N."""
        return self.codes.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Y (.., out_features) of x (.., in_features), of x's dtype; no rows give no rows."""
        rows = rows_of(x, self.in_features, self.compute_dtype)
        out_dtype = torch.float32 if x.dtype == torch.float32 else None
        if rows.shape[0] == 0:
            y = rows.new_empty((0, self.out_features), dtype=out_dtype or rows.dtype)
        elif self.bias is None:
            y = functional.gemm(rows, self.packed, out_dtype=out_dtype)
        else:
            y = functional.gemm_bias(rows, self.packed, self.bias, out_dtype=out_dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"dtype={self.dtype}, compute_dtype={self.compute_dtype}"
        )


def rows_of(x: torch.Tensor, columns: int, compute_dtype: torch.dtype) -> torch.Tensor:
    """X (.., K) as the kernels take it: (M, Kp) bf16 or fp16, contiguous, aligned, padded with zeros.

    Raises UserError for another width or dtype, and for an x that wants a gradient.
    """
    check_tensor(x, "x")
    if x.requires_grad and torch.is_grad_enabled():
        raise UserError("MXFP4 modules are for inference and x requires a gradient; call them under torch.no_grad()")
    if x.dtype not in DTYPES:
        raise UserError(f"x must be {', '.join(map(str, DTYPES))}, not {x.dtype}")
    if x.ndim == 0 or x.shape[-1] != columns:
        raise UserError(f"x must be (.., {columns}), not {tuple(x.shape)}")
    rows = x.detach().reshape(-1, columns) if x.numel() else x.detach().new_empty((0, columns))
    rows = rows.to(compute_dtype) if x.dtype == torch.float32 else rows
    if columns % BLOCK:
        rows = torch_functional.pad(rows, (0, -columns % BLOCK))
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows
