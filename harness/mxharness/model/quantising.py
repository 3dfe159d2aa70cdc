"""A model file to MXFP4, tensor by tensor: read in pieces of rows, quantised, written, measured.

Memory holds one piece, 16 MiB in float32, and what quantising it takes, whatever the size of the file; where a file
of one kind becomes one of the other, one whole tensor in float32. The new file appears whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mxharness import mxfp4
from mxharness.errors import UserError
from mxharness.model import gguf_file, safetensors_file
from mxharness.model.checkpoint import Checkpoint
from mxharness.model.parts import Part, copied
from mxharness.model.plans import Plan, plan_of
from mxharness.model.selecting import FORMS, Form, select
from mxharness.model.tensorfile import Slot
from mxharness.model.writing import published
from mxharness.mxfp4 import Quantized
from mxharness.sqnr import decibels, energies

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Row:
    """One tensor of a file that was written."""

    name: str
    shape: tuple[int, ...]
    before: str
    """Its format in the file that was read."""
    after: str
    nbytes: int
    """In the file that was written."""
    sqnr: float | None
    """Decoded against original weights in dB, inf where no value changed; None where it was not quantised here."""
    why: str
    """Why it is not MXFP4, or "as stored" where it was MXFP4 before; "" where it was quantised."""


@dataclass(frozen=True)
class Report:
    """What `quantise` did."""

    path: Path
    rows: tuple[Row, ...]
    rules: str
    """Scale rule and tie rule."""
    sqnr: float | None
    """Of all weights that were quantised, taken together, in dB."""
    before: int
    """Bytes of the files of weights that were read; 0 for a model in memory."""
    after: int
    """Bytes of the file of weights that was written."""

    def to_json(self) -> dict[str, Any]:
        """Every field, rows as objects."""
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "rows"}
        return {**plain, "tensors": [{one.name: getattr(row, one.name) for one in fields(Row)} for row in self.rows]}


def quantise(
    source: str | Path | Checkpoint,
    target: Path,
    form: Form | None = None,
    *,
    scale_rule: str = "floor",
    tie_rule: str = "even",
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    progress: bool = False,
) -> Report:
    """Write the model at `source` to `target` with its matrices in MXFP4.

    source: what `load` takes or gives, or a GGUF or safetensors file of any architecture where the form stays the same.
    form: "gguf", a file, or "safetensors", a folder; by default by the target's name. Rules as `mxfp4.quantize`. only,
    skip: names of tensors in the target's naming, with * and ?; without `only`, embeddings, heads, routers, norms and
    convolutions stay as they are. Tensors that are MXFP4 already are copied, never quantised again. progress: a bar.

    Raises UserError for what cannot be read, is there already, or fits no pattern; nothing is left behind then.
    """
    for what, rule, rules in (
        ("scale rule", scale_rule, mxfp4.SCALE_RULES),
        ("tie rule", tie_rule, mxfp4.TIE_RULES),
        ("form", form or FORMS[0], FORMS),
    ):
        if rule not in rules:
            raise UserError(f"no {what} '{rule}'; there are {', '.join(rules)}")
    form = form or ("gguf" if target.suffix == ".gguf" else "safetensors")
    if (form == "gguf") != (target.suffix == ".gguf"):
        raise UserError(f"{target}: a GGUF file's name ends in .gguf, and a folder of safetensors has another")
    plan = plan_of(source, form, f"mxfp4 ({scale_rule}, {tie_rule})")
    if not plan.parts:
        raise UserError(f"{source} holds no tensors")
    why = select(plan.parts, form, only, skip, experts_only=plan.experts)
    with published(target) as made:
        folder = made if form == "safetensors" else made.parent
        folder.mkdir(exist_ok=True)
        weights = made / "model.safetensors" if form == "safetensors" else made
        rows, sqnr = _write(plan, why, weights, (scale_rule, tie_rule), progress)
        plan.beside(folder, [row.name for row in rows if row.after != "MXFP4" and len(row.shape) > 1])
        after = weights.stat().st_size
    return Report(target, rows, f"mxfp4 ({scale_rule}, {tie_rule})", sqnr, plan.before, after)


def _write(
    plan: Plan, why: dict[str, str | None], path: Path, rules: tuple[str, str], progress: bool
) -> tuple[tuple[Row, ...], float | None]:
    """The file of weights; its tensors, and the SQNR of all that were quantised."""
    from tqdm import tqdm

    slots = [_slots(plan, part, packed=why[part.name] is None) for part in plan.parts]
    flat = [slot for each in slots for slot in each]
    head, offsets = plan.head(flat)
    places = iter(offsets)
    rows, signal, noise = [], 0.0, 0.0
    bar = tqdm(total=sum(slot.nbytes for slot in flat), unit="B", unit_scale=True, disable=not progress)
    with path.open("wb") as file, bar:
        _reserve(file, offsets[-1] + flat[-1].nbytes)
        file.write(head)
        for part, each in zip(plan.parts, slots, strict=True):
            bar.set_postfix_str(part.name, refresh=False)
            at = [next(places) for _ in each]
            sums = [0.0, 0.0]
            for data in _bytes(plan, part, sums, rules, packed=why[part.name] is None):
                for i, piece in enumerate(data):
                    file.seek(at[i])
                    at[i] += file.write(piece)
                    bar.update(len(piece))
            signal, noise = signal + sums[0], noise + sums[1]
            rows.append(_row(part, each, why[part.name], sums))
    quantised = any(row.sqnr is not None for row in rows)
    return tuple(rows), decibels(signal, noise) if quantised else None


def _reserve(file: IO[bytes], size: int) -> None:
    """Take the file's disk space beforehand. Raises UserError where there is too little."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise UserError(f"no {size:,} bytes can be written: {error.strerror}") from error


