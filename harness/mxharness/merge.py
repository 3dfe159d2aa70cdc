"""Shards of one run, from different machines, put together: a proof that they are all of it, each test once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise

from mxharness import fuzz, manifest
from mxharness.coverage import Coverage
from mxharness.document import Labelled
from mxharness.errors import UserError
from mxharness.manifest import Manifest, shard_of
from mxharness.op import Outcome
from mxharness.record import OtherTests, RunRecord, Skip

_PERPLEXITY = "perplexity"


def merge(shards: Mapping[str, RunRecord], committed: Manifest, command: str) -> RunRecord:
    """One record of all shards, keyed by what to call them; it passes where nothing is missing, doubled or wrong.

    Raises UserError, one sentence, for records that are no shards of one run: other kernels, device class, manifest.
    """
    _same(shards, committed)
    records = list(shards.values())
    coverage = _coverage(shards, committed)
    found = {outcome.case + outcome.gate: outcome for record in records for outcome in record.outcomes}
    merged = replace(
        records[0],
        started=min(record.started for record in records),
        seconds=max(record.seconds for record in records),
        command=command,
        filters=_filters(records[0]),
        selected=sum(record.selected for record in records),
        executed=sum(record.executed for record in records),
        outcomes=tuple(found.values()),
        environment={**records[0].environment, "shards": "; ".join(map(_machine, records))},
        perplexity=tuple(row for record in records for row in record.perplexity),
        faults=_joined([record.faults for record in records]),
        tests=OtherTests(
            passed=sum(record.tests.passed for record in records),
            failed=sum(record.tests.failed for record in records),
            skipped=sum(record.tests.skipped for record in records),
            failures=tuple(failure for record in records for failure in record.tests.failures),
        ),
        coverage=coverage,
        fuzz=fuzz.merged(asdict(row) for record in records for row in record.fuzz),
        incomplete="; ".join(f"{name}: {record.incomplete}" for name, record in shards.items() if record.incomplete),
        known=tuple(row for record in records for row in record.known),
        ledger=tuple(dict.fromkeys(sentence for record in records for sentence in record.ledger)),
    )
    return replace(merged, skipped=_skipped(records, bool(merged.perplexity)))


def _same(shards: Mapping[str, RunRecord], committed: Manifest) -> None:
    """Raises UserError where two records cannot be parts of one run."""
    facts: dict[str, Callable[[RunRecord], object]] = {
        "device class": lambda record: record.device_class,
        "arithmetic": lambda record: record.arithmetic,
        "number of shards": lambda record: _shard(record)[1],
        "manifest": lambda record: _held(record).manifest,
        "filters": lambda record: " ".join(_filters(record)) or "none",
        "collected tests": lambda record: _held(record).collected,
        "mxharness": lambda record: record.environment.get("mxharness"),
    }
    for name, record in shards.items():
        if record.coverage is None or not record.coverage.shard:
            raise UserError(f"{name} is no shard: it was not run with --shard I/N")
    for (first, one), (second, other) in pairwise(shards.items()):
        for what, fact in facts.items():
            if fact(one) != fact(other):
                raise UserError(f"no shards of one run: {what} is {fact(one)} in {first} and {fact(other)} in {second}")
        kernels = (_kernels(one), _kernels(other))
        if kernels[0] != kernels[1]:
            differ = sorted(dict(kernels[0].items() ^ kernels[1].items()))
            raise UserError(f"no shards of one run: {', '.join(differ)} differ between {first} and {second}")
        seeds = ({row.seed for row in one.fuzz}, {row.seed for row in other.fuzz})
        if all(seeds) and seeds[0] != seeds[1]:
            raise UserError(f"no shards of one run: random cases have other seeds in {first} than in {second}")
    name, record = next(iter(shards.items()))
    if _held(record).manifest != committed.digest:
        raise UserError(
            f"{name} was held against manifest {_held(record).manifest or 'none'} and this mxharness has "
            f"{committed.digest}; merge with the version that ran"
        )


def _coverage(shards: Mapping[str, RunRecord], committed: Manifest) -> Coverage:
    """What all shards together ran, and a sentence for whatever is missing, doubled or contradicts itself."""
    records = list(shards.values())
    parts = [_held(record) for record in records]
    count = _shard(records[0])[1]
    times = Counter(one for part in parts for one in part.selected)
    here = Counter(_shard(record)[0] for record in records)
    lost = [sentence for part in parts for sentence in part.lost]
    absent = [f"{index}/{count}" for index in range(1, count + 1) if not here[index]]
    if absent:
        lost.append(f"shard {', '.join(absent)} is missing")
    if disagreeing := _disagreeing(records):
        lost.append(f"{_tests(len(disagreeing))} disagree between two shards, as {min(disagreeing)}")
    if twice := [one for one, number in times.items() if number > 1]:
        lost.append(f"{_tests(len(twice))} ran in two shards, as {manifest.label(min(twice))}")
    if not absent:
        for name, record in shards.items():
            wanted = manifest.shard(times, *_shard(record))
            if not twice and wanted != set(_held(record).selected):
                lost.append(f"{name} is not part {_held(record).shard} of what the others are parts of")
        if not _filters(records[0]):
            union = Manifest(tests=frozenset(map(manifest.canonical, times))).only(committed.ids)
            left = committed.ids - union.ids
            if left:
                lost.append(f"{_tests(len(left))} of the manifest in no shard, as {manifest.label(min(left))}")
    return Coverage(
        manifest=committed.digest,
        demanded=parts[0].demanded,
        lost=tuple(dict.fromkeys(lost)),
        unknown=tuple(dict.fromkeys(sentence for part in parts for sentence in part.unknown)),
        errors=tuple(dict.fromkeys(sentence for part in parts for sentence in part.errors)),
        skips=tuple(dict.fromkeys(sentence for part in parts for sentence in part.skips)),
        collected=parts[0].collected,
        selected=tuple(sorted(times)),
        missing=tuple(sorted({one for part in parts for one in part.missing})),
    )


def _disagreeing(records: Sequence[RunRecord]) -> list[str]:
    """Checks that two shards judged and that have other bits or another verdict in one."""
    first: dict[str, Outcome] = {}
    found = []
    for outcome in (outcome for record in records for outcome in record.outcomes):
        key = f"{outcome.case} {outcome.gate}"
        other = first.setdefault(key, outcome)
        if (other.digest, other.passed) != (outcome.digest, outcome.passed):
            found.append(key)
    return found


def _skipped(records: Sequence[RunRecord], measured: bool) -> tuple[Skip, ...]:
    """One row for each reason; a shard without the model counts only where no shard has one."""
    counts: Counter[tuple[str, str, bool]] = Counter()
    left_out = [skip for record in records for skip in record.skipped if skip.what == _PERPLEXITY]
    for skip in (skip for record in records for skip in record.skipped if skip.what != _PERPLEXITY):
        counts[skip.what, skip.why, skip.asked] += skip.count
    rows = [Skip(what, why, asked, count) for (what, why, asked), count in counts.items()]
    if left_out and not measured:
        rows.append(next((skip for skip in left_out if not skip.asked), left_out[0]))
    return tuple(rows)


def _joined(parts: Sequence[tuple[Labelled, ...] | None]) -> tuple[Labelled, ...] | None:
    """All rows; None where no shard has any."""
    return tuple(row for rows in parts for row in rows or ()) if any(rows is not None for rows in parts) else None


def _held(record: RunRecord) -> Coverage:
    return record.coverage or Coverage()


def _shard(record: RunRecord) -> tuple[int, int]:
    return shard_of(_held(record).shard)


def _filters(record: RunRecord) -> tuple[str, ...]:
    """What narrowed the run beside its being a shard."""
    return tuple(one for one in record.filters if not one.startswith("--shard "))


def _kernels(record: RunRecord) -> dict[str, object]:
    return {name: value for name, value in record.environment.items() if name.startswith("kernels/")}


def _machine(record: RunRecord) -> str:
    facts = record.environment
    unit = facts.get("cpu") if record.device_class == "host" else facts.get("gpu")
    return f"{_held(record).shard} on {unit} in {record.seconds:.0f} s"


def _tests(number: int) -> str:
    return f"{number:,} test" if number == 1 else f"{number:,} tests"
