"""What a kernel can be given: one rule for both devices."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

import numpy as np
import torch

from mxharness.errors import UserError


def kernel_argument(argument: object) -> np.generic:
    """A launch's argument as the bytes a kernel takes.

    A tensor is its address, None a null pointer, int 32 bits, numpy.int64 64 bits, float a float32.
    UserError for anything else.
    """
    match argument:
        case torch.Tensor():
            return np.uintp(argument.data_ptr())
        case None:
            return np.uintp(0)
        case np.integer():
            return np.int64(argument)
        case bool() | int():
            return np.int32(argument)
        case float():
            return np.float32(argument)
    raise UserError(
        f"a kernel argument must be a tensor, int, numpy.int64, float or None, not {type(argument).__name__}"
    )


def argument_cells(values: Sequence[np.generic]) -> ctypes.Array[ctypes.c_uint64]:
    """What cuLaunchKernel takes, in one piece of memory: the address of every value, then the values."""
    cells = (ctypes.c_uint64 * (2 * len(values) + 1))()
    start = ctypes.addressof(cells) + 8 * len(values)
    for i, value in enumerate(values):
        cells[i] = start + 8 * i
        cells[len(values) + i] = int.from_bytes(value.tobytes().ljust(8, b"\0"), sys.byteorder)
    return cells
