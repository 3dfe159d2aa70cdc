"""What the commands share: exit codes, options, JSON and tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from mxharness.errors import UserError
from mxharness.protocols import DEFAULT_PROTOCOL, PROTOCOLS

PASS, MISMATCH, USAGE = 0, 1, 2
_SHORT = 36
"""A first column of names up to so many characters is not folded: a name is there to be copied."""

_INSTALL = {
    "torch": "pip install torch==2.13.0 (on a machine without a GPU add --index-url https://download.pytorch.org/whl/cpu)",
    "pycuda": "pip install 'mxharness[cuda]'",
    **dict.fromkeys(("datasets", "gguf", "huggingface_hub", "tokenizers"), "pip install 'mxharness[model]'"),
    **dict.fromkeys(("accelerate", "transformers", "xdist"), "pip install 'mxharness[test]'"),
}

DEFAULT_MODEL = "embedded"
"""What is measured where no model is named."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "host", "cuda"]),
    default="auto",
    show_default=True,
    help="Where kernels run. auto: cuda where a GPU, a driver, pycuda and nvcc are present, else host.",
)
model_option = click.option(
    "--model", default=DEFAULT_MODEL, show_default=True, help="A model that `fetch` knows, or a file or folder."
)
text_option = click.option(
    "--text",
    default="auto",
    show_default=True,
    help='"wikitext-2", "default" (embedded), "auto" (the first, else the second), or a file.',
)
protocol_option = click.option(
    "--protocol",
    type=click.Choice(tuple(PROTOCOLS)),
    default=DEFAULT_PROTOCOL,
    show_default=True,
    help="Which windows are read and which of their tokens are scored.",
)
limit_option = click.option(
    "--limit", type=click.IntRange(min=1), metavar="TOKENS", help="Use the text's first TOKENS tokens only."
)
FILES = "run.json, report.html, junit.xml, run.csv and summary.md"
"""What a run leaves (docs/report.md)."""
out_settings: dict[str, Any] = {
    "type": click.Path(path_type=Path, file_okay=False),
    "default": Path("mxharness-out"),
    "show_default": True,
}


def missing_package(error: ModuleNotFoundError) -> str:
    """Turn a failed import of a known package into one sentence; re-raise any other, which is a bug of ours."""
    name = (error.name or "").partition(".")[0]
    if name not in _INSTALL:
        raise error
    return f"mxharness needs {name}: {_INSTALL[name]}"


def file_error(error: OSError) -> str:
    """One sentence for a file or folder that the system refuses."""
    from mxharness import paths

    name = str(error.filename or "")
    message = f"{error.strerror or error}{f': {name}' if name else ''}"
    cache = str(paths.cache())
    return f"{message}; set MXHARNESS_CACHE to a cache folder that can be used" if name.startswith(cache) else message


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document on standard output."""
    from mxharness.document import json_ready

    click.echo(json.dumps(json_ready(document), indent=2, allow_nan=False, default=str))  # str: paths


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on standard output; what does not fit the terminal is folded, never cut; short names stay whole."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    click.secho(title, bold=True)
    table = Table(box=None, pad_edge=False)
    rows = list(rows)
    short_names = max((len(str(row[0])) for row in rows), default=0) <= _SHORT
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=i == 0 and short_names)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console = Console()
    console.print(table)
    console.print()


def short(value: object) -> str:
    """A float with six significant digits, anything else as it is."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def folder(path: Path) -> Path:
    """`path` as an existing folder that can be written to. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to '{path}': {error.strerror}") from error
    return path
