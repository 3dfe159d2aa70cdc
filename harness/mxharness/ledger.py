"""Failures that are known: a committed list with a reason and an end, strict both ways.

A listed check that fails is a known failure and fails no run; a listed check that passes does, and so do an entry whose
day has passed and one that stands for nothing. The list is baselines/known_failures.toml:

    [[failure]]
    check = "gemm-3x33x64-bf16-* bound"    # a check's "case gate", or a test's node id; * and ? as in a shell
    device = "sm_90"                       # the device class, or "*"
    reason = "the last K block is added twice; being mended"
    expires = 2026-12-31                   # the last day on which it is excused
    where = "https://example.org/issues/7" # who answers for it, or where it is discussed
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import date, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mxharness import paths
from mxharness.errors import UserError

FILE = "known_failures.toml"


@dataclass(frozen=True)
class Entry:
    """One known failure."""

    check: str
    """Pattern over "case gate" of checks and node ids of other tests; brackets stand for themselves."""
    device: str
    """Device class, a pattern, too."""
    reason: str
    expires: date
    where: str

    def holds_for(self, name: str) -> bool:
        """Whether a check's "case gate" or a test's node id is meant."""
        return fnmatchcase(name, self.check.replace("[", "[[]"))

    def row(self, name: str) -> dict[str, str]:
        """For the record of a run: this entry as the excuse of one check."""
        return {**{key: str(value) for key, value in asdict(self).items()}, "check": name, "entry": self.check}


def load(path: Path | None = None) -> tuple[Entry, ...]:
    """The entries of a ledger, of the one that came with this version for None.

    Raises UserError, one sentence, for a file that cannot be read or an entry that lacks something.
    """
    path = path or paths.baselines() / FILE
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the known failures {path}: {error.strerror}") from error
    except ValueError as error:  # no TOML, or no text
        raise UserError(f"the known failures {path} are damaged: {error}") from error
    rows = document.pop("failure", [])
    if document or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"the known failures {path} hold something else than [[failure]] tables")
    return tuple(_entry(row, number, path) for number, row in enumerate(rows, 1))


def _entry(row: Mapping[str, Any], number: int, path: Path) -> Entry:
    names = [field.name for field in fields(Entry)]
    label = f"entry {number} of {path}"
    for name in names:
        value = row.get(name)
        if value is None:
            raise UserError(f"{label} has no {name}; an entry has {', '.join(names)}")
        if name == "expires":
            if not isinstance(value, date) or isinstance(value, datetime):
                raise UserError(f"{label}: expires must be a date such as 2026-12-31, without quotes, not {value!r}")
        elif not isinstance(value, str) or not value.strip():
            raise UserError(f"{label}: {name} must be a text that is not empty, not {value!r}")
    unknown = sorted(set(row) - set(names))
    if unknown:
        raise UserError(f"{label} has an unknown {unknown[0]}; an entry has {', '.join(names)}")
    return Entry(**row)


def of_device(entries: Iterable[Entry], device_class: str) -> tuple[Entry, ...]:
    """Those that speak about this device class."""
    return tuple(entry for entry in entries if fnmatchcase(device_class, entry.device))


def excuse(entries: Iterable[Entry], name: str, today: date) -> Entry | None:
    """The entry that lists a check's "case gate" or a test's node id, and has not expired."""
    return next((entry for entry in entries if entry.expires >= today and entry.holds_for(name)), None)


def expired(entries: Iterable[Entry], today: date) -> tuple[str, ...]:
    """A sentence for each entry whose day has passed."""
    return tuple(
        f"known failure '{entry.check}' expired on {entry.expires}: mend it or renew it ({entry.where})"
        for entry in entries
        if entry.expires < today
    )


def unused(entries: Iterable[Entry], names: Collection[str]) -> tuple[str, ...]:
    """A sentence for each entry that none of `names`, all there is, is meant by."""
    return tuple(
        f"known failure '{entry.check}' on {entry.device} matches nothing: delete it"
        for entry in entries
        if not any(entry.holds_for(name) for name in names)
    )


def passes(name: str, entry: str) -> str:
    """The sentence about a listed check that passed."""
    return f"{name} is listed as known failure but passes: delete '{entry}'"
