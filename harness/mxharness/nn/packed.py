"""What every module here holds: a weight as MXFP4 buffers, safe against casts, moves, copies and wrong checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch

from mxharness import mxfp4
from mxharness.errors import UserError
from mxharness.functional.common import check_pair, check_tensor, integer
from mxharness.mxfp4 import BLOCK, Quantized

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a model computes in; the kernels multiply the last two."""


class PackedModule(torch.nn.Module):
    """A module with a weight (.., N, K) as buffers codes (.., N, Kp/2) and scales (.., N, Kp/32), uint8, Kp % 32 == 0.

    Buffers, not parameters: nothing here is trained. Casting the module (`half()`, `to(dtype)`) changes `dtype`, the
    dtype that `weight` is given in, and no bit of a buffer. Modules that share buffers still do after a move.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, weight: Quantized, columns: int, dtype: torch.dtype | None, bias: torch.Tensor | None = None
    ) -> None:
        """Columns: K before padding; bias (.., N) becomes float32, as the kernels take it."""
        super().__init__()
        codes, scales = check_pair(weight)
        if codes.dtype != torch.uint8 or scales.dtype != torch.uint8:
            raise UserError(f"codes and scales must be uint8, not {codes.dtype} and {scales.dtype}")
        if (
            min(codes.ndim, scales.ndim) < 2
            or codes.shape != (*scales.shape[:-1], scales.shape[-1] * BLOCK // 2)
            or 0 in codes.shape
        ):
            raise UserError(
                f"codes must be (.., N, K/2) and scales (.., N, K/{BLOCK}) with no size 0, "
                f"not {tuple(codes.shape)} and {tuple(scales.shape)}"
            )
        padded = codes.shape[-1] * 2
        columns = integer(columns, "a number of columns")
        if not padded - BLOCK < columns <= padded:
            raise UserError(f"{columns} columns do not fit codes of {padded}; give {padded - BLOCK + 1} to {padded}")
        if bias is not None:
            check_tensor(bias, "bias")
        if bias is not None and bias.shape != codes.shape[:-1]:
            raise UserError(f"bias must be {tuple(codes.shape[:-1])}, not {tuple(bias.shape)}")
        self.columns = columns
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        if self.dtype not in DTYPES:
            raise UserError(f"a module computes in {', '.join(map(str, DTYPES))}, not {self.dtype}")
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if bias is None else bias.detach().to(torch.float32, copy=True))

    @property
    def packed(self) -> Quantized:
        """The weight as `mxharness.functional` takes it."""
        return Quantized(self.codes, self.scales)

    @property
    def weight(self) -> torch.Tensor:
        """The weight (.., N, K) decoded to `dtype`: a new tensor at each access, for code that asks what it is like.

        Writing to it changes nothing.
        """
        return mxfp4.dequantize(self.codes, self.scales, self.dtype)[..., : self.columns]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """What to(), half(), cuda() and the like do, without casting buffers and without parting shared ones."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        for name, buffer in self._buffers.items():
            if buffer is None:
                continue
            moved = fn(buffer)
            if moved.dtype != buffer.dtype:
                moved = buffer.to(moved.device)
            if "meta" in (buffer.device.type, moved.device.type):
                self._buffers[name] = moved
            else:
                buffer.data = moved  # the same tensor object for all that hold it, as torch does with parameters
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:  # noqa: ANN401
        """Refuse what torch would cast or drop without a word."""
        if f"{prefix}weight" in state_dict:
            raise UserError(
                f"'{prefix}weight' is a float weight and this module holds MXFP4; load the checkpoint into the float "
                f"model and quantise that, with mxharness.nn.quantize_model or {type(self).__name__}'s from_ method"
            )
        for name in ("codes", "scales"):
            found = state_dict.get(f"{prefix}{name}")
            if isinstance(found, torch.Tensor) and found.dtype != torch.uint8:
                raise UserError(f"'{prefix}{name}' must be torch.uint8, the checkpoint has {found.dtype}")
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def check_sizes(**sizes: int) -> None:
    """UserError unless every one is a positive integer."""
    if min(integer(size, name) for name, size in sizes.items()) <= 0:
        names, values = ([*map(str, words)] for words in (sizes, sizes.values()))
        listed = [f"{', '.join(words[:-1])} and {words[-1]}" for words in (names, values)]
        raise UserError(f"{listed[0]} must be positive, not {listed[1]}")


def check_place(device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """UserError unless a module can be made there and of this dtype."""
    if dtype not in (None, *DTYPES):
        raise UserError(f"a module computes in {', '.join(map(str, DTYPES))}, not {dtype}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError):  # torch's answers to an unknown device and to an absent one
        raise UserError(f"no device '{device}' on this machine; torch.device names one such as cpu or cuda") from None


def pack(weight: torch.Tensor, scale_rule: str = "floor", tie_rule: str = "even") -> Quantized:
    """`mxfp4.quantize`, and empty tensors of its shapes for a weight on the meta device."""
    if not weight.is_meta:
        return mxfp4.quantize(
            weight.contiguous(), scale_rule, tie_rule
        )  # of a transposed weight the codes would be too
    blocks = -(-weight.shape[-1] // BLOCK)
    lead = weight.shape[:-1]
    empty = [torch.empty((*lead, blocks * size), dtype=torch.uint8, device="meta") for size in (BLOCK // 2, 1)]
    return Quantized(empty[0], empty[1])
