"""What a kernel can be given: one rule for both devices."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mxharness.errors import UserError


@dataclass(frozen=True, eq=False)
class TensorMap:
    """A launch's argument that tells the copy engine of a matrix: kernels/tensor_map.cuh."""

    matrix: torch.Tensor
    """(rows, columns) of 16-bit numbers, contiguous, 16-byte aligned, columns a multiple of 8."""
    box: int
    """Rows that are brought at a time, at most 256."""


def kernel_argument(argument: object, described: Callable[[TensorMap], bytes]) -> np.generic:
    """A launch's argument as the bytes a kernel takes.

    A tensor is its address, None a null pointer, int 32 bits, numpy.int64 64 bits, float a float32, a TensorMap what
    `described` gives. UserError for anything else.
    """
    match argument:
        case TensorMap():
            return np.void(described(argument))
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
        f"a kernel argument must be a tensor, TensorMap, int, numpy.int64, float or None, not {type(argument).__name__}"
    )


def argument_cells(values: Sequence[np.generic]) -> ctypes.Array[ctypes.c_uint64]:
    """What cuLaunchKernel takes, in one piece of memory: the address of every value, then the values."""
    words = [np.frombuffer(value.tobytes().ljust(-(-value.nbytes // 8) * 8, b"\0"), np.uint64) for value in values]
    cells = (ctypes.c_uint64 * (len(values) + sum(map(len, words)) + 1))()
    at = len(values)
    for i, each in enumerate(words):
        cells[i] = ctypes.addressof(cells) + 8 * at
        cells[at : at + len(each)] = each.tolist()
        at += len(each)
    return cells
