"""What every function does before it launches: find the device, and refuse bad input in one sentence."""

from __future__ import annotations

from functools import cache

import torch

from mxharness.device import Device, open_device
from mxharness.errors import UserError
from mxharness.mxfp4 import BLOCK, Quantized

ACTIVATIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Dtypes that the tensor core multiplies, and what kernels call them."""


@cache
def _opened(name: str) -> Device:
    return open_device(name)


def device_of(x: torch.Tensor, device: Device | None) -> Device:
    """`device`, or the one where x lies: the host device for a CPU tensor, the GPU for a CUDA tensor.

    UserError for a tensor elsewhere, Unavailable where the device cannot be had.
    """
    if device is not None:
        return device
    if x.device.type not in ("cpu", "cuda"):
        raise UserError(f"x is on {x.device}; the kernels run on cpu and cuda")
    return _opened("cuda" if x.device.type == "cuda" else "host")


def check_tensors(device: Device, **tensors: torch.Tensor | None) -> None:
    """UserError unless every tensor is contiguous and on the device and, but for scale bytes, 16-byte aligned.

    A name with "scales" in it is one of scale bytes.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
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
    codes, scales = weight
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
    if vector.dtype != dtype or tuple(vector.shape) != shape:
        words = str(dtype).removeprefix("torch.")
        raise UserError(f"{name} must be {words} of shape {shape}, not {vector.dtype} {tuple(vector.shape)}")
    check_tensors(device, **{name: vector})
