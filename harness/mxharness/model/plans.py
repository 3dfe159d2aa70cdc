"""What is read and what is written where a model file is quantised: tensors, header, and the files beside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mxharness.model import gguf_file, load, metadata, safetensors, safetensors_file
from mxharness.model.checkpoint import Checkpoint, Vocabulary
from mxharness.model.parts import Part, of_gguf, of_pair, of_safetensors, of_turned, to_gguf, to_safetensors
from mxharness.model.selecting import EXPERTS, Form
from mxharness.model.tensorfile import Entry, Slot
from mxharness.model.tokenizer import to_json

_BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
"""Files that go along with a model in safetensors; no code, no pickles."""
_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Plan:
    """A file that is to be written."""

    parts: Sequence[Part]
    form: Form
    experts: bool
    """Whether the target is gpt-oss in safetensors, whose experts have a form of their own."""
    before: int
    head: Callable[[Sequence[Slot]], tuple[bytes, list[int]]]
    beside: Callable[[Path, Sequence[str]], None]
    """Writes what stands beside the weights into a folder, given the names of matrices that stay as they are."""


def plan_of(source: str | Path | Checkpoint, form: Form, rules: str) -> Plan:
    """The file of a form that a model is to become; rules: scale rule and tie rule in words, for its metadata.

    Raises UserError for what cannot be read, or cannot be said in the form.
    """
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


def _same_gguf(source: Path, before: int, rules: str) -> Plan:
    file = gguf_file.read(source)
    keys = metadata.copied_keys(file, rules)
    boundary = gguf_file.alignment(file)
    parts = [of_gguf(entry) for entry in file.tensors.values()]
    return Plan(parts, "gguf", False, before, lambda slots: gguf_file.header(keys, slots, boundary), _nothing)


def _gguf(model: Checkpoint, before: int, rules: str) -> Plan:
    keys = metadata.gguf_keys(model, rules)
    parts = list(to_gguf(model))
    return Plan(parts, "gguf", False, before, lambda slots: gguf_file.header(keys, slots), _nothing)


def _same_safetensors(source: Path, entries: dict[str, Entry], before: int) -> Plan:
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

    return Plan(list(_parts(entries, experts)), "safetensors", experts, before, _safetensors_head, beside)


def _safetensors(model: Checkpoint, before: int) -> Plan:
    experts = model.config.architecture == "gpt-oss"
    document = metadata.hf_config(model.config, model.ends)

    def beside(target: Path, left: Sequence[str]) -> None:
        if isinstance(model.vocabulary, Vocabulary):
            (target / "tokenizer.json").write_text(to_json(model.vocabulary), encoding="utf-8")
        elif model.vocabulary is not None:
            shutil.copyfile(model.vocabulary, target / "tokenizer.json")
        _write_config(target, document, experts, left)

    return Plan(list(to_safetensors(model)), "safetensors", experts, before, _safetensors_head, beside)


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
