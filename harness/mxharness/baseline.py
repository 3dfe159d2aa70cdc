"""Baselines: what a blessed run computed, as text that a reviewer can read in a diff.

    baselines/<device class>/<NAME>/environment.json   where the numbers come from
                                    <operator>.json    one line per case and gate
                                    perplexity.json    one line per model, text and precision
                                    tolerances.json    one line per operator: what its bounds are made of

Only `create` blesses. drift.py compares a run with what is stored here.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mxharness import paths
from mxharness.document import Labelled, read_document, revived, rows_text
from mxharness.errors import UserError
from mxharness.op import Outcome
from mxharness.record import RunRecord, verdict

Entry = dict[str, object]
"""One line of a baseline file: column name to string, integer or float."""

LABELS = ("name", "text", "protocol", "weights", "activations")
"""What tells one perplexity from another."""

_VOLATILE = {"passed", "message", "gate", "seconds", "tokens_per_second"}
_ENVIRONMENT = "environment"
_PERPLEXITY, _TOLERANCES = "perplexity", "tolerances"
_OTHER = {_ENVIRONMENT, _PERPLEXITY, _TOLERANCES}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEVICE_CLASS = re.compile(r"host|sm_[0-9]{2,3}[a-z]?")
_DIGITS = 4
_COLUMNS = {"digest": str, "elements": int, "inputs": str, "max_ulp": float, "nmse": float, "ratio": float}


@dataclass(frozen=True)
class Summary:
    """One baseline that exists."""

    device_class: str
    name: str
    path: Path
    created: str
    """UTC, ISO 8601: when the blessed run started."""
    operators: tuple[str, ...]
    checks: int


@dataclass(frozen=True)
class Baseline:
    """A baseline in memory."""

    device_class: str
    name: str
    created: str
    environment: Labelled
    checks: Mapping[str, Entry]
    """By `key(case, gate)`: op, ratio, max_ulp, nmse, digest, elements, inputs."""
    perplexity: Mapping[str, Entry]
    """By `perplexity_key`: the perplexity and the hashes of what it was measured on."""
    tolerances: Mapping[str, Entry] = field(default_factory=dict)
    """By operator, what its tolerance was made of; none in baselines of before 0.3."""


def key(case: str, gate: str) -> str:
    """What names one check: the case's id and the gate, "gemm-3x33x64-bf16-normal-s0 bound"."""
    return f"{case} {gate}"


def perplexity_key(row: Labelled) -> str:
    """What names one perplexity: model, text, protocol, weights and activations."""
    return " | ".join(str(row.get(label, "?")) for label in LABELS)


