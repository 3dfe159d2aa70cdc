"""One tensor inside a file: where its bytes lie, and reading some of them.

Bytes are read, never mapped: memory stays bounded by what is asked for, and a file that is cut short meanwhile is an
error instead of a signal.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from mxharness.errors import UserError

if TYPE_CHECKING:
    import torch

    from mxharness.mxfp4 import Quantized


@dataclass(frozen=True)
class Entry:
    """A tensor of a file whose header has been checked: its bytes are there and belong to it alone."""

    path: Path
    name: str
    shape: tuple[int, ...]
    format: str
    """As the file calls it: "F32", "BF16", "Q4_1", "MXFP4", "U8"."""
    offset: int
    """Of the first byte in the file."""
    nbytes: int

    @property
    def rows(self) -> int:
        """Rows, with all dimensions but the last flattened."""
        return prod(self.shape[:-1])


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in a file that is to be written."""

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int


def read_bytes(entry: Entry, start: int = 0, stop: int | None = None) -> bytearray:
    """Rows `start` to `stop` of a tensor as they lie in the file. Raises UserError for a file that ends before them."""
    row_bytes = entry.nbytes // max(entry.rows, 1)
    size = ((entry.rows if stop is None else stop) - start) * row_bytes
    data = bytearray(size)
    try:
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.offset + start * row_bytes)
            view, got = memoryview(data), 0
            while got < size and (count := file.readinto(view[got:])):
                got += count
    except OSError as error:
        raise UserError(f"cannot read {entry.path}: {error.strerror}") from error
    if got < size:
        raise UserError(f"{entry.path} ended while '{entry.name}' was read; it is being changed or damaged")
    return data


def finite(tensor: torch.Tensor | Quantized, name: str, path: Path | str) -> torch.Tensor | Quantized:
    """The same tensor. Raises UserError where it holds NaN or Inf: no weight does, and no arithmetic survives it."""
    import torch

    from mxharness.mxfp4 import SCALE_NAN, Quantized

    if isinstance(tensor, Quantized):
        bad, what = int((tensor.scales == SCALE_NAN).sum()), f"scales that are NaN (byte {SCALE_NAN})"
    else:
        bad, what = int((~torch.isfinite(tensor)).sum()), "values that are NaN or Inf"
    if bad:
        raise UserError(f"'{name}' of {path} has {bad:,} {what}; it is damaged")
    return tensor


def regular_file(path: Path) -> Path:
    """The same path. Raises UserError unless it is a file that can be read."""
    if not path.is_file():
        raise UserError(f"no model file {path}; `mxharness fetch smollm2` gets one")
    return path


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
