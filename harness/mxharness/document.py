"""JSON documents on disk: written whole or not at all, read with their version checked, NaN and infinities kept."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mxharness.errors import UserError

API_VERSION = 1
"""Version of the JSON layout. A file with a larger number is refused, not guessed at."""

Labelled = Mapping[str, object]
"""One row of named values: strings, numbers and booleans."""

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def read_document(path: Path, kind: str) -> dict[str, Any]:
    """The JSON object in `path`, its api_version checked. Raises UserError naming `kind` and the reason."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {kind} {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{kind} {path} is damaged: {error}") from error
    return parse_document(text, path, kind)


def parse_document(text: str, path: Path | str, kind: str) -> dict[str, Any]:
    """The JSON object in a text that was read from `path`. Raises as read_document."""
    try:
        document: object = json.loads(text)
    except ValueError as error:
        raise UserError(f"{kind} {path} is damaged: {error}") from error
    version = document.get("api_version") if isinstance(document, dict) else None
    if not isinstance(document, dict) or type(version) is not int:
        raise UserError(f"{path} is not a {kind}: it has no api_version")
    if version > API_VERSION:
        raise UserError(
            f"{kind} {path} has api_version {version} and this mxharness reads up to {API_VERSION}; update mxharness"
        )
    return document


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (UTF-8) or bytes beside `path` and rename them into place, so that no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def json_ready(value: object) -> object:
    """`value` with every float JSON cannot hold replaced by its name; undone by `revived`."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return value


def revived(row: Mapping[str, object]) -> Labelled:
    """`row` with the names of non-finite floats turned back into floats."""
    return {key: _NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}


def rows_text(head: Mapping[str, object], name: str, rows: Mapping[str, object]) -> str:
    """JSON with sorted keys and one row a line, so that a diff shows which rows changed."""
    document = {"api_version": json.dumps(API_VERSION)} | {key: json.dumps(value) for key, value in head.items()}
    lines = [f"  {json.dumps(row)}: {json.dumps(json_ready(rows[row]), sort_keys=True)}" for row in sorted(rows)]
    document[name] = "{\n" + ",\n".join(lines) + "\n }" if lines else "{}"
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {document[key]}" for key in sorted(document)) + "\n}\n"
