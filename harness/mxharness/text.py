"""The text a perplexity is measured on: WikiText-2 where it can be had, and an embedded text where not.

The only place that imports datasets. A text is known by its hash, never by its name: only the bytes of the original
`wiki.test.raw` are called WikiText-2. The rows of the data set on the hub become that file again by one rule: an empty
row is a line of one space, every other row ends with its own line feed. Licence of WikiText-2: CC BY-SA 3.0 and GFDL.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from mxharness import paths
from mxharness.errors import Unavailable, UserError
from mxharness.fetch import hub_address, hub_is_off

WIKITEXT2_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
WIKITEXT2_LABEL = "WikiText-2 raw test"
_WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1")
_EMBEDDED = ("jargon-file-4.4.7.txt", "38443edaaea1b25db5f3ffd4efc3634d5e95e0cea7c43b6e4e5512c7381d81af")
_EMBEDDED_LABEL = "Jargon File 4.4.7, chapters 1 to 9, embedded (not WikiText-2)"
_ENVIRONMENT = "MXHARNESS_WIKITEXT"
_HUB_TIMEOUT = 5  # seconds until the hub counts as out of reach; datasets itself would try for half a minute


@dataclass(frozen=True)
class Text:
    """A text and what it is."""

    name: str
    """The source: "wikitext-2", "default" or a file name."""
    label: str
    """What every result says beside its number."""
    text: str
    sha256: str
    """Of the text in UTF-8."""
    note: str = ""
    """Why it is not the text that was wanted first; empty where it is."""


def load_text(source: str = "auto") -> Text:
    """The text called `source`.

    "wikitext-2"  the raw test split, from MXHARNESS_WIKITEXT (a file), the cache or the hub; nothing else will do
    "default"     the embedded public-domain text
    "auto"        "wikitext-2", or "default" with a note where that cannot be had
    a path        a .parquet file with a column "text", or a UTF-8 text file, labelled by its hash

    Raises UserError for a file that is missing, unreadable or, from MXHARNESS_WIKITEXT, not WikiText-2; Unavailable for
    "wikitext-2" out of reach and without datasets.
    """
    if source == "default":
        return _embedded()
    if source == "wikitext-2":
        return _wikitext2()
    if source == "auto":
        try:
            return _wikitext2()
        except Unavailable as error:
            return replace(_embedded(), note=str(error))
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"no text '{source}'; there are auto, wikitext-2, default and the path of a file")
    return _local(path)


def join_rows(rows: Iterable[str]) -> str:
    """The file that the data set's rows were made from."""
    return "".join(row or " \n" for row in rows)


def _text(name: str, text: str, label: str = "") -> Text:
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest == WIKITEXT2_SHA256:
        return Text(name, WIKITEXT2_LABEL, text, digest)
    return Text(name, label or f"{name}, sha256 {digest[:12]} (not WikiText-2)", text, digest)


def _embedded() -> Text:
    file, digest = _EMBEDDED
    text = _text("default", resources.files("mxharness").joinpath("data", file).read_text("utf-8"), _EMBEDDED_LABEL)
    if text.sha256 != digest:
        raise UserError(f"the embedded text {file} has sha256 {text.sha256}, not {digest}; install mxharness again")
    return text


def _wikitext2() -> Text:
    named = os.environ.get(_ENVIRONMENT)
    kept = paths.cache() / "wiki.test.raw"
    if named:
        if not Path(named).is_file():
            raise UserError(f"{_ENVIRONMENT} names {named}, and there is no such file")
        text = _local(Path(named))
        if text.sha256 != WIKITEXT2_SHA256:
            raise UserError(
                f"{_ENVIRONMENT} names {named}, whose text has sha256 {text.sha256}; the raw test split has "
                f"{WIKITEXT2_SHA256} (1,290,590 bytes)"
            )
    elif kept.is_file() and (text := _local(kept)).sha256 == WIKITEXT2_SHA256:
        pass
    else:
        text = _text("wikitext-2", join_rows(_hub_rows()))
        if text.sha256 != WIKITEXT2_SHA256:
            raise Unavailable(
                f"the hub's {'/'.join(_WIKITEXT2)} gives a text of sha256 {text.sha256}, WikiText-2's raw test split "
                f"has {WIKITEXT2_SHA256}; {_ENVIRONMENT} can name a file"
            )
        _keep(text, kept)
    return replace(text, name="wikitext-2")


def _keep(text: Text, path: Path) -> None:
    """Leave the text in the cache for a day without a network."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(text.text.encode())
    temporary.replace(path)


def _local(path: Path) -> Text:
    """A file through datasets."""
    datasets = _datasets()
    kind = "parquet" if path.suffix == ".parquet" else "text"
    options: dict[str, Any] = {} if kind == "parquet" else {"sample_by": "document", "encoding": "utf-8"}
    try:
        rows = datasets.load_dataset(
            kind,
            data_files={"test": str(path.resolve())},
            split="test",
            cache_dir=str(paths.cache() / "datasets"),
            **options,
        )
        texts = list(rows["text"])
    except Exception as error:  # datasets raises what its readers, pyarrow and pandas raise
        cause = error.__cause__ or error
        wanted = "a parquet file with a column 'text'" if kind == "parquet" else "UTF-8 text"
        raise UserError(f"{path} cannot be read as {wanted}: {cause}") from error
    return _text(path.name, join_rows(texts) if kind == "parquet" else "".join(texts))


def _hub_rows() -> Iterable[str]:
    name = "/".join(_WIKITEXT2)
    if not hub_is_off():
        _reach_hub()
    try:
        rows: Iterable[str] = _datasets().load_dataset(*_WIKITEXT2, split="test")["text"]
    except (OSError, ValueError, RuntimeError) as error:
        raise Unavailable(f"{name} cannot be had from the hub ({error}); {_ENVIRONMENT} can name a file") from error
    return rows


def _reach_hub() -> None:
    """Fail within seconds where there is no hub."""
    endpoint = hub_address()
    request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310 -- a constant or the user's own setting
    try:
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT):  # noqa: S310 -- as above
            return
    except urllib.error.HTTPError:
        return  # it answers; what it says is for datasets to judge
    except (OSError, ValueError) as error:
        raise Unavailable(
            f"WikiText-2 cannot be had: {endpoint} is out of reach ({getattr(error, 'reason', error)}) and "
            f"{_ENVIRONMENT} names no file"
        ) from error


def _datasets() -> Any:  # noqa: ANN401 -- a module
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise Unavailable("reading WikiText-2 needs the package datasets: pip install 'mxharness[model]'") from error
    datasets.disable_progress_bars()
    return datasets
