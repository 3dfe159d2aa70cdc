"""Baselines: what a blessed run computed, as text that a reviewer can read in a diff.

    baselines/<device class>/<NAME>/environment.json   where the numbers come from
                                    <operator>.json    one line per case and gate
                                    perplexity.json    one line per model, text and precision
                                    tolerances.json    one line per operator: what its bounds are made of
                                    faults.json        one line per planted fault: whether and by what it was caught
                                    kernels.json       one line per kernel: registers, spills, shared memory

The last two where the run has them. Only `create` blesses. stores/ says where all this lies and how it is written;
drift.py compares a run with it, history.py one version with the next.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mxharness import paths
from mxharness.document import Labelled, parse_document, revived, rows_text
from mxharness.errors import UserError
from mxharness.op import Outcome
from mxharness.record import RunRecord, verdict
from mxharness.stores import Store, open_store
from mxharness.stores.common import DEVICE_CLASS, NAME, Texts, exists

Entry = dict[str, object]
"""One line of a baseline file: column name to string, integer or float."""

Root = Path | str | None
"""A folder or URL that holds baselines; None: the first of `roots` that has what is asked for."""

ADDRESS = "MXHARNESS_BASELINES"
"""Environment variable: the folder or URL that a team keeps its baselines at."""

LABELS = ("name", "text", "protocol", "weights", "activations")
"""What tells one perplexity from another."""

_VOLATILE = {"passed", "message", "gate", "seconds", "tokens_per_second"}
_ENVIRONMENT = "environment"
_PERPLEXITY, _TOLERANCES = "perplexity", "tolerances"
_FAULTS, _KERNELS = "faults", "kernels"
_OTHER = {_ENVIRONMENT, _PERPLEXITY, _TOLERANCES, _FAULTS, _KERNELS}
_DIGITS = 4
_COLUMNS = {"digest": str, "elements": int, "inputs": str, "max_ulp": float, "nmse": float, "ratio": float}


@dataclass(frozen=True)
class Summary:
    """One baseline that exists."""

    device_class: str
    name: str
    path: Path | str
    """Its folder, or the address of its pointer."""
    root: Path | str
    """Where it was found, as `load` takes it."""
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
    """By `key(case, gate)`: op, ratio, max_ulp, nmse, digest, elements, inputs; since 0.5 high_ratio and line."""
    perplexity: Mapping[str, Entry]
    """By `perplexity_key`: the perplexity and the hashes of what it was measured on."""
    tolerances: Mapping[str, Entry] = field(default_factory=dict)
    """By operator, what its tolerance was made of; none in baselines of before 0.3."""
    faults: Mapping[str, Entry] = field(default_factory=dict)
    """By planted fault: caught, detector; none in baselines of before 0.5."""
    kernels: Mapping[str, Entry] = field(default_factory=dict)
    """By "file kernel": registers, stack, spill_stores, spill_loads, shared (bytes); of CUDA devices since 0.5."""
    accepted: str = ""
    """Why the growth up to here was accepted; empty where nobody had to."""


def key(case: str, gate: str) -> str:
    """What names one check: the case's id and the gate, "gemm-3x33x64-bf16-normal-s0 bound"."""
    return f"{case} {gate}"


def perplexity_key(row: Labelled) -> str:
    """What names one perplexity: model, text, protocol, weights and activations."""
    return " | ".join(str(row.get(label, "?")) for label in LABELS)


def create(name: str, record: RunRecord, *, replace: bool = False, root: Root = None, accepted: str = "") -> Path | str:
    """Bless `record` as baseline `name` of its device class and return the baseline's place.

    root: by default the first of `roots`. accepted: why the growth that history.growth finds is right; it counts anew
    from here.

    The baseline appears whole or not at all. Raises UserError where `name` is no plain name, where the baseline exists
    and replace is False, and for a run that failed, was filtered, is not deterministic or used float32 arithmetic.
    """
    store, device_class = open_store(root or roots()[0]), _checked_class(record.device_class)
    refuse_taken(device_class, name, root, replace=replace)
    _refuse_unfit(record)
    return store.write(device_class, name, _files(record, accepted), replace=replace)


def refuse_taken(device_class: str, name: str, root: Root = None, *, replace: bool) -> None:
    """Raise UserError where `create` would: for a name that is none, or that is taken and not to be replaced."""
    pair = (device_class, checked_name(name))
    if not replace and pair in open_store(root or roots()[0]).names():
        raise exists(*pair)


