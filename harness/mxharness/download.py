"""One file over HTTP: resumed with Range requests, checked against a size and a sha256, deleted where they differ."""

from __future__ import annotations

import hashlib
import http.client
import sys
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 1 << 18
_TIMEOUT = 10  # seconds without a byte
_ATTEMPTS = 3  # in a row that brought nothing new


class DownloadError(Exception):
    """One source did not give the file; the message is a clause that says why."""


@dataclass(frozen=True)
class Blob:
    """A file known by its content."""

    name: str
    size: int
    """Bytes."""
    sha256: str


def check(path: Path, blob: Blob) -> str | None:
    """What is wrong with the file at `path`; None where it is the blob."""
    size = path.stat().st_size
    if size != blob.size:
        return f"{path.name} has {size:,} bytes, not {blob.size:,}"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == blob.sha256 else f"{path.name} has sha256 {digest}, not {blob.sha256}"


def download(url: str, blob: Blob, folder: Path, *, progress: bool = False) -> Path:
    """Get `url` into `folder` and return the checked file; its name carries the hash.

    Bytes of an earlier call are kept and only the rest is asked for. A connection that breaks is opened again as
    long as it brings something. A file with another size or hash is deleted, and where the first part of it was an
    earlier call's, asked for once more from the start. progress: a bar on stderr.

    Raises DownloadError where the address gives no such file; what arrived of the right length stays for the next call.
    """
    partial = folder / f"{blob.sha256[:16]}-{blob.name}"
    while True:
        inherited = partial.is_file()
        _fill(url, partial, blob, progress)
        damage = check(partial, blob)
        if damage is None:
            return partial
        partial.unlink()
        if not inherited:
            raise DownloadError(f"what {_shown(url)} gave was deleted, {damage}")


def _fill(url: str, partial: Path, blob: Blob, progress: bool) -> None:
    """Ask until `partial` is as long as the blob."""
    idle = 0
    while _length(partial) < blob.size:
        before = _length(partial)
        try:
            _append(url, partial, blob, progress)
        except urllib.error.HTTPError as error:
            raise DownloadError(f"{_shown(url)} answers {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            failure = getattr(error, "reason", None) or error
        else:
            failure = "the connection ended early"
        idle = 0 if _length(partial) > before else idle + 1
        if idle >= _ATTEMPTS or (idle and not before):
            raise DownloadError(f"{_shown(url)}: {failure}")


def _append(url: str, partial: Path, blob: Blob, progress: bool) -> None:
    """Ask for what is missing and append what comes; an answer with the whole file starts over."""
    from tqdm import tqdm

    have = _length(partial)
    request = urllib.request.Request(  # noqa: S310 -- the address is a constant's or pip's, the content is hashed
        url, headers={"User-Agent": "mxharness", **({"Range": f"bytes={have}-"} if have else {})}
    )
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:  # noqa: S310 -- as above
        resumed = (answer.headers.get("Content-Range") or "").startswith(f"bytes {have}-")
        length = answer.headers.get("Content-Length")
        if length and int(length) != blob.size - (have if resumed else 0):
            raise DownloadError(f"{_shown(url)} gives {int(length):,} bytes, {blob.name} has {blob.size:,}")
        bar = tqdm(
            total=blob.size,
            initial=have if resumed else 0,
            desc=blob.name,
            unit="B",
            unit_scale=True,
            disable=not progress,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )
        with partial.open("ab" if resumed else "wb") as out, bar:
            # One byte more than there should be is enough to know that it is another file.
            while (left := blob.size + 1 - out.tell()) and (chunk := answer.read(min(_CHUNK, left))):
                out.write(chunk)
                bar.update(len(chunk))


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _shown(url: str) -> str:
    """The address without a password or query."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
