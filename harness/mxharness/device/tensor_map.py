"""What the copy engine is told of a matrix: 128 bytes (kernels/tensor_map.cuh).

The driver makes them; PyCUDA has no cuTensorMapEncodeTiled.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache, lru_cache

import torch

from mxharness.device.argument import TensorMap
from mxharness.errors import KernelFailure

SIZE = 128
"""Bytes of a map."""
BOX_COLUMNS = 64
"""Of kernels/tensor_map.cuh."""
_ALIGNMENT = 64
_TYPES = {torch.float16: 6, torch.bfloat16: 9}
"""CU_TENSOR_MAP_DATA_TYPE_*."""
_NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_L2_256B, _ZEROS_OUTSIDE = 0, 3, 3, 0


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@lru_cache(maxsize=4096)
def _encoded(address: int, rows: int, columns: int, dtype: torch.dtype, box: int) -> bytes:
    memory = ctypes.create_string_buffer(SIZE + _ALIGNMENT)
    place = -(-ctypes.addressof(memory) // _ALIGNMENT) * _ALIGNMENT
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(place),
        _TYPES[dtype],
        2,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(columns * dtype.itemsize),
        (ctypes.c_uint32 * 2)(BOX_COLUMNS, box),
        (ctypes.c_uint32 * 2)(1, 1),
        _NO_INTERLEAVE,
        _SWIZZLE_128B,
        _PROMOTE_L2_256B,
        _ZEROS_OUTSIDE,
    )
    if code != 0:
        raise KernelFailure(f"the driver cannot describe a matrix of {rows} x {columns} {dtype} (CUDA error {code})")
    return ctypes.string_at(place, SIZE)


def cuda_map(asked: TensorMap) -> bytes:
    """Of a matrix on the GPU. KernelFailure for one that the driver refuses."""
    return _encoded(asked.matrix.data_ptr(), *asked.matrix.shape, asked.matrix.dtype, asked.box)


def host_map(asked: TensorMap) -> bytes:
    """Of a matrix on the CPU."""
    return struct.pack("Pqqq", asked.matrix.data_ptr(), *asked.matrix.shape, asked.box).ljust(SIZE, b"\0")