def remove(device_class: str, name: str, root: Root = None) -> None:
    """Take a baseline away from the store it is written to; nothing where there is none."""
    open_store(root or roots()[0]).remove(_checked_class(device_class), checked_name(name))


def of(record: RunRecord) -> Baseline:
    """What blessing `record` would store, in memory, under the name "this run"."""
    return Baseline(
        device_class=record.device_class,
        name="this run",
        created=record.started,
        environment=record.environment,
        checks=entries(record),
        perplexity=perplexity_entries(record),
        tolerances={op: dict(rows) for op, rows in record.tolerances.items()},
        faults=fault_entries(record),
        kernels={kernel: dict(row) for kernel, row in record.kernels.items()},
    )


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


def fault_entries(record: RunRecord) -> dict[str, Entry]:
    """What a baseline stores of the planted faults, by name; of one planted in several operators, all detectors."""
    found: dict[str, Entry] = {}
    for row in record.faults or ():
        name, caught = str(row["name"]), bool(row["caught"])
        before = found.get(name, {"caught": True, "detector": ""})
        detectors = {*str(before["detector"]).split(", "), str(row.get("detector") or "")} - {""}
        found[name] = {"caught": caught and bool(before["caught"]), "detector": ", ".join(sorted(detectors))}
    return found


def load(device_class: str, name: str, root: Root = None) -> Baseline:
    """The baseline `device_class`/`name`.

    root: by default the first of `roots` that has it.

    Raises UserError, naming what exists, where it is missing, and naming the file where one is damaged or newer.
    """
    for base in (root,) if root else roots():
        store = open_store(base)
        texts = store.read(_checked_class(device_class), checked_name(name))
        if texts is not None:
            return _parsed(device_class, name, store, texts)
    raise UserError(_missing(device_class, name, root))


def _parsed(device_class: str, name: str, store: Store, texts: Texts) -> Baseline:
    place = store.place(device_class, name)
    if _ENVIRONMENT not in texts:
        raise UserError(f"cannot read baseline {place}: it has no {_ENVIRONMENT}.json")
    sections = {stem: _Section(f"{place}/{stem}.json", text) for stem, text in texts.items()}
    header = sections[_ENVIRONMENT]
    checks = {
        check: {**entry, "op": op}
        for op, section in sections.items()
        if op not in _OTHER
        for check, entry in section.rows("checks", _COLUMNS).items()
    }
    if not checks:
        raise UserError(f"baseline {place} holds no check; `mxharness baseline create {name} --replace` makes it anew")
    if _PERPLEXITY not in sections:
        raise UserError(f"cannot read baseline {place}: it has no {_PERPLEXITY}.json")
    return Baseline(
        device_class=device_class,
        name=name,
        created=str(header.document.get("created", "unknown")),
        environment=header.section("environment"),
        checks=checks,
        perplexity=sections[_PERPLEXITY].rows("perplexity", {"perplexity": float}),
        tolerances=sections[_TOLERANCES].rows("tolerances", {}) if _TOLERANCES in sections else {},
        faults=sections[_FAULTS].rows("faults", {"caught": bool}) if _FAULTS in sections else {},
        kernels=sections[_KERNELS].rows("kernels", {"registers": int}) if _KERNELS in sections else {},
        accepted=str(header.document.get("accepted", "")),
    )


def digests(device_class: str, name: str, root: Root = None) -> dict[str, str]:
    """The recorded bits of every check, by `key(case, gate)`. Raises as `load`."""
    return {name: str(entry["digest"]) for name, entry in load(device_class, name, root).checks.items()}


def list_baselines(root: Root = None) -> list[Summary]:
    """Every baseline that exists, by device class and name. Raises UserError where one is damaged."""
    found = []
    for (device_class, name), base in sorted(_places(root).items()):
        loaded = load(device_class, name, base)
        operators = tuple(sorted({str(entry["op"]) for entry in loaded.checks.values()}))
        path = open_store(base).place(device_class, name)
        found.append(Summary(device_class, name, path, base, loaded.created, operators, len(loaded.checks)))
    return found


def list_readable(device_class: str, root: Root = None) -> list[Baseline]:
    """Every baseline of a device class that can be read, in no order: a damaged one must not keep its own successor."""
    found = []
    for (held, name), base in _places(root).items():
        if held == device_class:
            with suppress(UserError):
                found.append(load(held, name, base))
    return found


