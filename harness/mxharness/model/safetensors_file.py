"""safetensors files: a header checked by the safetensors library, tensors read by rows; and headers written.

The library maps a file and hands out whole tensors; reading rows needs offsets, which it does not give, so the header
it has found valid is parsed once more for them. No other format of torch's is opened: pickle runs what a file says.
Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxharness.errors import UserError
from mxharness.model.tensorfile import Entry, Slot, finite, read_bytes, regular_file

if TYPE_CHECKING:
    import torch

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BYTES = ("U8", "F8_E8M0")
"""Formats of MXFP4's codes and scales."""
_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}


def read(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, by name.

    Raises UserError for what is no safetensors file and for damage: a header past its end, offsets outside the file,
    tensors that overlap or leave gaps, sizes that do not fit their shapes, names given twice.
    """
    import safetensors

    size = regular_file(path).stat().st_size
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_once)
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(
            f"{path} is no safetensors file, or a damaged or incomplete one, of {size:,} bytes: {error}"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return {
        name: Entry(path, name, tuple(info["shape"]), info["dtype"], 8 + length + begin, end - begin)
        for name, info in header.items()
        if name != "__metadata__"
        for begin, end in (info["data_offsets"],)
    }


def rows(entry: Entry, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows `start` to `stop` of a tensor, (rows, K) on the CPU: float32, or uint8 for codes and scales.

    Raises UserError for NaN, Inf and formats that hold no weights.
    """
    import torch

    if entry.format not in FLOATS and entry.format not in BYTES:
        raise UserError(f"'{entry.name}' of {entry.path} is {entry.format}, which holds no weights")
    count = (entry.rows if stop is None else stop) - start
    columns = entry.shape[-1] if entry.shape else 1
    if not count * columns:
        raise UserError(f"'{entry.name}' of {entry.path} is empty")
    data = read_bytes(entry, start, stop)
    if entry.format in BYTES:
        return torch.frombuffer(data, dtype=torch.uint8).view(count, columns)
    tensor = torch.frombuffer(data, dtype=getattr(torch, FLOATS[entry.format])).float().view(count, columns)
    finite(tensor, entry.name, entry.path)
    return tensor


def scales(entry: Entry, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows of MXFP4's scales, (rows, K/32) uint8. Raises UserError where one of them is NaN."""
    from mxharness.mxfp4 import Quantized

    found = rows(entry, start, stop)
    finite(Quantized(found, found), entry.name, entry.path)
    return found


def slot(name: str, shape: tuple[int, ...], form: str) -> Slot:
    """The place that a tensor of F32, F16, BF16 or U8 takes in a file."""
    return Slot(name, shape, form, prod(shape) * _SIZES[form])


def header(slots: Sequence[Slot], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """A file's bytes before its first tensor, and the offset in the file of each tensor's bytes."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    ends = [0]
    for one in slots:
        ends.append(ends[-1] + one.nbytes)
        document[one.name] = {"dtype": one.format, "shape": list(one.shape), "data_offsets": ends[-2:]}
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + begin for begin in ends[:-1]]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("its header has a name twice")
    return document
