"""What a baseline holds: taken from a run, written as text that a reviewer can read in a diff, and read back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mxharness.bench import result
from mxharness.bench.result import Bench
from mxharness.document import Labelled, parse_document, revived, rows_text
from mxharness.errors import UserError
from mxharness.op import Outcome
from mxharness.record import RunRecord
from mxharness.stores.common import Texts

Entry = dict[str, object]
"""One line of a baseline file: column name to string, integer or float."""

LABELS = ("name", "text", "protocol", "weights", "activations")
"""What tells one perplexity from another."""

_VOLATILE = {"passed", "message", "command", "gate", "seconds", "tokens_per_second"}
_ENVIRONMENT = "environment"
_PERPLEXITY, _TOLERANCES = "perplexity", "tolerances"
_FAULTS, _KERNELS, _SPEED = "faults", "kernels", "speed"
_OTHER = {_ENVIRONMENT, _PERPLEXITY, _TOLERANCES, _FAULTS, _KERNELS, _SPEED}
_DIGITS = 4
_COLUMNS = {"digest": str, "elements": int, "inputs": str, "max_ulp": float, "nmse": float, "ratio": float}


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
    speed: Bench | None = None
    """What `mxharness bench` measured; None where nobody gave it, and in baselines of before 0.6."""
    accepted: str = ""
    """Why the growth up to here was accepted; empty where nobody had to."""


def key(case: str, gate: str) -> str:
    """What names one check: the case's id and the gate, "gemm-3x33x64-bf16-normal-s0 bound"."""
    return f"{case} {gate}"


def perplexity_key(row: Labelled) -> str:
    """What names one perplexity: model, text, protocol, weights and activations."""
    return " | ".join(str(row.get(label, "?")) for label in LABELS)


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


def files(record: RunRecord, accepted: str, speed: Bench | None = None) -> dict[str, str]:
    """File stem to text of the whole baseline that blessing `record` makes. accepted, speed: as baseline.create."""
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
        **({_SPEED: result.text(speed)} if speed else {}),
        **{op: rows_text({"op": op}, "checks", found) for op, found in by_op.items()},
    }


def parsed(device_class: str, name: str, place: Path | str, texts: Texts) -> Baseline:
    """A baseline read from the texts that were found at `place`. Raises UserError naming what is damaged or newer."""
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
        speed=result.parsed(texts[_SPEED], f"{place}/{_SPEED}.json") if _SPEED in texts else None,
        accepted=str(header.document.get("accepted", "")),
    )


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
