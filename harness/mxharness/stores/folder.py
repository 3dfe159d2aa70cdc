"""Baselines in a folder: whole folders renamed into place, under a lock that ends with its holder."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mxharness.errors import UserError
from mxharness.stores.common import DEVICE_CLASS, NAME, Texts, exists

_NO_LOCKS = {errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
"""What a file system says that cannot lock folders, NFS for one. Renames are whole there, too."""


@dataclass(frozen=True)
class Folder:
    """<root>/<device class>/<NAME>/<stem>.json; a whole folder is written beside the old one and renamed into place.

    Writers of one device class wait for each other by a lock on its folder, which ends with the process that holds it.
    What a killed writer left, hidden, is read where it is the only copy, and cleared away by the next writer.
    """

    root: Path

    def names(self) -> list[tuple[str, str]]:
        """(device class, name) of every baseline, sorted."""
        found = set()
        for folder in self.root.glob("*/*"):
            name = folder.name if not folder.name.startswith(".") else _displaced(folder)
            if DEVICE_CLASS.fullmatch(folder.parent.name) and NAME.fullmatch(name) and folder.is_dir():
                found.add((folder.parent.name, name))
        return sorted(found)

    def place(self, device_class: str, name: str) -> Path:
        """The baseline's folder."""
        return self.root / device_class / name

    def read(self, device_class: str, name: str) -> Texts | None:
        """The texts of all .json files of the folder."""
        target = self.place(device_class, name)
        if not target.parent.is_dir():
            return None
        with _locked(target.parent, fcntl.LOCK_SH):
            folder = _standing(target)
            if folder is None:
                return None
            return {path.stem: _text(path) for path in sorted(folder.glob("*.json"))}

    def write(self, device_class: str, name: str, texts: Texts, *, replace: bool) -> Path:
        """Write a folder beside the one that is there, and rename."""
        target = self.place(device_class, name)
        if target.exists() and not replace:
            raise exists(device_class, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent, fcntl.LOCK_EX):
            _clear(target.parent)
            if target.exists() and not replace:
                raise exists(device_class, name)
            fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}.new."))
            try:
                for stem, text in texts.items():
                    (fresh / f"{stem}.json").write_text(text, encoding="utf-8")
                fresh.chmod(0o755)
                _swap(fresh, target)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
        return target

    def remove(self, device_class: str, name: str) -> None:
        """Hide the folder by one rename, then delete it."""
        target = self.place(device_class, name)
        if not target.parent.is_dir():
            return
        with _locked(target.parent, fcntl.LOCK_EX):
            _clear(target.parent)
            if target.exists():
                gone = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}.gone."))
                target.rename(gone / name)
                shutil.rmtree(gone)


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """Hold a lock on a folder; the system lets go of it when the process ends, however it ends."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, how)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(handle)


def _swap(fresh: Path, target: Path) -> None:
    """Rename `fresh` to `target`; what was there is back in place if that fails, else removed."""
    if not target.exists():
        fresh.rename(target)
        return
    old = fresh.with_name(fresh.name.replace(".new.", ".old."))
    target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _displaced(folder: Path) -> str:
    """The name of a baseline that a killed writer moved away and did not replace; "" for anything else."""
    name, mark, _ = folder.name[1:].rpartition(".old.")
    return name if mark else ""


def _standing(target: Path) -> Path | None:
    """The folder that holds a baseline: its own, or where a killed writer moved it to."""
    if target.is_dir():
        return target
    return next((path for path in sorted(target.parent.glob(".*.old.*")) if _displaced(path) == target.name), None)


def _clear(parent: Path) -> None:
    """Undo what killed writers left; the lock is held, so that no living one is at work."""
    for path in sorted(parent.glob(".*.old.*")):
        target = parent / _displaced(path)
        if target.exists():
            shutil.rmtree(path)
        else:
            path.rename(target)
    for pattern in (".*.new.*", ".*.gone.*"):
        for path in parent.glob(pattern):
            shutil.rmtree(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read baseline {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"baseline {path} is damaged: {error}") from error
