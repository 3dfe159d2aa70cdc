"""A model cut into the tensors of a file that is to be written, each read in pieces of rows.

Between two files of one kind any architecture can be copied: names, order and metadata stay. From one kind to the
other a model goes through `load`, so it must be one that can be run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from mxharness.model import gguf_file, safetensors_file
from mxharness.model.checkpoint import Checkpoint, Stored
from mxharness.model.gguf import gguf_name, halves
from mxharness.model.huggingface import name_of
from mxharness.model.tensorfile import Entry, read_bytes
from mxharness.mxfp4 import Quantized

if TYPE_CHECKING:
    import torch

Pieces = Iterator["torch.Tensor | Quantized"]
PIECE = 1 << 22
"""Elements that are decoded at a time: 16 MiB in float32."""


@dataclass(frozen=True)
class Part:
    """One tensor."""

    name: str
    """In the file that is written; there MXFP4 may go under two names made of it."""
    shape: tuple[int, ...]
    """As quantised, inputs last."""
    format: str
    """In the file that is read."""
    pieces: Callable[[], Pieces]
    """Rows in order, (rows, K), float32 or in MXFP4."""
    kept: str
    """The format it has where it is not quantised."""
    entry: Entry | None = None
    """What is copied where it is not quantised; None where it is made of its pieces."""
    kept_shape: tuple[int, ...] | None = None
    """Its shape where it is not quantised and made of its pieces, if that is another."""


def of_gguf(entry: Entry) -> Part:
    """A tensor of a GGUF file."""
    pieces = partial(_pieces, entry, gguf_file.rows)
    return Part(entry.name, entry.shape, entry.format, pieces, entry.format, entry)


def of_safetensors(entry: Entry) -> Part:
    """A tensor of a safetensors file."""
    pieces = partial(_pieces, entry, safetensors_file.rows)
    return Part(entry.name, entry.shape, entry.format, pieces, entry.format, entry)


def of_pair(name: str, codes: Entry, scales: Entry) -> Part:
    """MXFP4 that a safetensors file keeps as two tensors."""
    shape = (*scales.shape[:-1], scales.shape[-1] * 32)
    return Part(name, shape, "MXFP4", partial(_pair_pieces, codes, scales), "MXFP4")


def of_turned(entry: Entry) -> Part:
    """gpt-oss' experts in floats, stored (E, K, N)."""
    E, K, N = entry.shape
    return Part(entry.name, (E, N, K), entry.format, partial(_turned, entry), entry.format, entry)


def to_gguf(model: Checkpoint) -> Iterator[Part]:
    """A model's tensors under GGUF's names, in its order of rows."""
    architecture = model.config.architecture
    for name, stored in model.tensors.items():
        target = gguf_name(name, architecture)
        what = name.rsplit(".", 1)[-1]
        kept = stored.format if stored.format in {"F16", "BF16"} and _is_matrix(what, stored.shape) else "F32"
        part = Part(target, stored.shape, stored.format, partial(_read, stored), _kept(stored.format, kept))
        if what in {"gate_up", "gate_up_bias"}:
            E, rows, *columns = stored.shape
            for which, half in enumerate(halves(target)):
                yield replace(part, name=half, shape=(E, rows // 2, *columns), pieces=partial(_half, stored, which))
            continue
        heads = {"q": model.config.heads, "k": model.config.kv_heads}.get(what) if architecture == "llama" else None
        if heads:
            part = replace(part, pieces=partial(_side_by_side, stored, heads))
        yield part
        if name == "embedding" and model.config.tied and architecture == "gpt-oss":
            yield replace(part, name="output.weight")  # llama.cpp reads no gpt-oss without


def to_safetensors(model: Checkpoint) -> Iterator[Part]:
    """A model's tensors under Hugging Face's names."""
    architecture = model.config.architecture
    for name, stored in model.tensors.items():
        kept = stored.format if stored.format in {"F16", "BF16"} else "F32"
        turned = architecture == "gpt-oss" and len(stored.shape) == 3
        yield Part(
            name_of(name, architecture),
            stored.shape,
            stored.format,
            partial(_read, stored),
            _kept(stored.format, kept),
            kept_shape=(stored.shape[0], stored.shape[2], stored.shape[1]) if turned else None,
        )


def copied(entry: Entry) -> Iterator[bytearray]:
    """A tensor's bytes as they are, some rows at a time."""
    step = max(1, 4 * PIECE * entry.rows // max(entry.nbytes, 1))
    for start in range(0, entry.rows, step):
        yield read_bytes(entry, start, min(start + step, entry.rows))


def _kept(form: str, kept: str) -> str:
    return "MXFP4" if form == "MXFP4" else kept


def _is_matrix(what: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp multiplies by it; it adds vectors, and routes, in float32 only."""
    return len(shape) > 1 and what != "router" and not what.endswith("bias")


def _pieces(entry: Entry, rows: Callable[[Entry, int, int], torch.Tensor | Quantized]) -> Pieces:
    step = max(1, PIECE // (entry.shape[-1] if entry.shape else 1))
    for start in range(0, entry.rows, step):
        yield rows(entry, start, min(start + step, entry.rows))


def _pair_pieces(codes: Entry, scales: Entry) -> Pieces:
    K = scales.shape[-1] * 32
    per_row = codes.rows // max(scales.rows, 1)  # `_blocks` have a dimension more
    step = max(1, PIECE // K)
    for start in range(0, scales.rows, step):
        stop = min(start + step, scales.rows)
        some = safetensors_file.rows(codes, start * per_row, stop * per_row).view(-1, K // 2)
        yield Quantized(some, safetensors_file.scales(scales, start, stop))


def _turned(entry: Entry) -> Pieces:
    E, K, _ = entry.shape
    for expert in range(E):
        yield safetensors_file.rows(entry, expert * K, (expert + 1) * K).T.contiguous()


def _read(stored: Stored) -> Pieces:
    yield _by_rows(stored.read())


def _half(stored: Stored, which: int) -> Pieces:
    read = stored.read()
    if isinstance(read, Quantized):
        yield _by_rows(Quantized(*(tensor[:, which::2] for tensor in read)))
    else:
        yield _by_rows(read[:, which::2])


def _side_by_side(stored: Stored, heads: int) -> Pieces:
    def order(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)

    read = stored.read()
    yield Quantized(*map(order, read)) if isinstance(read, Quantized) else order(read)


def _by_rows(tensor: torch.Tensor | Quantized) -> torch.Tensor | Quantized:
    def flat(one: torch.Tensor) -> torch.Tensor:
        return one.reshape(prod(one.shape[:-1]), one.shape[-1])

    return Quantized(*map(flat, tensor)) if isinstance(tensor, Quantized) else flat(tensor)