def create(name: str, record: RunRecord, *, replace: bool = False, root: Path | None = None) -> Path:
    """Bless `record` as baseline `name` of its device class and return the baseline's folder.

    root: the folder of all baselines; by default where paths.writable_baselines says.

    The folder appears whole or not at all. Raises UserError where `name` is no plain name, where the baseline exists
    and replace is False, and for a run that failed, was filtered, is not deterministic or used float32 arithmetic.
    """
    folder = (root or paths.writable_baselines()) / _checked_class(record.device_class) / checked_name(name)
    if folder.exists() and not replace:
        raise UserError(f"baseline {record.device_class}/{name} exists; --replace blesses this run in its place")
    _refuse_unfit(record)
    files = _files(record)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}.new."))
    try:
        for stem, text in files.items():
            (fresh / f"{stem}.json").write_text(text, encoding="utf-8")
        fresh.chmod(0o755)
        _swap(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _refuse_unfit(record: RunRecord) -> None:
    """Raise UserError for a run that must not become the measure of others."""
    result = verdict(record)
    if not result.passed:
        raise UserError(f"a failing run cannot be a baseline: {'; '.join(result.reasons)}")
    if record.known:
        raise UserError(f"a run with known failures cannot be a baseline: {record.known[0]['check']} fails")
    twice = unstable(record)
    if twice:
        raise UserError(f"a baseline needs one truth, and {', '.join(twice)} ran twice with different bits")
    if record.filters:
        raise UserError(f"a baseline needs every operator; this run was limited by {' '.join(record.filters)}")
    if record.arithmetic != "tensor-core":
        raise UserError(f"a baseline needs tensor-core arithmetic; this run used {record.arithmetic}")


def _swap(fresh: Path, folder: Path) -> None:
    """Rename `fresh` to `folder`; what was there is back in place if that fails, else removed."""
    if not folder.exists():
        fresh.rename(folder)
        return
    old = fresh.with_name(fresh.name.replace(".new.", ".old."))
    folder.rename(old)
    try:
        fresh.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def entries(record: RunRecord) -> dict[str, Entry]:
    """What a baseline stores of a run's outcomes, by `key`; of a check that ran twice, the first."""
    found: dict[str, Entry] = {}
    for outcome in record.outcomes:
        found.setdefault(key(outcome.case, outcome.gate), _entry(outcome))
    return found


def unstable(record: RunRecord) -> list[str]:
    """The checks that ran more than once with different bits, by `key`, sorted."""
    bits: defaultdict[str, set[str]] = defaultdict(set)
    for outcome in record.outcomes:
        bits[key(outcome.case, outcome.gate)].add(outcome.digest)
    return sorted(name for name, digests in bits.items() if len(digests) > 1)


def perplexity_entries(record: RunRecord) -> dict[str, Entry]:
    """What a baseline stores of a run's perplexities, by `perplexity_key`: everything but times and verdicts."""
    return {
        perplexity_key(row): {
            column: _rounded(value, 7) if isinstance(value, float) else value
            for column, value in row.items()
            if column not in _VOLATILE and column not in LABELS
        }
        for row in record.perplexity
    }


def load(device_class: str, name: str, root: Path | None = None) -> Baseline:
    """The baseline `device_class`/`name`.

    root: the folder of all baselines; by default the writable one, then the one that came with this version.

    Raises UserError, naming what exists, where it is missing, and naming the file where one is damaged or newer.
    """
    roots = (root,) if root else _roots()
    folders = (base / _checked_class(device_class) / checked_name(name) for base in roots)
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise UserError(_missing(device_class, name, root))
    header = read_document(folder / f"{_ENVIRONMENT}.json", "baseline")
    checks = {
        name: {**entry, "op": path.stem}
        for path in _operator_files(folder)
        for name, entry in _rows(path, "checks", _COLUMNS).items()
    }
    if not checks:
        raise UserError(f"baseline {folder} holds no check; `mxharness baseline create {name} --replace` makes it anew")
    return Baseline(
        device_class=device_class,
        name=name,
        created=str(header.get("created", "unknown")),
        environment=_section(folder / f"{_ENVIRONMENT}.json", "environment"),
        checks=checks,
        perplexity=_rows(folder / f"{_PERPLEXITY}.json", "perplexity", {"perplexity": float}),
        tolerances=_rows(rules, "tolerances", {}) if (rules := folder / f"{_TOLERANCES}.json").is_file() else {},
    )


def digests(device_class: str, name: str, root: Path | None = None) -> dict[str, str]:
    """The recorded bits of every check, by `key(case, gate)`. Raises as `load`."""
    return {name: str(entry["digest"]) for name, entry in load(device_class, name, root).checks.items()}


def list_baselines(root: Path | None = None) -> list[Summary]:
    """Every baseline that exists, by device class and name. Raises UserError where one is damaged."""
    found = []
    for folder in _folders(root):
        loaded = load(folder.parent.name, folder.name, folder.parent.parent)
        operators = tuple(sorted({str(entry["op"]) for entry in loaded.checks.values()}))
        found.append(Summary(loaded.device_class, loaded.name, folder, loaded.created, operators, len(loaded.checks)))
    return found


def _roots() -> tuple[Path, ...]:
    return tuple(dict.fromkeys((paths.writable_baselines(), paths.baselines())))


def _folders(root: Path | None) -> Iterator[Path]:
    """The folder of every baseline, the first root winning where two have the same name, sorted."""
    found: dict[tuple[str, str], Path] = {}
    for base in (root,) if root else _roots():
        for folder in base.glob("*/*"):
            if _DEVICE_CLASS.fullmatch(folder.parent.name) and _NAME.fullmatch(folder.name) and folder.is_dir():
                found.setdefault((folder.parent.name, folder.name), folder)
    yield from (found[place] for place in sorted(found))


def _missing(device_class: str, name: str, root: Path | None) -> str:
    there = [f"{folder.parent.name}/{folder.name}" for folder in _folders(root)]
    known = f"there are {', '.join(there)}" if there else "there is none yet"
    return f"no baseline {device_class}/{name}; {known}; `mxharness baseline create {name}` makes one"


def checked_name(name: str) -> str:
    """`name`, or UserError where a baseline cannot be called that."""
    if not _NAME.fullmatch(name):
        raise UserError(f"'{name}' is no name for a baseline; take up to 64 letters, digits, '.', '_', '-'")
    return name


def _checked_class(device_class: str) -> str:
    if not _DEVICE_CLASS.fullmatch(device_class):
        raise UserError(f"'{device_class}' is no device class; they read host, sm_80, sm_90")
    return device_class


def _files(record: RunRecord) -> dict[str, str]:
    """File stem to text of the whole baseline."""
    by_op: defaultdict[str, dict[str, Entry]] = defaultdict(dict)
    for name, entry in entries(record).items():
        columns = dict(entry)
        by_op[str(columns.pop("op"))][name] = columns
    reserved = _OTHER & set(by_op)
    if reserved:
        raise UserError(f"an operator cannot be called {reserved.pop()}: a baseline keeps another file under that name")
    return {
        _ENVIRONMENT: rows_text({"created": record.started}, "environment", record.environment),
        _PERPLEXITY: rows_text({}, "perplexity", perplexity_entries(record)),
        _TOLERANCES: rows_text({}, "tolerances", record.tolerances),
        **{op: rows_text({"op": op}, "checks", found) for op, found in by_op.items()},
    }


def _section(path: Path, name: str) -> dict[str, object]:
    section = read_document(path, "baseline").get(name)
    if not isinstance(section, dict):
        raise UserError(f"baseline {path} is damaged: it has no '{name}'")
    return section


def _rows(path: Path, name: str, columns: Mapping[str, type]) -> dict[str, Entry]:
    """The rows of one section, each with `columns` of those types. Raises UserError naming the first bad row."""
    rows = {}
    for row, values in _section(path, name).items():
        entry = dict(revived(values)) if isinstance(values, dict) else {}
        wrong = [column for column, kind in columns.items() if type(entry.get(column)) is not kind]
        if wrong:
            raise UserError(f"baseline {path} is damaged: '{row}' has no valid {', '.join(wrong)}")
        rows[row] = entry
    return rows


def _operator_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.stem not in _OTHER)


def _entry(outcome: Outcome) -> Entry:
    """The columns a baseline stores of one outcome."""
    return {
        "op": outcome.op,
        "digest": outcome.digest,
        "elements": outcome.elements,
        "inputs": outcome.inputs,
        "max_ulp": _rounded(outcome.max_ulp),
        "nmse": _rounded(outcome.nmse),
        "ratio": _rounded(outcome.ratio),
    }


def _rounded(number: float, digits: int = _DIGITS) -> float:
    """`number` with few significant digits, so that the last bits of a float64 sum never show in a diff."""
    return float(f"{number:.{digits}g}")
