"""A model by its name or path: whatever the file is, one checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from mxharness import fetch
from mxharness.errors import UserError
from mxharness.model import embedded, gguf, safetensors
from mxharness.model.checkpoint import Checkpoint


def load(name: str | os.PathLike[str]) -> Checkpoint:
    """The model called `name`, embedded or fetched if need be, or the one at a path.

    A path is a .gguf file, a .safetensors file with its config.json beside it, or a folder of these two as Hugging Face
    lays it out. Raises UserError, in one sentence, for what cannot be read; nothing is ever unpickled.
    """
    if name in embedded.NAMES:
        return embedded.embedded(original=name == "embedded-original")
    path = find(name)
    return gguf.read(path) if path.suffix == ".gguf" else safetensors.read(path)


def find(name: str | os.PathLike[str]) -> Path:
    """The file or folder that `name` means, embedded or fetched if need be.

    Raises UserError for what is none, and for formats that are not read.
    """
    if name in embedded.NAMES:
        embedded.check(str(name))
        return embedded.folder(str(name))
    if name in fetch.ARTEFACTS:
        return fetch.fetch(str(name))
    path = Path(name)
    if path.suffix in safetensors.PICKLES:
        raise UserError(
            f"{path} may hold pickled code, which runs when it is opened, and is not opened; "
            "save the model as safetensors (save_pretrained does)"
        )
    if path.suffix == ".gguf" or path.is_dir():
        return path
    if path.suffix == ".safetensors" and path.is_file():
        return path
    raise UserError(
        f"no model '{name}'; there are {', '.join((*fetch.ARTEFACTS, *embedded.NAMES))}, .gguf files, .safetensors "
        "files and folders with config.json and model.safetensors"
    )
