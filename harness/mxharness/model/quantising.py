"""A model file to MXFP4, tensor by tensor: read in pieces of rows, quantised, written, measured.

Memory holds one piece, 16 MiB in float32, and what quantising it takes, whatever the size of the file; where a file
of one kind becomes one of the other, one whole tensor in float32. The new file appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mxharness import mxfp4
from mxharness.errors import UserError
from mxharness.model import gguf_file, load, metadata, safetensors, safetensors_file
from mxharness.model.checkpoint import Checkpoint, Vocabulary
from mxharness.model.parts import Part, of_gguf, of_pair, of_safetensors, of_turned, to_gguf, to_safetensors
from mxharness.model.selecting import EXPERTS, FORMS, Form, select
from mxharness.model.tensorfile import Entry, Slot
from mxharness.model.tokenizer import to_json
from mxharness.model.writing import published
from mxharness.mxfp4 import Quantized
from mxharness.sqnr import decibels, energies

if TYPE_CHECKING:
    import torch

_BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
"""Files that go along with a model in safetensors; no code, no pickles."""
_METADATA = {"format": "pt"}


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


@dataclass(frozen=True)
class _Plan:
    """A file that is to be written."""

    parts: Sequence[Part]
    form: Form
    experts: bool
    """Whether the target is gpt-oss in safetensors, whose experts have a form of their own."""
    before: int
    head: Callable[[Sequence[Slot]], tuple[bytes, list[int]]]
    beside: Callable[[Path, Sequence[str]], None]
    """Writes what stands beside the weights into a folder, given the names of matrices that stay as they are."""


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
    if os.path.lexists(target):
        raise UserError(f"{target} is there already and is not written over; choose another name or remove it")
    plan = _plan(source, form, f"mxfp4 ({scale_rule}, {tie_rule})")
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


def _plan(source: str | Path | Checkpoint, form: Form, rules: str) -> _Plan:
    if isinstance(source, Checkpoint):
        return _gguf(source, 0, rules) if form == "gguf" else _safetensors(source, 0)
    source = load.find(source)
    if source.suffix == ".gguf":
        before = source.stat().st_size if source.is_file() else 0
        return _same_gguf(source, before, rules) if form == "gguf" else _safetensors(load.load(source), before)
    files, entries = safetensors.read_entries(source)
    before = sum(file.stat().st_size for file in files)
    return (
        _same_safetensors(source, entries, before) if form == "safetensors" else _gguf(load.load(source), before, rules)
    )


def _same_gguf(source: Path, before: int, rules: str) -> _Plan:
    file = gguf_file.read(source)
    keys = metadata.copied_keys(file, rules)
    boundary = gguf_file.alignment(file)
    parts = [of_gguf(entry) for entry in file.tensors.values()]
    return _Plan(parts, "gguf", False, before, lambda slots: gguf_file.header(keys, slots, boundary), _nothing)


def _gguf(model: Checkpoint, before: int, rules: str) -> _Plan:
    keys = metadata.gguf_keys(model, rules)
    parts = list(to_gguf(model))
    return _Plan(parts, "gguf", False, before, lambda slots: gguf_file.header(keys, slots), _nothing)


def _same_safetensors(source: Path, entries: dict[str, Entry], before: int) -> _Plan:
    folder = source if source.is_dir() else source.parent
    config = folder / "config.json"
    document = safetensors.read_json(config) if config.is_file() else {}
    safetensors.check_quantization(document, folder.name)
    experts = document.get("model_type") == "gpt_oss"

    def beside(target: Path, left: Sequence[str]) -> None:
        for name in _BESIDE:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
        _write_config(target, document, experts, left)

    return _Plan(list(_parts(entries, experts)), "safetensors", experts, before, _safetensors_head, beside)


def _safetensors(model: Checkpoint, before: int) -> _Plan:
    experts = model.config.architecture == "gpt-oss"
    document = metadata.hf_config(model.config, model.ends)

    def beside(target: Path, left: Sequence[str]) -> None:
        if isinstance(model.vocabulary, Vocabulary):
            (target / "tokenizer.json").write_text(to_json(model.vocabulary), encoding="utf-8")
        elif model.vocabulary is not None:
            shutil.copyfile(model.vocabulary, target / "tokenizer.json")
        _write_config(target, document, experts, left)

    return _Plan(list(to_safetensors(model)), "safetensors", experts, before, _safetensors_head, beside)


def _parts(entries: dict[str, Entry], experts: bool) -> Iterator[Part]:
    """A safetensors file's tensors, pairs of MXFP4 codes and scales as one."""
    endings = {"_blocks": "_scales", "_packed": "_scale"}
    pairs = {
        name: name.removesuffix(ending) + other
        for name in entries
        for ending, other in endings.items()
        if name.endswith(ending) and name.removesuffix(ending) + other in entries
    }
    for name, entry in entries.items():
        if name in pairs:
            yield of_pair(name.rpartition("_")[0], entry, entries[pairs[name]])
        elif name not in pairs.values():
            turned = experts and len(entry.shape) == 3 and any(fnmatchcase(name, pattern) for pattern in EXPERTS)
            yield of_turned(entry) if turned else of_safetensors(entry)


def _safetensors_head(slots: Sequence[Slot]) -> tuple[bytes, list[int]]:
    return safetensors_file.header(slots, _METADATA)


def _nothing(folder: Path, left: Sequence[str]) -> None:
    """A GGUF file has nothing beside it."""


def _write_config(target: Path, document: dict[str, Any], experts: bool, left: Sequence[str]) -> None:
    layers = [name.removesuffix(".weight") for name in left]
    quantization = metadata.quantization_config(experts=experts, left=layers)
    text = json.dumps({**document, "quantization_config": quantization}, indent=2) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")


def _write(
    plan: _Plan, why: dict[str, str | None], path: Path, rules: tuple[str, str], progress: bool
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


def _slots(plan: _Plan, part: Part, *, packed: bool) -> tuple[Slot, ...]:
    """The tensors of the target that a part goes into."""
    module = gguf_file if plan.form == "gguf" else safetensors_file
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
    plan: _Plan, part: Part, sums: list[float], rules: tuple[str, str], *, packed: bool
) -> Iterator[tuple[memoryview | bytearray, ...]]:
    """Pieces of a part's bytes, one for each of its slots; adds the energies of weights and errors to `sums`."""
    if not packed and part.raw is not None:
        yield from ((data,) for data in part.raw())
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
