"""Baselines in an object store: texts under the hash of their content, then one small pointer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from mxharness.document import API_VERSION, parse_document
from mxharness.errors import UserError
from mxharness.stores.common import DEVICE_CLASS, NAME, Texts, exists

UNREACHED = timedelta(days=1)
"""Age at which an object that no baseline names is waste; a younger one may belong to a writer that is not done."""


@dataclass(frozen=True)
class Objects:
    """<url>/<device class>/<NAME>.json, a small pointer that names <url>/objects/<sha256>.json, which holds all texts.

    Object stores rename nothing, but put one object whole. The texts go first, under the hash of their content, where
    they collide with nothing; the pointer goes last. A new name is put on condition that it does not exist, and one
    that is replaced on S3 on condition that it is still what was read. What a pointer named before stays until `prune`.
    """

    url: str
    fs: Any
    """fsspec's file system; fsspec has no types."""
    path: str

    def names(self) -> list[tuple[str, str]]:
        """(device class, name) of every pointer, sorted."""
        with self._reached():
            self.fs.invalidate_cache()
            places = [str(place).rsplit("/", 2)[1:] for place in self.fs.glob(f"{self.path}/*/*.json")]
        pairs = [(device_class, file.removesuffix(".json")) for device_class, file in places]
        return sorted(pair for pair in pairs if DEVICE_CLASS.fullmatch(pair[0]) and NAME.fullmatch(pair[1]))

    def place(self, device_class: str, name: str) -> str:
        """The pointer's address."""
        return f"{self.url}/{device_class}/{name}.json"

    def read(self, device_class: str, name: str) -> Texts | None:
        """The texts that the pointer names, their hash checked."""
        digest = self._pointer(device_class, name)
        if digest is None:
            return None
        place = f"{self.url}/objects/{digest}.json"
        body = self._get(f"objects/{digest}")
        if body is None:
            raise UserError(f"baseline {self.place(device_class, name)} is damaged: {place} is missing")
        if hashlib.sha256(body).hexdigest() != digest:
            raise UserError(f"baseline {place} is damaged: its content is not what its name says")
        texts = parse_document(body.decode(), place, "baseline").get("files")
        if not isinstance(texts, dict):
            raise UserError(f"baseline {place} is damaged: it has no 'files'")
        return {str(stem): str(text) for stem, text in texts.items()}

    def write(self, device_class: str, name: str, texts: Texts, *, replace: bool) -> str:
        """Put the texts, then the pointer."""
        place = self.place(device_class, name)
        body = json.dumps({"api_version": API_VERSION, "files": dict(texts)}, sort_keys=True, indent=0).encode()
        digest = hashlib.sha256(body).hexdigest()
        with self._reached():
            self.fs.invalidate_cache()
            here = f"{self.path}/{device_class}/{name}.json"
            there = self.fs.exists(here)
            if there and not replace:
                raise exists(device_class, name)
            condition = {"IfMatch": self.fs.info(here)["ETag"]} if there and "s3" in self.fs.protocol else {}
            self.fs.makedirs(f"{self.path}/objects", exist_ok=True)
            self.fs.makedirs(f"{self.path}/{device_class}", exist_ok=True)
            self.fs.pipe_file(f"{self.path}/objects/{digest}.json", body)
            pointer = json.dumps({"api_version": API_VERSION, "sha256": digest}).encode()
            try:
                self.fs.pipe_file(here, pointer, mode="overwrite" if there else "create", **condition)
            except FileExistsError as error:
                raise exists(device_class, name) from error
            except OSError as error:
                if condition and "condition" in str(error).lower():
                    raise UserError(f"somebody else has just replaced {place}; nothing was blessed") from error
                raise
        return place

    def remove(self, device_class: str, name: str) -> None:
        """Delete the pointer, and every object that no pointer names and that is older than UNREACHED."""
        with self._reached():
            if self.fs.exists(f"{self.path}/{device_class}/{name}.json"):
                self.fs.rm_file(f"{self.path}/{device_class}/{name}.json")
        named = {self._pointer(*pair) for pair in self.names()}
        with self._reached():
            for place in self.fs.glob(f"{self.path}/objects/*.json"):
                digest = str(place).rpartition("/")[2].removesuffix(".json")
                if digest not in named and datetime.now(UTC) - self.fs.modified(place) > UNREACHED:
                    self.fs.rm_file(place)

    def _pointer(self, device_class: str, name: str) -> str | None:
        """The hash that a pointer holds; None where there is no such pointer."""
        body = self._get(f"{device_class}/{name}")
        if body is None:
            return None
        place = self.place(device_class, name)
        try:
            text = body.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"baseline {place} is damaged: {error}") from error
        digest = parse_document(text, place, "baseline").get("sha256")
        if not re.fullmatch("[0-9a-f]{64}", str(digest)):
            raise UserError(f"baseline {place} is damaged: it names no sha256")
        return str(digest)

    def _get(self, stem: str) -> bytes | None:
        with self._reached():
            try:
                return bytes(self.fs.cat_file(f"{self.path}/{stem}.json"))
            except FileNotFoundError:
                return None

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """UserError, one sentence, for whatever a service or the way to it raises."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # every service has its own: botocore's are no OSError
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"cannot use the baselines at {self.url}: {said}") from error