def _row(part: Part, slots: tuple[Slot, ...], why: str | None, sums: list[float]) -> Row:
    stored = part.format == "MXFP4"
    after = "MXFP4" if why is None else part.kept if not stored else "F32"
    sqnr = decibels(*sums) if why is None and not stored else None
    reason = why or ("as stored" if stored else "")
    return Row(part.name, part.shape, part.format, after, sum(slot.nbytes for slot in slots), sqnr, reason)


def _slots(plan: Plan, part: Part, *, packed: bool) -> tuple[Slot, ...]:
    """The tensors of the target that a part goes into."""
    module = gguf_file if plan.form == "gguf" else safetensors_file
    if not packed and part.entry is not None:
        return (Slot(part.name, part.entry.shape, part.entry.format, part.entry.nbytes),)
    if not packed:
        kept = "F32" if part.format == "MXFP4" else part.kept
        return (module.slot(part.name, part.kept_shape or part.shape, kept),)
    if plan.form == "gguf":
        return (gguf_file.slot(part.name, part.shape, "MXFP4"),)
    *outer, K = part.shape
    codes = (*outer, K // 32, 16) if plan.experts else (*outer, K // 2)
    names = ("_blocks", "_scales") if plan.experts else ("_packed", "_scale")
    return (
        safetensors_file.slot(part.name + names[0], codes, "U8"),
        safetensors_file.slot(part.name + names[1], (*outer, K // 32), "U8"),
    )


def _bytes(
    plan: Plan, part: Part, sums: list[float], rules: tuple[str, str], *, packed: bool
) -> Iterator[tuple[memoryview | bytearray, ...]]:
    """Pieces of a part's bytes, one for each of its slots; adds the energies of weights and errors to `sums`."""
    if not packed and part.entry is not None:
        yield from ((data,) for data in copied(part.entry))
        return
    for piece in part.pieces():
        if not packed:
            floats = mxfp4.dequantize(*piece) if isinstance(piece, Quantized) else piece
            yield (_view(_kept(floats, part)),)
            continue
        if isinstance(piece, Quantized):
            quantized = piece
        else:
            quantized = mxfp4.quantize(piece, *rules)
            sums[:] = (had + new for had, new in zip(sums, energies(piece, quantized), strict=True))
        if plan.form == "gguf":
            yield (_view(mxfp4.to_layout(quantized, "gguf").data),)
        else:
            yield _view(quantized.codes), _view(quantized.scales)


def _kept(floats: torch.Tensor, part: Part) -> torch.Tensor:
    """A whole tensor's rows as they are stored unquantised."""
    import torch

    if part.kept_shape is not None:
        floats = floats.view(part.shape).transpose(1, 2)
    return floats.to(getattr(torch, safetensors_file.FLOATS.get(part.kept, "float32")))


def _view(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")
