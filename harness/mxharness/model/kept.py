"""The likelihoods of a measurement on disk: each batch when it is done, so that a killed measurement goes on.

    FOLDER/measurement.json    what fixes the numbers
           00000.safetensors   a batch's likelihoods, while others are missing
           nll.safetensors     all of them: nll (T,) float32 in nats, windows (W, 3) int64: start, stop, first scored;
                               its metadata are measurement.json's

Every file appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mxharness.document import read_document, write_atomically
from mxharness.errors import UserError

if TYPE_CHECKING:
    from mxharness.protocols import Span

    Floats = np.ndarray[tuple[int], np.dtype[np.float32]]

_IDENTITY = "measurement.json"
_WHOLE = "nll.safetensors"


@dataclass(frozen=True)
class Kept:
    """A folder of one measurement."""

    folder: Path

    def batch(self, number: int, scored: int) -> Floats | None:
        """The likelihoods (scored,) of one batch, None where they are not there or cannot be read."""
        return _likelihoods(self._path(number), scored)

    def keep(self, number: int, nll: Floats) -> None:
        """Write one batch."""
        from safetensors.numpy import save

        write_atomically(self._path(number), save({"nll": nll}))

    def finish(self, nll: Floats, windows: Sequence[Span], batches: int) -> Path:
        """Write the whole, remove the batches, and return the whole's path."""
        from safetensors.numpy import save

        head = json.loads((self.folder / _IDENTITY).read_text(encoding="utf-8"))
        spans = np.array([astuple(span) for span in windows], dtype=np.int64)
        path = self.folder / _WHOLE
        write_atomically(path, save({"nll": nll, "windows": spans}, {key: str(value) for key, value in head.items()}))
        for number in range(batches):
            self._path(number).unlink(missing_ok=True)
        return path

    def whole(self, scored: int) -> Floats | None:
        """All likelihoods (scored,), where the measurement is complete and they can be read."""
        return _likelihoods(self.folder / _WHOLE, scored)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"


def open_kept(folder: Path, identity: Mapping[str, object], *, resume: bool) -> Kept:
    """The folder of the measurement that `identity` fixes, new or, with `resume`, as it was left.

    Raises UserError for a folder in use without `resume`, and, naming what differs, for one of another measurement.
    """
    path = folder / _IDENTITY
    if path.is_file():
        if not resume:
            raise UserError(f"{folder} holds a measurement; --resume goes on with it, another --out starts a new one")
        before = read_document(path, "measurement")
        other = [
            f"{name} {before.get(name)} -> {value}" for name, value in identity.items() if before.get(name) != value
        ]
        if other:
            raise UserError(f"{folder} holds another measurement and cannot be resumed: {'; '.join(other)}")
    else:
        write_atomically(path, json.dumps({"api_version": 1, **identity}, indent=1) + "\n")
    return Kept(folder)


def _likelihoods(path: Path, scored: int) -> Floats | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        return None
    try:
        found: Floats | None = load_file(path).get("nll")
    except SafetensorError:
        return None
    return found if found is not None and found.shape == (scored,) and found.dtype == np.float32 else None
