"""Host memory between pages that nobody may touch, so that an access outside stops the kernel that makes it.

A buffer ends flush against the pages behind it, or begins flush behind the pages before it, as far as its alignment
allows: up to 15 bytes are left to canaries.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch

from mxharness.errors import Unavailable

Placement = Literal["end", "start"]
"""Which side of a buffer its pages guard to the byte."""
PLACEMENTS: tuple[Placement, ...] = ("end", "start")
GUARD = 1 << 20
"""Bytes of address space on either side: some rows of a tile away is still guarded."""
ALIGNMENT = 16
"""All that a kernel may ask for."""
_NO_ACCESS = 0


@dataclass(frozen=True, eq=False)
class Guarded:
    """A buffer and all the bytes that may be touched around it."""

    whole: torch.Tensor
    """uint8: whole pages. The memory is given back when the last tensor over it is gone."""
    start: int
    """Of the buffer, in `whole`."""


@cache
def _system() -> ctypes.CDLL:
    system = ctypes.CDLL(None, use_errno=True)
    system.mmap.restype = ctypes.c_void_p
    system.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    system.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    system.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return system


class _Pages:
    """Pages between guards, as numpy takes them over."""

    def __init__(self, size: int) -> None:
        system, length = _system(), size + 2 * GUARD
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        base = system.mmap(None, length, _NO_ACCESS, flags, -1, 0)
        if base is None or base == ctypes.c_void_p(-1).value:
            raise Unavailable(f"the system has no {length:,} bytes of address space for a guarded buffer")
        weakref.finalize(self, system.munmap, base, length).atexit = False
        if system.mprotect(base + GUARD, size, mmap.PROT_READ | mmap.PROT_WRITE) != 0:
            raise Unavailable(f"the system has no {size:,} bytes for a guarded buffer")
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": (size,),
            "typestr": "|u1",
            "data": (base + GUARD, False),
        }


def allocate(count: int, placement: Placement = "end", *, aligned: bool = True) -> Guarded:
    """`count` bytes at a multiple of 16, or at an odd address. Unavailable where the system gives no memory.

    At the end of its pages a buffer may happen to be aligned to more; at their start, 16 or 17 bytes behind the guard,
    it never is.
    """
    size = -(-(count + 2 * ALIGNMENT) // mmap.PAGESIZE) * mmap.PAGESIZE
    if placement == "start":
        start = ALIGNMENT if aligned else ALIGNMENT + 1
    else:
        start = (size - count) // ALIGNMENT * ALIGNMENT if aligned else (size - count - 1) | 1
    return Guarded(torch.from_numpy(np.asarray(_Pages(size))), start)
