"""The kernel texts, and a cache of what was compiled from them."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath

from filelock import FileLock

from mxharness import paths
from mxharness.errors import UserError

_KERNEL = re.compile(r'extern "C" __global__ void\s+(?:(?:CLUSTER_OF|__launch_bounds__)\([^;{]*?\)\s+)*(\w+)\(')
_INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)
_PARAMETER = re.compile(r"[\s*&](\w+)\s*$")


@dataclass(frozen=True)
class Sources:
    """Every text under kernels/, by relative path; a planted fault is a copy with one text changed."""

    files: tuple[tuple[str, str], ...]

    def text(self, name: str) -> str:
        """The text of one file; UserError, listing the files, where there is none of that name."""
        for path, text in self.files:
            if path == name:
                return text
        raise UserError(f"no kernel file '{name}'; there are {', '.join(path for path, _ in self.files)}")

    def replaced(self, name: str, old: str, new: str) -> Sources:
        """A copy in which `old`, which must occur exactly once in file `name`, is `new`."""
        text = self.text(name)
        count = text.count(old)
        if count != 1:
            raise UserError(f"the text to replace occurs {count} times in kernels/{name}, it must occur once: {old!r}")
        return Sources(tuple((path, text.replace(old, new) if path == name else kept) for path, kept in self.files))

    def edited(self, name: str, start: int, end: int, new: str) -> Sources:
        """A copy in which characters `start` to `end` of file `name` are `new`."""
        text = self.text(name)
        changed = text[:start] + new + text[end:]
        return Sources(tuple((path, changed if path == name else kept) for path, kept in self.files))

    def names(self) -> tuple[str, ...]:
        """The .cu files."""
        return tuple(path for path, _ in self.files if path.endswith(".cu"))

    def kernels(self, name: str) -> tuple[str, ...]:
        """The entry points of one .cu file."""
        return tuple(_KERNEL.findall(self.text(name)))

    def parameters(self, name: str, kernel: str) -> tuple[str, ...]:
        """What an entry point's parameters are called; "" for one without a name."""
        for found in _KERNEL.finditer(self.text(name)):
            if found[1] == kernel:
                text = self.text(name)[found.end() :]
                each = text[: text.index(")")].split(",")
                return tuple(match[1] if (match := _PARAMETER.search(part)) else "" for part in each)
        return ()

    def included(self, name: str) -> frozenset[str]:
        """A file and all files of the project that it includes, directly or not."""
        texts = dict(self.files)
        found: set[str] = set()
        left = [name]
        while left:
            file = left.pop()
            if file in texts and file not in found:
                found.add(file)
                beside = PurePath(file).parent
                for other in _INCLUDE.findall(texts[file]):
                    left += [other, (beside / other).as_posix()]
        return frozenset(found)

    def digest(self, *names: str) -> str:
        """The sha256 over files and all that they include; over every text there is where none is named."""
        wanted = frozenset[str]().union(*map(self.included, names))
        parts = [part for file in self.files if not names or file[0] in wanted for part in file]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def folder(self) -> Path:
        """A folder that holds exactly these texts, for a compiler to read; named by their content.

        Not kernels/ itself: what is cached under the digest of a text must have been compiled from that text, also
        when somebody saves a file in the meantime.
        """
        target = paths.cache() / "sources" / self.digest()[:24]
        if target.exists():
            return target
        with _writing(target.parent):
            fresh = Path(tempfile.mkdtemp(dir=target.parent))
            fresh.chmod(0o755)
            for path, text in self.files:
                (fresh / path).parent.mkdir(parents=True, exist_ok=True)
                (fresh / path).write_text(text)
            try:
                fresh.rename(target)
            except OSError:  # another process was first; its folder holds the same texts
                shutil.rmtree(fresh)
        return target


@cache
def shipped() -> Sources:
    """The kernels as they are in kernels/."""
    root = paths.kernels()
    suffixes = {".cu", ".cuh", ".h", ".cpp"}
    found = sorted(path for path in root.rglob("*") if path.suffix in suffixes)
    return Sources(tuple((path.relative_to(root).as_posix(), path.read_text()) for path in found))


def compiled(kind: str, suffix: str, key: tuple[str, ...], build: Callable[[Path], object]) -> Path:
    """The cached file for `key`, made by `build(path)` when it is not there; written atomically.

    kind names the cache's subfolder. Of concurrent callers with one key one builds and the others wait.
    """
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:32]
    target = paths.cache() / kind / f"{digest}{suffix}"
    if target.exists():
        return target
    lock = target.with_name(f"{target.name}.lock")
    with _writing(target.parent), FileLock(lock):
        try:
            if not target.exists():
                _write(target, suffix, build)
        finally:
            lock.unlink(missing_ok=True)  # who waits for it finds the target, or builds what could not be built here
    return target


def _write(target: Path, suffix: str, build: Callable[[Path], object]) -> None:
    handle, temporary = tempfile.mkstemp(suffix=suffix, dir=target.parent)
    os.close(handle)
    try:
        build(Path(temporary))
        Path(temporary).chmod(0o755)
        Path(temporary).replace(target)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Make `folder`; UserError, naming the way out, where the cache cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"cannot write the cache {folder} ({error.strerror}); MXHARNESS_CACHE names another") from error
