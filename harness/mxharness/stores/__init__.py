"""Where baselines lie: a folder, or any address that fsspec knows ("s3://bucket/baselines").

A store keeps texts by device class, baseline and stem. Whatever happens in the middle of a write (another writer, a
kill, a full disk), a reader gets the texts of one `write`, all of them, the old ones or the new ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mxharness.errors import UserError
from mxharness.stores.common import Texts
from mxharness.stores.folder import Folder
from mxharness.stores.objects import Objects


class Store(Protocol):
    """One place that holds baselines."""

    def names(self) -> list[tuple[str, str]]:
        """(device class, name) of every baseline, sorted."""

    def place(self, device_class: str, name: str) -> Path | str:
        """Where a baseline lies, whether or not it exists."""

    def read(self, device_class: str, name: str) -> Texts | None:
        """A baseline's texts; None where there is none of that name. Raises UserError where it cannot be read."""

    def write(self, device_class: str, name: str, texts: Texts, *, replace: bool) -> Path | str:
        """Publish texts whole, and return their place. Raises UserError where they exist and replace is False."""

    def remove(self, device_class: str, name: str) -> None:
        """Take a baseline away; nothing where there is none."""


def open_store(root: Path | str) -> Store:
    """The store at a folder or at a URL. Raises UserError for a protocol that fsspec does not have here."""
    address = str(root)
    if "://" not in address or address.startswith(("file://", "local://")):
        return Folder(Path(address.partition("://")[2] or address))
    try:
        import fsspec  # type: ignore[import-untyped]  # it ships no types

        return Objects(address.rstrip("/"), *fsspec.url_to_fs(address.rstrip("/")))
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot open {address}: {error}; pip install 'mxharness[remote]' brings s3://") from error
