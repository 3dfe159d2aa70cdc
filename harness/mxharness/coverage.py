"""What a run set out to execute, and what of it ran: held against the manifest, limits and gaps in sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from mxharness.manifest import canonical, gate, label, operator

_LACKS = re.compile(
    r"could not import|is not installed|not measured: |not tried: |not compared: |^no GPU|^no CUDA device|^no nvcc"
    r"|^this CPU has no |^\S+ has no |^no baseline|says nothing about the bits of"
)
"""What a machine may lack, in the words that a test's skip says it in. Any other skip fails a run."""


@dataclass(frozen=True)
class Coverage:
    """What was demanded, collected, selected and left out."""

    manifest: str = ""
    """Digest of the manifest that the run was held against; empty where there was none to hold it against."""
    demanded: int = 0
    """Tests of the manifest, in the files that were named or in all."""
    lost: tuple[str, ...] = ()
    """Sentences: what of the manifest was not collected."""
    unknown: tuple[str, ...] = ()
    """Sentences: what was collected and is not in the manifest."""
    errors: tuple[str, ...] = ()
    """Suite files that could not be collected, each with its reason."""
    skips: tuple[str, ...] = ()
    """Sentences: tests skipped for another reason than that the machine lacks something."""
    collected: str = ""
    """Digest of all node ids before anything narrowed them: shards of one run agree on it."""
    selected: tuple[str, ...] = ()
    """Node ids to be executed, sorted."""
    missing: tuple[str, ...] = ()
    """Those that were not."""
    shard: str = ""
    """"I/N"; empty: all of it."""


def is_check(node_id: str, operators: Iterable[str]) -> bool:
    """Whether a test is one (operator, case, gate)."""
    return bool(gate(node_id)) and operator(node_id) in operators


def lawful(why: str) -> bool:
    """Whether a skip says what the machine lacks."""
    return bool(_LACKS.search(why))


def reasons(coverage: Coverage) -> list[str]:
    """Every way in which a run executed something else than it should have, the gravest first."""
    found = [f"could not collect {error}" for error in coverage.errors]
    found += [*coverage.lost, *coverage.unknown]
    if not coverage.selected:
        found.append("nothing was selected")
    elif coverage.missing:
        first = label(min(coverage.missing))
        found.append(f"{len(coverage.missing):,} of {len(coverage.selected):,} selected tests did not run, as {first}")
    return [*found, *coverage.skips]


def idle(judged: Iterable[str], drawn: Iterable[str], planted: int | None) -> list[str]:
    """What every whole run has, and this one lacks: random cases of every operator judged, and planted faults."""
    found = [] if planted else ["no planted fault was run"]
    if left := sorted(set(judged) - set(drawn)):
        found.append(f"no random case was judged of {', '.join(left)}")
    return found


def read(values: Mapping[str, Any] | None) -> Coverage | None:
    """What a run record holds."""
    if values is None:
        return None
    known: dict[str, Any] = {}
    for field in fields(Coverage):
        value = values[field.name]
        known[field.name] = tuple(value) if isinstance(value, list) else value
    return Coverage(**known)


def covered(coverage: Coverage) -> frozenset[str]:
    """Canonical ids of what ran."""
    return frozenset(map(canonical, set(coverage.selected) - set(coverage.missing)))
