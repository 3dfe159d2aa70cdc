"""Records that no run made, and a page as a reader sees it: what tests of verdicts and reports start from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from mxharness import baseline, changes
from mxharness.baseline import Baseline
from mxharness.changes import Status
from mxharness.op import Case, Gate, Outcome
from mxharness.record import RunRecord, Skip

HOSTILE = "<script>alert(1)</script><img src=http://example.org/x onerror=alert(2)>\" ' & {{ 7 * 7 }}"
LEFT_OUT = Skip("perplexity", "left out", asked=True)
PERPLEXITY = {
    "name": "tiny",
    "text": "prose (not WikiText-2)",
    "protocol": "windows of 512",
    "weights": "mxfp4",
    "activations": "bf16",
    "perplexity": 59.7537,
    "kl": 1.5e-5,
    "text_sha256": "173c87a5",
    "tokens_per_second": 101.0,
    "passed": True,
    "message": "1.6e-3 relative, 5e-3 allowed",
}


def outcome(
    seed: int = 0,
    gate: Gate = "bound",
    *,
    op: str = "gemm",
    ratio: float = 0.31234567,
    message: str = "",
    **fields: object,
) -> Outcome:
    """One check, wrong where it has a message. fields: of Outcome."""
    case = Case(op, (3, 33, 64), seed=seed)
    facts = {
        "case": str(case),
        "op": op,
        "shape": case.shape,
        "dtype": case.dtype,
        "regime": case.regime,
        "device": "host",
        "gate": gate,
        "passed": not message,
        "elements": 99,
        "bad": int(bool(message)),
        "nan": int(math.isnan(ratio)),
        "inf": 0,
        "ratio": ratio,
        "max_ulp": 0.75,
        "nmse": 1.23456e-6,
        "digest": f"{seed:016x}",
        "inputs": "abcdef0123456789",
        "message": message,
    }
    return Outcome(**{**facts, **fields})  # type: ignore[arg-type]  # the facts above have Outcome's types


def run(*outcomes: Outcome, **fields: object) -> RunRecord:
    """A run of these checks, or of three that are right; all executed. fields: of RunRecord."""
    outcomes = outcomes or (outcome(0), outcome(1), outcome(1, "predicted", ratio=0.0))
    facts = {
        "device_class": "host",
        "arithmetic": "tensor-core",
        "started": "2026-11-21T22:40:00Z",
        "seconds": 1.5,
        "command": "mxharness run --device host",
        "selected": len(outcomes),
        "executed": len(outcomes),
        "outcomes": outcomes,
        "environment": {"kernels/gemm.cu": "1234"},
        "axes": {"gemm": "M N K"},
        "perplexity": (PERPLEXITY,),
    }
    return RunRecord(**{**facts, **fields})  # type: ignore[arg-type]  # the facts above have RunRecord's types


GOOD = run(outcome(0), outcome(1), outcome(0, "exact", op="dequant", ratio=0.0), skipped=(Skip("peer gguf", "absent"),))
BAD = run(
    outcome(0, message="51x the bound", ratio=51.0),
    outcome(1, message=HOSTILE, ratio=math.nan),
    outcome(2, "exact", op="dequant", ratio=math.inf, message="3 codes differ"),
    outcome(3),
    skipped=(Skip("peer gguf", "package not installed"),),
)


# One version after the other

CASES = 24
FAULTS = ({"name": "swap", "caught": True, "detector": "exact"}, {"name": "drop", "caught": True, "detector": "race"})
KERNELS = {"gemm.cu gemm_bf16": {"registers": 64, "stack": 0, "spill_stores": 0, "spill_loads": 0, "shared": 512}}


def case_of(seed: int, factor: float = 1.0, digest: int = 0) -> Outcome:
    """A check of a version, its error `factor` times the first version's."""
    return outcome(
        seed,
        ratio=0.02 * (1 + seed / CASES) * factor,
        digest=f"{digest:08x}{seed:08x}",
        inputs=f"{seed:016x}",
        high_ratio=0.01,
        line=0.3,
    )


def version(month: int = 1, factor: float = 1.0, **fields: object) -> RunRecord:
    """Version number `month`, all of whose errors are `factor` times the first's; other bits where that is not 1."""
    facts = {
        "started": f"2026-{month:02}-01T00:00:00Z",
        "environment": {"commit": f"c{month}"},
        "faults": FAULTS,
        "kernels": KERNELS,
    }
    outcomes = [case_of(seed, factor, digest=month if factor != 1 else 0) for seed in range(CASES)]
    return run(*outcomes, **{**facts, **fields})


def versions(*records: RunRecord) -> tuple[Baseline, ...]:
    """What blessing them would store, by the names v0, v1 .."""
    return tuple(replace(baseline.of(one), name=f"v{i}") for i, one in enumerate(records))


def moved(before: Baseline, after: Baseline) -> dict[str, Status]:
    """What is not the same, by key."""
    return {change.key: change.status for change in changes.between(before, after) if change.status != "same"}


def crash_after(calls: int, target: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    """`target`, raising at call number `calls` (from 0) instead of doing anything."""
    count = 0

    def rename(self: Path, other: Path) -> Path:
        nonlocal count
        count += 1
        if count == calls + 1:
            raise KeyboardInterrupt
        return target(self, other)

    return rename


class Page(HTMLParser):
    """What a browser would make of the page: its text, its tags, every address it would fetch."""

    VOID = frozenset({"meta", "link", "input", "br", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element begins."""
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element that has no content."""
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        """An element ends, and it is the one that began last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Text, kept where a reader sees it."""
        if not {"style", "script", "title"} & set(self.open):
            self.words.append(data)

    @property
    def lines(self) -> list[str]:
        """What a reader sees, in order."""
        return [word.strip() for word in self.words if word.strip()]
