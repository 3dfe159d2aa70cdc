"""What every function does before it launches: find the device, and refuse bad input in one sentence."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from mxharness.device import Device, open_device
from mxharness.errors import UserError
from mxharness.mxfp4 import BLOCK, Quantized

ACTIVATIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Dtypes that the tensor core multiplies, and what kernels call them."""


@cache
def _opened(name: str) -> Device:
    return open_device(name)


def device_of(x: torch.Tensor, device: Device | None, name: str = "the input") -> Device:
    """`device`, or the one where x lies: the host device for a CPU tensor, the GPU for a CUDA tensor.

    UserError for what is no tensor or no device and for a tensor elsewhere, Unavailable where the device cannot be had.
    """
    check_tensor(x, name)
    if device is not None:
        if not hasattr(device, "launch"):
            raise UserError(f"device must be what mxharness.device.open_device gives, or None, not {device!r}")
        return device
    if x.device.type not in ("cpu", "cuda"):
        raise UserError(f"{name} is on {x.device}; the kernels run on cpu and cuda")
    return _opened("cuda" if x.device.type == "cuda" else "host")


def check_tensor(x: object, name: str) -> None:
    """UserError unless x is a tensor, and a dense one."""
    if not isinstance(x, torch.Tensor):
        raise UserError(f"{name} must be a torch.Tensor, not {type(x).__name__}")
    if x.layout != torch.strided:
        raise UserError(f"{name} must be a dense tensor, not {x.layout}")


def check_pair(weight: Quantized, name: str = "") -> Quantized:
    """The weight, if it is a pair of tensors, codes and scales. UserError otherwise."""
    label = f"{name} " if name else ""
    if not isinstance(weight, Sequence) or isinstance(weight, str) or len(weight) != 2:
        raise UserError(f"{label or 'a '}weight must be a pair Quantized(codes, scales), not {type(weight).__name__}")
    for part, tensor in zip(("codes", "scales"), weight, strict=True):
        check_tensor(tensor, label + part)
    return Quantized(*weight)


def integer(value: object, name: str) -> int:
    """The value as an int. UserError where it is no integer."""
    try:
        return operator.index(value)  # type: ignore[arg-type]  # whether it is one is the question
    except (TypeError, RuntimeError):
        raise UserError(f"{name} must be an integer, not {value!r}") from None


def number(value: object, name: str) -> float:
    """The value as a float. UserError where it is no number."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)  # type: ignore[arg-type]  # whether it is one is the question
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise UserError(f"{name} must be a number, not {value!r}")


def single(value: object, name: str) -> float:
    """The value rounded to float32, as a kernel takes it, Inf where it is too large. UserError for no number."""
    with np.errstate(over="ignore"):
        return float(np.float32(number(value, name)))


def check_tensors(device: Device, **tensors: torch.Tensor | None) -> None:
    """UserError unless every tensor is contiguous and on the device and, but for scale bytes, 16-byte aligned.

    A name with "scales" in it is one of scale bytes.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensor(tensor, name)
        if tensor.device.type != device.torch_device.type:
            raise UserError(f"{name} is on {tensor.device}, the kernels run on {device.torch_device}")
        if not tensor.is_contiguous():
            raise UserError(
                f"{name} must be contiguous, it has strides {tensor.stride()} for shape {tuple(tensor.shape)}"
            )
        if "scales" not in name and tensor.data_ptr() % 16:
            raise UserError(
                f"{name} must be 16-byte aligned, its address is {tensor.data_ptr() % 16} past a multiple of 16"
            )


def check_weight(device: Device, weight: Quantized, *, name: str = "", ndim: int = 2) -> tuple[int, ...]:
    """The shape (.., N, K) of a weight whose codes (.., N, K/2) and scales (.., N, K/32) are uint8 and fit.

    name precedes "codes" and "scales" in messages. UserError otherwise.
    """
    codes, scales = check_pair(weight, name)
    label = f"{name} " if name else ""
    if codes.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise UserError(f"{label}codes and scales must be uint8, not {codes.dtype} and {scales.dtype}")
    fits = codes.ndim == scales.ndim == ndim and codes.shape == (*scales.shape[:-1], scales.shape[-1] * 16)
    if not fits or 0 in codes.shape:
        lead = {2: "(N, K/2)", 3: "(E, N, K/2)"}[ndim]
        raise UserError(
            f"{label}codes must be {lead} and scales {lead.replace('/2', f'/{BLOCK}')} with no size 0, "
            f"not {tuple(codes.shape)} and {tuple(scales.shape)}"
        )
    check_tensors(device, **{f"{label}codes": codes, f"{label}scales": scales})
    return (*codes.shape[:-1], codes.shape[-1] * 2)


def check_activations(device: Device, x: torch.Tensor, K: int | None = None, *, name: str = "x") -> torch.Tensor:
    """X itself, if it is (M, K) bf16 or fp16 with at least one row. UserError otherwise."""
    check_tensor(x, name)
    if x.dtype not in ACTIVATIONS:
        raise UserError(f"{name} must be bfloat16 or float16, not {x.dtype}")
    if x.ndim != 2 or x.shape[0] == 0 or (x.shape[1] != K if K is not None else x.shape[1] == 0):
        raise UserError(f"{name} must be (M, {K or 'K'}) with at least one row, not {tuple(x.shape)}")
    check_tensors(device, **{name: x})
    return x


def check_vector(
    device: Device, vector: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, name: str
) -> None:
    """UserError unless `vector` is None or has exactly this shape and dtype."""
    if vector is None:
        return
    check_tensor(vector, name)
    if vector.dtype != dtype or tuple(vector.shape) != shape:
        words = str(dtype).removeprefix("torch.")
        raise UserError(f"{name} must be {words} of shape {shape}, not {vector.dtype} {tuple(vector.shape)}")
    check_tensors(device, **{name: vector})
