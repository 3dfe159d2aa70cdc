"""A model from safetensors: a folder with config.json and model.safetensors, in one file or in shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxharness.errors import UserError
from mxharness.model import huggingface
from mxharness.model.checkpoint import Checkpoint
from mxharness.model.safetensors_file import read as read_file
from mxharness.model.safetensors_file import rows
from mxharness.model.tensorfile import Entry, file_sha256

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
_TWO_TOO_LOW = ("0.12.", "0.13.")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read(path: Path) -> Checkpoint:
    """The model in a folder, or in a .safetensors file with config.json beside it.

    Raises UserError for missing, damaged or hostile files, another architecture or quantisation, and tensors that are
    missing, of another shape, or unknown; the weights themselves are read when they are asked for.
    """
    folder = path if path.is_dir() else path.parent
    document = read_json(folder / "config.json")
    config = huggingface.read_config(document, f"{folder.name}/config.json")
    check_quantization(document, folder.name)
    files, entries = read_entries(path)
    sources = {
        name: huggingface.Source(entry.shape, entry.format, partial(_whole, entry)) for name, entry in entries.items()
    }
    tokenizer = folder / "tokenizer.json"
    generation = folder / "generation_config.json"
    digest = hashlib.sha256()
    for file in (folder / "config.json", *files):
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return Checkpoint(
        name=folder.name if path.is_dir() else path.stem,
        sha256=digest.hexdigest(),
        config=config,
        tensors=huggingface.tensors(config, sources, folder.name),
        vocabulary=tokenizer if tokenizer.is_file() else None,
        ends=huggingface.ends(document, read_json(generation) if generation.is_file() else {}),
    )


def read_entries(path: Path) -> tuple[tuple[Path, ...], dict[str, Entry]]:
    """A model's files and its tensors, which `path`, a folder or one file, holds.

    Raises UserError where there are none, for a damaged file, and for an index that names what is not there or lies
    outside the folder.
    """
    if not path.is_dir():
        return (path,), read_file(path)
    index = path / INDEX
    if index.is_file():
        return _sharded(path, read_json(index))
    files = [path / "model.safetensors"] if (path / "model.safetensors").is_file() else [*path.glob("*.safetensors")]
    if len(files) != 1:
        pickles = [file.name for file in path.iterdir() if file.suffix in PICKLES]
        what = f"{len(files)} .safetensors files and no {INDEX}" if files else "no .safetensors file"
        hint = f"; {pickles[0]} may hold pickled code and is not opened" if pickles and not files else ""
        raise UserError(f"{path} has {what}{hint}")
    return (files[0],), read_file(files[0])


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError where there is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} holds no JSON object")
    return document


def check_quantization(document: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a quantisation other than MXFP4, as config.json names it."""
    quantization = document.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    form = quantization.get("format") if isinstance(quantization, Mapping) else None
    if method == "mxfp4":
        return
    if method == "compressed-tensors" and form == huggingface.PACKED_FORMAT:
        if str(quantization.get("version", "")).startswith(_TWO_TOO_LOW):
            raise UserError(
                f"{where} was written by compressed-tensors {quantization['version']}, which stores MXFP4's scales two "
                "too low; write it again with 0.14 or later"
            )
        return
    raise UserError(
        f"{where} is quantised by {method}{f', format {form}' if form else ''}; gpt-oss' mxfp4 and compressed-tensors' "
        f"{huggingface.PACKED_FORMAT} can be read"
    )


def _sharded(folder: Path, index: Mapping[str, Any]) -> tuple[tuple[Path, ...], dict[str, Entry]]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{folder / INDEX} has no weight_map from tensors to files")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX} names '{name}', which is no .safetensors file of this folder")
    shards = {name: read_file(folder / name) for name in names}
    entries = {}
    for tensor, name in places.items():
        if tensor not in shards[name]:
            raise UserError(f"{folder / INDEX} looks for '{tensor}' in {name}, which does not hold it")
        entries[tensor] = shards[name][tensor]
    return tuple(folder / name for name in names), entries


def _whole(entry: Entry) -> torch.Tensor:
    return rows(entry).view(entry.shape)
