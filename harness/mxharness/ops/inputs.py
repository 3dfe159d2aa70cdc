"""What every launch checks before it launches: bad input is one clear sentence, and nothing is written."""

from __future__ import annotations

import torch

from mxharness.device import Device
from mxharness.errors import UserError


def check_tensors(device: Device, **tensors: torch.Tensor | None) -> None:
    """UserError unless every tensor is contiguous and on the device and, but for scale bytes, 16-byte aligned."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device.type != device.torch_device.type:
            raise UserError(f"{name} is on {tensor.device}, the kernels run on {device.torch_device}")
        if not tensor.is_contiguous():
            raise UserError(
                f"{name} must be contiguous, it has strides {tensor.stride()} for shape {tuple(tensor.shape)}"
            )
        if name != "scales" and tensor.data_ptr() % 16:
            raise UserError(
                f"{name} must be 16-byte aligned, its address is {tensor.data_ptr() % 16} past a multiple of 16"
            )


def check_weights(codes: torch.Tensor, scales: torch.Tensor) -> None:
    """UserError unless codes (N, K/2) and scales (N, K/32) are uint8 matrices that belong together."""
    if codes.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise UserError(f"codes and scales must be uint8, not {codes.dtype} and {scales.dtype}")
    fits = codes.ndim == scales.ndim == 2 and codes.shape == (scales.shape[0], scales.shape[1] * 16)
    if not fits or 0 in codes.shape:
        raise UserError(
            "codes must be (N, K/2) and scales (N, K/32) with N and K above 0, "
            f"not {tuple(codes.shape)} and {tuple(scales.shape)}"
        )
