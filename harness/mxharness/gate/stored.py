"""What is kept of a reference so that a candidate can be judged without it: one safetensors file, no pickle.

    nll, original  (T,) float32     NLL of the scored tokens: MXFP4 decoded, and the original weights, in float32
    top, top_log   (T, K)           the K most probable words, uint16 or uint32, and float32 log probabilities
    drawn, drawn_log  (T, S)        words drawn from the others, likewise (divergence.py)
    windows        (W, 3) int64     start, stop, first scored token
    metadata                        what fixes the experiment

A scored token takes 8 + 6 (K + S) bytes, 8 + 8 (K + S) where the vocabulary has more than 65,536 words: 74 MB for the
592 windows of WikiText-2's test split (150,960 tokens) with K = 64 and S = 16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mxharness import paths
from mxharness.baseline import checked_name
from mxharness.document import write_atomically
from mxharness.errors import UserError
from mxharness.gate import divergence
from mxharness.gate.statistics import Estimate, clustered
from mxharness.gate.verdict import Failed
from mxharness.model import likelihood, reference
from mxharness.protocols import Span

if TYPE_CHECKING:
    import torch

    from mxharness.model.checkpoint import Checkpoint
    from mxharness.model.likelihood import Reduce
    from mxharness.perplexity import Reading

    Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

TOP, DRAWN = 64, 16
VERSION = "1"
SUFFIX = ".safetensors"
_ARRAYS = ("nll", "original", "top", "top_log", "drawn", "drawn_log", "windows")
_FIXED = {
    "model_sha256": "the model",
    "text_sha256": "the text",
    "ids_sha256": "the tokenizer (the text is the same)",
    "protocol": "the protocol",
    "weights": "the weights' format",
}
"""What must be the same in both experiments, in the order in which it is looked at."""


@dataclass(frozen=True)
class Statistics:
    """A reference on windows of a text. Columns have a row for each scored token, window by window."""

    fixed: Mapping[str, str]
    spans: tuple[Span, ...]
    columns: Mapping[str, Array]
    """Names as in the file, without "windows"."""

    def window(self, span: Span) -> tuple[tuple[Array, Array, Array, Array], Array]:
        """The cells (int64 words, float32 logs) and the NLL of one window."""
        rows = self._rows[span]
        top, top_log, drawn, drawn_log, nll = (
            self.columns[name][rows] for name in ("top", "top_log", "drawn", "drawn_log", "nll")
        )
        return (top.astype(np.int64), top_log, drawn.astype(np.int64), drawn_log), nll

    def part(self, column: str, span: Span) -> Array:
        """One column of one window."""
        return self.columns[column][self._rows[span]]

    def noise(self, activations: str) -> float:
        """Mean KL of an honest candidate with such activations, nats per token; 0 where it was not measured."""
        return float(self.fixed.get(f"noise_{activations}", "0"))

    def cost(self, spans: Sequence[Span]) -> Estimate | None:
        """What the format costs on some windows: NLL of MXFP4 decoded less that of the original weights.

        None where the two are the same: the weights before MXFP4 were not at hand.
        """
        if np.array_equal(self.columns["nll"], self.columns["original"]):
            return None
        differences = [(self.columns["nll"] - self.columns["original"])[self._rows[span]] for span in spans]  # type: ignore[operator]  # float32
        sums = np.array([float(each.sum(dtype=np.float64)) for each in differences])
        return clustered(sums, np.array([float(len(each)) for each in differences]))

    def require(self, reading: Reading, weights: str) -> None:
        """Raise Failed, saying what changed, where another experiment was measured than is stored."""
        now = {name: str(getattr(reading, name)) for name in _FIXED if name != "weights"} | {"weights": weights}
        for name, what in _FIXED.items():
            if self.fixed.get(name) != now[name]:
                raise Failed(f"{what} is not the baseline's: {name} {self.fixed.get(name)} -> {now[name]}")

    @cached_property
    def _rows(self) -> dict[Span, slice]:
        ends = np.cumsum([span.stop - span.first for span in self.spans]).tolist()
        return {span: slice(end - (span.stop - span.first), end) for span, end in zip(self.spans, ends, strict=True)}


def collect(
    checkpoint: Checkpoint,
    reading: Reading,
    spans: Sequence[Span],
    torch_device: torch.device,
    *,
    original: Checkpoint | None = None,
    top: int = TOP,
    drawn: int = DRAWN,
    progress: bool = False,
) -> Statistics:
    """Run both references on windows of a text.

    original: the model with the weights that MXFP4 was made of, where `checkpoint` no longer has them.
    """
    wide = checkpoint.config.vocabulary > np.iinfo(np.uint16).max + 1
    words = np.uint32 if wide else np.uint16
    decoded = reference.decoded(checkpoint, torch_device)
    batch = likelihood.default_batch(decoded)

    def reduce_of(span: Span) -> Reduce:
        def reduce(rows: slice, targets: torch.Tensor, logits: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
            found = divergence.cells(logits[0], top, drawn, seed=span.start + rows.start)
            return {**likelihood.nll(rows, targets, logits), **found._asdict()}

        return reduce

    columns = likelihood.over_windows(
        [decoded], reading.ids, spans, reduce_of, batch=batch, progress="reference" if progress else ""
    )
    rows = list(columns)
    unrounded = likelihood.over_windows(
        [reference.float32(original or checkpoint, torch_device)],
        reading.ids,
        spans,
        lambda _: likelihood.nll,
        batch=batch,
        progress="original" if progress else "",
    )
    whole = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    whole |= {name: whole[name].astype(words) for name in ("top", "drawn")}
    whole["original"] = np.concatenate([row["nll"] for row in unrounded])
    fixed = {name: str(getattr(reading, name)) for name in ("model", "text", *_FIXED) if name != "weights"}
    fixed |= {"weights": decoded.weights, "reference": f"{decoded.arithmetic}, {decoded.device_class}"}
    return Statistics(fixed, tuple(spans), whole)


def save(statistics: Statistics, path: Path) -> None:
    """Write the file, whole or not at all."""
    from safetensors.numpy import save as as_bytes

    windows = np.array([astuple(span) for span in statistics.spans], dtype=np.int64)
    arrays = {name: np.ascontiguousarray(column) for name, column in statistics.columns.items()}
    write_atomically(path, as_bytes({**arrays, "windows": windows}, {**statistics.fixed, "version": VERSION}))


def load(path: Path) -> Statistics:
    """Read what `save` wrote. Raises UserError for a file that is missing, damaged or newer."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"no gate baseline {path}; `mxharness gate create` makes one")
    try:
        with safe_open(path, framework="np") as file:
            fixed = dict(file.metadata() or {})
            columns = {name: file.get_tensor(name) for name in _ARRAYS}
    except SafetensorError as error:
        raise UserError(f"{path} is no gate baseline: {error}") from error
    if fixed.pop("version", None) != VERSION:
        raise UserError(f"{path} is a gate baseline of another version; `mxharness gate create` makes it anew")
    windows = columns.pop("windows")
    if windows.ndim != 2 or windows.shape[1] != 3:
        raise UserError(f"{path} is damaged: windows is not of three columns")
    spans = tuple(Span(*map(int, row)) for row in windows)
    scored = sum(span.stop - span.first for span in spans)
    bad = [name for name, column in columns.items() if len(column) != scored]
    bad += [name for name in ("top", "drawn") if columns[name].shape != columns[f"{name}_log"].shape]
    if bad:
        raise UserError(f"{path} is damaged: {', '.join(bad)} is not of {scored:,} rows, one for each scored token")
    for name, value in fixed.items():
        if name.startswith("noise_") and not _is_noise(value):
            raise UserError(f"{path} is damaged: {name} is {value}, not a finite number of nats")
    return Statistics(fixed, spans, columns)


def _is_noise(value: str) -> bool:
    try:
        return 0 <= float(value) < math.inf
    except ValueError:
        return False


def find(name: str) -> Path:
    """The file of a baseline: a path that ends in .safetensors, or a plain name under baselines/gate.

    Raises UserError, listing what exists.
    """
    if name.endswith(SUFFIX):
        return Path(name)
    folders = (paths.writable_baselines() / "gate", paths.baselines() / "gate")
    for folder in folders:
        if (path := folder / f"{checked_name(name)}{SUFFIX}").is_file():
            return path
    there = sorted({path.stem for folder in folders for path in folder.glob(f"*{SUFFIX}")})
    known = f"there are {', '.join(there)}" if there else "there is none yet"
    raise UserError(f"no gate baseline '{name}'; {known}; `mxharness gate create {name}` makes one")
