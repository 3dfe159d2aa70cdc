"""What a whole run must execute: the committed list of every check and every other test of the suites.

suites/manifest.txt holds one test function a block and one parameter set a line, sorted. What stands in it and is not
collected has vanished, what is collected and does not stand in it is new; both fail a run, so that the list can never
go stale. Only `mxharness manifest --write` changes it.

What a parameter's id has between two @ varies by machine or by request (the newest baseline, the part of a fuzz) and is
no part of the manifest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mxharness.errors import UserError
from mxharness.op import GATES
from mxharness.wording import counted, named

FILE = "suites/manifest.txt"
"""Below the folder that holds suites/."""
BLESS = "`mxharness manifest --write` blesses what there is"

_HEAD = "# What a whole run must execute. Written by `mxharness manifest --write`; a run fails where it differs.\n"
_VARIES = re.compile(r"^@[^@]*@-?|-@[^@]*@")


@dataclass(frozen=True)
class Manifest:
    """Node ids, as `canonical` gives them."""

    checks: frozenset[str] = frozenset()
    """Tests that are one (operator, case, gate) each."""
    tests: frozenset[str] = frozenset()
    """Every other one."""

    @property
    def ids(self) -> frozenset[str]:
        """All of them."""
        return self.checks | self.tests

    @property
    def digest(self) -> str:
        """First 16 hex digits of the sha256 of the file's text."""
        return hashlib.sha256(render(self).encode()).hexdigest()[:16]

    def only(self, ids: Collection[str]) -> Manifest:
        """What of it is in `ids`."""
        return Manifest(self.checks.intersection(ids), self.tests.intersection(ids))


@dataclass(frozen=True)
class Difference:
    """What is collected now against a manifest."""

    vanished: Manifest
    new: Manifest
    operators: tuple[str, ...]
    """Whose every check vanished."""
    gates: tuple[str, ...]
    """That no check is under any more."""
    files: tuple[str, ...]
    """Of which nothing is left."""

    def __bool__(self) -> bool:
        return bool(self.vanished.ids or self.new.ids)

    def lost(self) -> tuple[str, ...]:
        """Sentences about what vanished, the largest things first."""
        found = []
        for what, names in (("operator", self.operators), ("gate", self.gates), ("suite file", self.files)):
            if names:
                found.append(f"{counted(len(names), what)} of the manifest vanished: {named(names)}")
        for what, ids in (("check", self.vanished.checks), ("other test", self.vanished.tests)):
            if ids:
                found.append(f"{counted(len(ids), what)} of the manifest vanished, as {label(min(ids))}")
        return tuple(found)

    def unknown(self) -> tuple[str, ...]:
        """A sentence about what is not in the manifest."""
        ids = self.new.ids
        if not ids:
            return ()
        are = "is" if len(ids) == 1 else "are"
        return (f"{counted(len(ids), 'test')} {are} not in the manifest, as {label(min(ids))} ({BLESS})",)


def canonical(node_id: str) -> str:
    """The node id without what varies by machine or by request."""
    kept = _VARIES.sub("", parameters(node_id))
    return f"{function(node_id)}[{kept}]" if kept else function(node_id)


def function(node_id: str) -> str:
    """The test function of a node id."""
    return node_id.partition("[")[0]


def parameters(node_id: str) -> str:
    """What stands in the brackets; for a check "case-gate"."""
    return node_id.partition("[")[2].removesuffix("]")


def label(node_id: str) -> str:
    """A node id as a message shows it: a check by its case and gate alone, anything else without its folder."""
    inner = parameters(node_id)
    return inner if inner.endswith(GATES) else node_id.rpartition("/")[2]


def operator(check: str) -> str:
    """The operator of a check's node id."""
    return parameters(check).partition("-")[0]


def gate(check: str) -> str:
    """The gate of a check's node id."""
    return max((name for name in GATES if parameters(check).endswith(f"-{name}")), key=len, default="")


def compare(manifest: Manifest, collected: Manifest) -> Difference:
    """What of `manifest` is not collected, and what is collected and not in it."""

    def gone(wanted: Iterable[str], found: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(set(wanted) - set(found)))

    return Difference(
        vanished=Manifest(manifest.checks - collected.ids, manifest.tests - collected.ids),
        new=Manifest(collected.checks - manifest.ids, collected.tests - manifest.ids),
        operators=gone(map(operator, manifest.checks), map(operator, collected.checks)),
        gates=gone(map(gate, manifest.checks), map(gate, collected.checks)),
        files=gone(map(_file, manifest.ids), map(_file, collected.ids)),
    )


def within(manifest: Manifest, named: Sequence[str], ignored: Sequence[str] = ()) -> Manifest:
    """What of it lies in the folders, files or tests `named`, and in none of `ignored`."""

    def inside(node_id: str, places: Sequence[str]) -> bool:
        return any(node_id == place or node_id.startswith((f"{place}/", f"{place}::", f"{place}[")) for place in places)

    return manifest.only([one for one in manifest.ids if inside(one, named) and not inside(one, ignored)])


def shard_of(text: str) -> tuple[int, int]:
    """(part from 1, parts) of "I/N"; UserError for anything else."""
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    index, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= index <= count:
        raise UserError(f"no shard '{text}'; parts are 1/N to N/N, as 2/3")
    return index, count


def shard(ids: Iterable[str], index: int, count: int) -> frozenset[str]:
    """Part `index` (from 1) of `count`: the same on every machine, as many of each test function in every part."""
    order = sorted(ids, key=lambda one: (function(one), hashlib.sha256(one.encode()).digest()))
    return frozenset(order[index - 1 :: count])


def render(manifest: Manifest) -> str:
    """The file's text."""
    blocks: dict[str, list[str]] = {}
    for kind, ids in (("checks", manifest.checks), ("tests", manifest.tests)):
        for one in ids:
            blocks.setdefault(f"{kind} {function(one)}", []).extend(filter(None, (parameters(one),)))
    lines = []
    for head in sorted(blocks, key=lambda head: head.partition(" ")[2]):
        lines += [head, *(f"  {inner}" for inner in sorted(blocks[head]))]
    return _HEAD + "".join(f"{line}\n" for line in lines)


def parse(text: str, name: str = FILE) -> Manifest:
    """Read what `render` wrote. Raises UserError, one sentence, for a line that it would not have written."""
    found: dict[str, set[str]] = {"checks": set(), "tests": set()}
    kind, head, bare = "", "", False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#") or not line:
            continue
        if line.startswith("  ") and head:
            if bare:
                found[kind].discard(head)
                bare = False
            found[kind].add(f"{head}[{line[2:]}]")
            continue
        kind, _, head = line.partition(" ")
        if kind not in found or not head:
            raise UserError(
                f"{name} is damaged: line {number} is '{line}', not 'checks TEST', 'tests TEST' or a parameter"
            )
        found[kind].add(head)
        bare = True
    return Manifest(frozenset(found["checks"]), frozenset(found["tests"]))


def load(root: Path) -> Manifest:
    """The manifest below `root`. Raises UserError where there is none, or a damaged one."""
    path = root / FILE
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"cannot read the manifest {path} ({why}); {BLESS}") from error


def _file(node_id: str) -> str:
    return node_id.partition("::")[0]
