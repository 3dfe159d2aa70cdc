"""GGUF files: a header read with every count and offset checked, tensors read by rows; and headers written.

gguf-py's reader believes a file's counts: an array that claims 2^60 numbers is read until memory ends. Here nothing is
allocated that the file is too short to hold. gguf-py decodes the formats other than F32, F16, BF16 and MXFP4.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mxharness.errors import Unavailable, UserError
from mxharness.model.tensorfile import Entry, Slot, finite, read_bytes, regular_file

if TYPE_CHECKING:
    import torch

    from mxharness.mxfp4 import Quantized

ALIGNMENT = 32
_ALIGNMENT_KEY, _LARGEST_ALIGNMENT = "general.alignment", 1 << 20
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MOST_DIMENSIONS = 4
_MOST_ELEMENTS = 1 << 62
# ggml's number: (name, elements of a block, bytes of a block); gguf-py knows the others
_FORMATS = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 39: ("MXFP4", 32, 17)}
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class GgufFile:
    """A checked header."""

    path: Path
    keys: Mapping[str, Any]
    """The metadata: each value an int, float, bool or str, or a tuple of one of them."""
    spans: Mapping[str, tuple[int, int]]
    """Where in the file a key and its value lie, so that they can be copied as they are."""
    tensors: Mapping[str, Entry]
    """In the order of the file."""


class _DamagedError(Exception):
    """What is wrong with a header, in half a sentence."""


class _Cursor:
    """Reads forward through a file, never past its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.position = file, size, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise _DamagedError(f"it announces {count:,} bytes at byte {self.position:,} and ends before")
        data = self.file.read(count)
        if len(data) != count:
            raise _DamagedError("it ended while it was read")
        self.position += count
        return data

    def number(self, code: str) -> Any:  # noqa: ANN401  an int or a float, by the code
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise _DamagedError(f"a text before byte {self.position:,} is no UTF-8") from error

    def value(self, kind: int) -> Any:  # noqa: ANN401  GGUF's values have eleven types
        if kind == _STRING:
            return self.text()
        if kind == _BOOL:
            return bool(self.number("B"))
        if kind not in _SCALARS:
            raise _DamagedError(f"there is no type {kind} of metadata")
        return self.number(_SCALARS[kind])

    def values(self) -> tuple[Any, ...]:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return tuple(self.text() for _ in range(count))
        if kind not in _SCALARS:
            raise _DamagedError(f"there are no lists of type {kind} of metadata")
        data = self.take(count * struct.calcsize(_SCALARS[kind]))
        numbers = (number for (number,) in struct.iter_unpack(f"<{_SCALARS[kind]}", data))
        return tuple(map(bool, numbers)) if kind == _BOOL else tuple(numbers)


def read(path: Path) -> GgufFile:
    """The header of a GGUF file.

    Raises UserError for what is no GGUF file, for another version or byte order, one part of several, and damage:
    counts and offsets past the file's end, tensors that overlap, names given twice, rows that are no whole blocks.
    """
    size = regular_file(path).stat().st_size
    with path.open("rb") as file:
        cursor = _Cursor(file, size)
        try:
            if size < len(_MAGIC) or cursor.take(len(_MAGIC)) != _MAGIC:
                raise UserError(f"{path} is no GGUF file: its first four bytes are not GGUF")
            if (version := cursor.number("I")) not in _VERSIONS:
                raise UserError(f"{path} is of GGUF version {version}, or big-endian; versions 2 and 3 can be read")
            tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
            keys, spans = _keys(cursor, key_count)
            if keys.get("split.count", 1) not in {0, 1}:
                raise UserError(
                    f"{path} is one of {keys['split.count']} parts of a model; `llama-gguf-split --merge` joins them"
                )
            tensors = _tensors(cursor, tensor_count, _alignment(keys), path)
        except _DamagedError as error:
            raise UserError(f"{path} is a damaged or incomplete GGUF file of {size:,} bytes: {error}") from error
    return GgufFile(path, keys, spans, tensors)


def rows(entry: Entry, start: int = 0, stop: int | None = None) -> torch.Tensor | Quantized:
    """Rows `start` to `stop` of a tensor, (rows, K) float32 on the CPU, or Quantized where it is stored in MXFP4.

    Raises UserError for NaN, Inf, NaN scales and formats that hold no weights; Unavailable without gguf-py where it is
    needed to decode.
    """
    import numpy as np
    import torch

    from mxharness import mxfp4

    data = read_bytes(entry, start, stop)
    count = (entry.rows if stop is None else stop) - start
    result: torch.Tensor | Quantized
    if entry.format in _PLAIN:
        result = torch.frombuffer(data, dtype=getattr(torch, _PLAIN[entry.format])).float().view(count, -1)
    elif entry.format == "MXFP4":
        blocks = torch.frombuffer(data, dtype=torch.uint8).view(count, -1)
        result = mxfp4.from_layout(mxfp4.Packed(blocks, None), "gguf")
    else:
        gguf = _gguf(f"'{entry.name}' of {entry.path} is {entry.format}")
        raw = np.frombuffer(data, dtype=np.uint8).reshape(count, -1)
        try:
            with np.errstate(all="ignore"):  # damaged scales show below, in what they decode to
                decoded = gguf.dequantize(raw, gguf.GGMLQuantizationType[entry.format])
        except NotImplementedError as error:
            raise UserError(f"'{entry.name}' of {entry.path} is {entry.format}, which holds no weights") from error
        result = torch.from_numpy(np.array(decoded, dtype=np.float32))
    return finite(result, entry.name, entry.path)


