"""The embedded model: a small gpt-oss of the project's own, in the package, for machines without a network.

6 layers of 192 features, 8 experts of which a token has 2, sinks, sliding windows, YaRN, 1,024 tokens of byte-level
BPE, 3.8 million parameters. Trained by examples/embedded_model on public-domain prose; data/embedded/record.json says
which, and how. Its text is nobody's idea of English: it is there so that a real perplexity can be measured anywhere.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxharness.errors import UserError
from mxharness.model import safetensors
from mxharness.model.tensorfile import file_sha256

if TYPE_CHECKING:
    from mxharness.model.checkpoint import Checkpoint

NAMES = {"embedded": "mxfp4", "embedded-original": "original"}
"""The model's two names, and their folders: MXFP4 as stored, and the bfloat16 weights that it was quantised from."""


def embedded(*, original: bool = False) -> Checkpoint:
    """The model with every matrix in MXFP4 by the OCP rule; original: with the weights as trained, bfloat16.

    Raises UserError where a file is not the one that was published.
    """
    name = "embedded-original" if original else "embedded"
    check(name)
    return replace(safetensors.read(folder(name)), name=name)


def folder(name: str) -> Path:
    """Where the files of one of NAMES lie."""
    return _root() / NAMES[name]


def check(name: str) -> None:
    """UserError unless the files are those of the record."""
    for file, digest in record()["files"].items():
        path = _root() / file
        if path.parent == folder(name) and (not path.is_file() or file_sha256(path) != digest):
            raise UserError(f"the embedded model's {file} is not the file that was published; install mxharness again")


def record() -> dict[str, Any]:
    """What it was trained on and how: sources with licences and hashes, sizes, curve, machine, hashes of the files."""
    document: dict[str, Any] = json.loads((_root() / "record.json").read_text("utf-8"))
    return document


def _root() -> Path:
    return Path(str(resources.files("mxharness"))) / "data" / "embedded"
