"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mxharness.errors import UserError


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """A path beside `target` to make a file or folder at; it is moved to `target` when the block ends without an error.

    On an error, Ctrl-C or SIGTERM nothing stays; only SIGKILL and a power cut leave a hidden folder ".NAME.xxxxxxxx".
    Raises UserError where `target` is there already, be it a link to nothing, or its folder is not.
    """
    if os.path.lexists(target):
        raise UserError(f"{target} is there already and is not written over; choose another name or remove it")
    if not target.parent.is_dir():
        raise UserError(f"no folder {target.parent} to write {target.name} to")
    with _stopped_by_sigterm():
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            made = folder / target.name
            yield made
            for path in (made, *made.iterdir()) if made.is_dir() else (made,):
                _sync(path)
            if os.path.lexists(target):
                raise UserError(f"{target} has appeared meanwhile and is not written over")
            made.replace(target)
            _sync(target.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as an exception does, so that it can tidy up; only a main thread may ask for that."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