def slot(name: str, shape: tuple[int, ...], form: str) -> Slot:
    """The place that a tensor of a format takes in a file."""
    _, block, block_bytes = _known(_number(form), name)
    return Slot(name, shape, form, prod(shape) // block * block_bytes)


def key(name: str, value: object) -> bytes:
    """The bytes of a key and its value: bool, int (uint32), float (float32), str, or a tuple of bool, int32 or str."""
    if isinstance(value, tuple):
        items = [(5, struct.pack("<i", item)) if type(item) is int else _encoded(item) for item in value]
        body = struct.pack("<IIQ", _ARRAY, items[0][0], len(items)) + b"".join(data for _, data in items)
    else:
        kind, data = _encoded(value)
        body = struct.pack("<I", kind) + data
    return _encoded(name)[1] + body


def header(keys: Sequence[bytes], slots: Sequence[Slot], alignment: int = ALIGNMENT) -> tuple[bytes, list[int]]:
    """A file's bytes before its first tensor, and the offset in the file of each tensor's bytes."""
    infos, place, relative = [], 0, []
    for one in slots:
        relative.append(place)
        infos.append(
            _encoded(one.name)[1]
            + struct.pack(f"<I{len(one.shape)}Q", len(one.shape), *reversed(one.shape))
            + struct.pack("<IQ", _number(one.format), place)
        )
        place += -(-one.nbytes // alignment) * alignment
    data = _MAGIC + struct.pack("<IQQ", 3, len(slots), len(keys)) + b"".join(keys) + b"".join(infos)
    data += bytes(-len(data) % alignment)
    return data, [len(data) + offset for offset in relative]


def raw_key(file: GgufFile, name: str) -> bytes:
    """A key and its value as they lie in a file."""
    start, stop = file.spans[name]
    with file.path.open("rb") as source:
        source.seek(start)
        return source.read(stop - start)


def alignment(file: GgufFile) -> int:
    """The boundary at which a file's tensors begin."""
    return int(file.keys.get(_ALIGNMENT_KEY, ALIGNMENT))


def _keys(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    keys: dict[str, Any] = {}
    spans = {}
    for _ in range(count):
        start = cursor.position
        name, kind = cursor.text(), cursor.number("I")
        if name in keys:
            raise _DamagedError(f"the key '{name}' is there twice")
        keys[name] = cursor.values() if kind == _ARRAY else cursor.value(kind)
        spans[name] = (start, cursor.position)
    return keys, spans


def _alignment(keys: Mapping[str, Any]) -> int:
    value = keys.get(_ALIGNMENT_KEY, ALIGNMENT)
    if type(value) is not int or not 0 < value <= _LARGEST_ALIGNMENT or value & (value - 1):
        raise _DamagedError(f"{_ALIGNMENT_KEY} is {value}, no power of two")
    return value


def _tensors(cursor: _Cursor, count: int, alignment: int, path: Path) -> dict[str, Entry]:
    infos: dict[str, tuple[tuple[int, ...], str, int, int]] = {}
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.number("I")
        if name in infos:
            raise _DamagedError(f"the tensor '{name}' is there twice")
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise _DamagedError(f"'{name}' has {dimensions} dimensions")
        sizes = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))
        number, offset = cursor.number("I"), cursor.number("Q")
        if not 0 < prod(sizes) < _MOST_ELEMENTS:
            raise _DamagedError(f"'{name}' has the sizes {sizes}")
        form, block, block_bytes = _known(number, f"'{name}' of {path}")
        if sizes[0] % block:
            raise _DamagedError(f"'{name}' has rows of {sizes[0]}, no multiple of {form}'s blocks of {block}")
        if offset % alignment:
            raise _DamagedError(f"'{name}' lies at {offset}, no multiple of {alignment}")
        infos[name] = (sizes[::-1], form, offset, prod(sizes) // block * block_bytes)
    base = -(-cursor.position // alignment) * alignment
    end, before = base, ""
    for name, (_, _, offset, nbytes) in sorted(infos.items(), key=lambda item: item[1][2]):
        if base + offset < end:
            raise _DamagedError(f"'{name}' overlaps '{before}'")
        end, before = base + offset + nbytes, name
        if end > cursor.size:
            raise _DamagedError(f"'{name}' ends at byte {end:,}")
    return {
        name: Entry(path, name, shape, form, base + offset, nbytes)
        for name, (shape, form, offset, nbytes) in infos.items()
    }


def _known(number: int, what: str) -> tuple[str, int, int]:
    """Name, elements and bytes of a block of a format."""
    if number in _FORMATS:
        return _FORMATS[number]
    gguf = _gguf(f"{what} is of ggml's type {number}")
    try:
        form = gguf.GGMLQuantizationType(number)
    except ValueError as error:
        raise UserError(f"{what} is of ggml's type {number}, which this gguf-py does not know") from error
    return (form.name, *gguf.GGML_QUANT_SIZES[form])


def _number(form: str) -> int:
    for number, (name, _, _) in _FORMATS.items():
        if name == form:
            return number
    return int(_gguf(f"a tensor is {form}").GGMLQuantizationType[form])


def _encoded(value: object) -> tuple[int, bytes]:
    """GGUF's type of a value, and its bytes."""
    if isinstance(value, bool):
        return _BOOL, struct.pack("<B", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    data = str(value).encode()
    return _STRING, struct.pack("<Q", len(data)) + data


def _gguf(what: str) -> Any:  # noqa: ANN401  gguf ships no types
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise Unavailable(f"{what}, which the package gguf decodes: pip install 'mxharness[model]'") from error
    return gguf