def roots() -> tuple[Path | str, ...]:
    """Where baselines are sought, and the first is where they are written.

    $MXHARNESS_BASELINES, else the checkout's folder or the working directory's; then those that came with this version.
    """
    return tuple(dict.fromkeys((os.environ.get(ADDRESS) or paths.writable_baselines(), paths.baselines())))


def _places(root: Root) -> dict[tuple[str, str], Path | str]:
    """(device class, name) of every baseline and the root it is in, the first one where two have the same name."""
    found: dict[tuple[str, str], Path | str] = {}
    for base in (root,) if root else roots():
        for pair in open_store(base).names():
            found.setdefault(pair, base)
    return found


def _missing(device_class: str, name: str, root: Root) -> str:
    there = ["/".join(pair) for pair in sorted(_places(root))]
    known = f"there are {', '.join(there)}" if there else "there is none yet"
    return f"no baseline {device_class}/{name}; {known}; `mxharness baseline create {name}` makes one"


def checked_name(name: str) -> str:
    """`name`, or UserError where a baseline cannot be called that."""
    if not NAME.fullmatch(name):
        raise UserError(f"'{name}' is no name for a baseline; take up to 64 letters, digits, '.', '_', '-'")
    return name


def _checked_class(device_class: str) -> str:
    if not DEVICE_CLASS.fullmatch(device_class):
        raise UserError(f"'{device_class}' is no device class; they read host, sm_80, sm_90")
    return device_class


def _files(record: RunRecord, accepted: str) -> dict[str, str]:
    """File stem to text of the whole baseline."""
    by_op: defaultdict[str, dict[str, Entry]] = defaultdict(dict)
    for name, entry in entries(record).items():
        columns = dict(entry)
        by_op[str(columns.pop("op"))][name] = columns
    reserved = _OTHER & set(by_op)
    if reserved:
        raise UserError(f"an operator cannot be called {reserved.pop()}: a baseline keeps another file under that name")
    return {
        _ENVIRONMENT: rows_text(
            {"created": record.started, **({"accepted": accepted} if accepted else {})},
            "environment",
            record.environment,
        ),
        _PERPLEXITY: rows_text({}, "perplexity", perplexity_entries(record)),
        _TOLERANCES: rows_text({}, "tolerances", record.tolerances),
        **({_FAULTS: rows_text({}, "faults", fault_entries(record))} if record.faults else {}),
        **({_KERNELS: rows_text({}, "kernels", record.kernels)} if record.kernels else {}),
        **{op: rows_text({"op": op}, "checks", found) for op, found in by_op.items()},
    }


class _Section:
    """One document of a baseline, and what to call it in a message."""

    def __init__(self, place: str, text: str) -> None:
        self.place = place
        self.document = parse_document(text, place, "baseline")

    def section(self, name: str) -> dict[str, object]:
        section = self.document.get(name)
        if not isinstance(section, dict):
            raise UserError(f"baseline {self.place} is damaged: it has no '{name}'")
        return section

    def rows(self, name: str, columns: Mapping[str, type]) -> dict[str, Entry]:
        """The rows of one section, each with `columns` of those types. Raises UserError naming the first bad row."""
        rows = {}
        for row, values in self.section(name).items():
            entry = dict(revived(values)) if isinstance(values, dict) else {}
            wrong = [column for column, kind in columns.items() if type(entry.get(column)) is not kind]
            if wrong:
                raise UserError(f"baseline {self.place} is damaged: '{row}' has no valid {', '.join(wrong)}")
            rows[row] = entry
        return rows


def _entry(outcome: Outcome) -> Entry:
    """The columns a baseline stores of one outcome."""
    return {
        "op": outcome.op,
        "digest": outcome.digest,
        "elements": outcome.elements,
        "high_ratio": _rounded(outcome.high_ratio),
        "inputs": outcome.inputs,
        "line": _rounded(outcome.line),
        "max_ulp": _rounded(outcome.max_ulp),
        "nmse": _rounded(outcome.nmse),
        "ratio": _rounded(outcome.ratio),
    }


def _rounded(number: float, digits: int = _DIGITS) -> float:
    """`number` with few significant digits, so that the last bits of a float64 sum never show in a diff."""
    return float(f"{number:.{digits}g}")
