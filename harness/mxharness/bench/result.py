"""Rows and records of the bench, and their JSON: sorted keys and one row a line, so that a diff shows what moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mxharness import paths
from mxharness.document import Labelled, parse_document, revived, rows_text, write_atomically
from mxharness.errors import UserError
from mxharness.figures import Ceilings, Timing

KIND = "bench record"
FILE = "bench.json"
"""Beside run.json: there a report and a baseline find it without being told."""


@dataclass(frozen=True)
class Peer:
    """Somebody else in the same row."""

    timing: Timing
    error: float | None
    """Relative, as the row's own; None where it computes something else."""


@dataclass(frozen=True)
class Row:
    """One kernel at one shape."""

    op: str
    shape: str
    axes: str
    """What its sizes are, "N K"."""
    rows: int
    """0 where there are none beside the shape."""
    variant: str
    """The dtype; on the host device the number of threads too."""
    timing: Timing
    working_set: int
    """Bytes that the rotating copies are together."""
    nbytes: int
    """That one call must move at least."""
    flops: int
    limited: str
    """What makes the floor: "bytes" or "operations"."""
    floor_us: float
    """The larger of bytes and operations by what the device can do."""
    error: float
    """Relative Frobenius error against the float64 reference, on a part of the output."""
    repeatable: bool
    """20 calls gave the same bits."""
    invariant: bool | None
    """The first row alone has the bits it has in the batch; None where there is no batch."""
    reference: str
    """The peer that ratios are to; empty: none."""
    peers: Mapping[str, Peer] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    """Peers that were not measured, and why."""

    @property
    def key(self) -> str:
        """What names the row: "gemm 4096x4096 16 bf16"."""
        return " ".join((self.op, self.shape, *([str(self.rows)] if self.rows else []), self.variant))

    @property
    def share(self) -> float:
        """The floor as a share of the time."""
        return self.floor_us / self.timing.us

    @property
    def ratio(self) -> float | None:
        """How many times faster than the reference."""
        peer = self.peers.get(self.reference)
        return peer.timing.us / self.timing.us if peer else None

    @property
    def sound(self) -> bool:
        """Repeatable, and the same in any batch."""
        return self.repeatable and self.invariant is not False


@dataclass(frozen=True)
class Bench:
    """What one run measured on one device."""

    device_class: str
    unit: str
    """The GPU's or the processor's name."""
    driver: str
    """Of the GPU; "absent" on the host device."""
    started: str
    """UTC, ISO 8601."""
    seconds: float
    ceilings: Ceilings
    copy_bandwidth: float
    """Bytes per second that torch's best copy of 1 GiB read and wrote in this run."""
    environment: Labelled
    rows: Mapping[str, Row]
    filters: tuple[str, ...] = ()
    """What narrowed the rows on purpose."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Rows that could not be measured, and why."""

    @property
    def sound(self) -> bool:
        """There are rows, every one is sound, and none failed."""
        return bool(self.rows) and not self.failed and all(row.sound for row in self.rows.values())


def text(bench: Bench) -> str:
    """The record as JSON."""
    head = {
        "device_class": bench.device_class,
        "unit": bench.unit,
        "driver": bench.driver,
        "started": bench.started,
        "seconds": round(bench.seconds, 1),
        "ceilings": asdict(bench.ceilings),
        "copy_bandwidth": _rounded(bench.copy_bandwidth),
        "environment": dict(bench.environment),
        "filters": list(bench.filters),
        "failed": dict(bench.failed),
    }
    return rows_text(head, "rows", {key: _packed(row) for key, row in bench.rows.items()})


def save(bench: Bench, path: Path) -> None:
    """Write the record, whole or not at all. Raises OSError."""
    write_atomically(path, text(bench))


def load(path: Path) -> Bench:
    """Read what `save` wrote. Raises UserError, one sentence, for a missing, damaged or newer file."""
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {KIND} {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{KIND} {path} is damaged: {error}") from error
    return parsed(content, path)


def parsed(content: str, path: Path | str) -> Bench:
    """The record in a text that was read from `path`. Raises as `load`."""
    document = parse_document(content, path, KIND)
    try:
        values = {one.name: document[one.name] for one in fields(Bench)}
        values["ceilings"] = Ceilings(**values["ceilings"])
        values["filters"] = tuple(values["filters"])
        values["rows"] = {key: _row(row) for key, row in values["rows"].items()}
        return Bench(**values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a complete {KIND} ({type(error).__name__}: {error})") from error


def beside(folder: Path) -> Bench | None:
    """The record that lies in a run's folder; None where there is none. Raises as `load`."""
    path = folder / FILE
    return load(path) if path.is_file() else None


def place(device_class: str, root: Path | None = None) -> Path:
    """Where the committed record of a device class lies."""
    return (root or paths.baselines()) / "bench" / f"{device_class}.json"


def found(name: str) -> Path:
    """The file called so, or the committed record of that device class. UserError, saying what exists, for neither."""
    path = Path(name)
    if path.is_file():
        return path
    committed = place(name)
    if committed.exists():
        return committed
    there = sorted(one.stem for one in committed.parent.glob("*.json"))
    known = f"there are {', '.join(there)}" if there else "there is none yet"
    raise UserError(f"no file and no committed {KIND} called '{name}'; {known}")


def _packed(row: Row) -> dict[str, Any]:
    packed = asdict(row)
    packed["timing"] = _timing(row.timing)
    packed["floor_us"], packed["error"] = _rounded(row.floor_us), _rounded(row.error)
    packed["peers"] = {
        name: {"timing": _timing(peer.timing), "error": None if peer.error is None else _rounded(peer.error)}
        for name, peer in row.peers.items()
    }
    return packed


def _timing(timing: Timing) -> list[float]:
    return [*map(_rounded, (timing.us, timing.low, timing.high)), timing.repeats, timing.calls]


def _row(packed: Mapping[str, Any]) -> Row:
    values: dict[str, Any] = dict(revived(packed))
    values["timing"] = Timing(*packed["timing"])
    values["peers"] = {
        name: Peer(Timing(*peer["timing"]), revived(peer)["error"])  # type: ignore[arg-type]  # a number or None
        for name, peer in packed["peers"].items()
    }
    return Row(**values)


def _rounded(number: float) -> float:
    return float(f"{number:.5g}")
