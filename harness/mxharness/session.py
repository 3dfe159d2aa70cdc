"""What one pytest run found: collected from reports, told on the terminal, written as a run record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mxharness.device import Device
    from mxharness.record import RunRecord

_BOUNDED = ("bound", "composed")


@dataclass(eq=False)  # pytest keeps its plugins in a set
class Session:
    """What the controller knows about the run; registered with pytest, it receives every report."""

    started: float = field(default_factory=time.time)
    selected: set[str] = field(default_factory=set)
    """Keys "case gate" of the checks that must leave a verdict."""
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The verdicts by the same key; of several on one check a failing one is kept."""
    passed: int = 0
    """Tests that are no checks."""
    failed: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    """(node id, reason) of tests that failed beside their check, or that are none."""
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(test function, reason) -> how many of its cases."""
    faults: list[dict[str, Any]] = field(default_factory=list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in a report; under xdist they arrive at the controller."""
        outcomes = list(_properties(report, "outcome"))
        for row in outcomes:
            key = f"{row['case']} {row['gate']}"
            if key not in self.outcomes or self.outcomes[key]["passed"]:
                self.outcomes[key] = row
        self.faults += _properties(report, "fault")
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skipped[report.nodeid.partition("[")[0], str(reason).removeprefix("Skipped: ")] += 1
        elif report.failed and all(row["passed"] for row in outcomes):
            self.failed += 1
            self.failures.append((report.nodeid, _reason(report)))
        elif report.passed and report.when == "call" and not outcomes:
            self.passed += 1

    @property
    def missing(self) -> set[str]:
        """Checks that were selected and left no verdict."""
        return self.selected - set(self.outcomes)

    @property
    def failing(self) -> bool:
        """Whether a verdict is bad, whatever its test made of it."""
        return any(not row["passed"] for row in self.outcomes.values())

    def lines(self) -> Iterator[str]:
        """Coverage by operator and gate, and what did not happen and why."""
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self.outcomes.values():
            groups.setdefault((row["op"], row["gate"]), []).append(row)
        for (op, gate), rows in sorted(groups.items()):
            good = sum(row["passed"] for row in rows)
            elements = sum(row["elements"] for row in rows)
            worst = f", largest error {max(row['ratio'] for row in rows):.3g} of the bound" if gate in _BOUNDED else ""
            yield f"{op:28} {gate:17} {good:4} of {len(rows):4} checks, {elements:9,} elements{worst}"
        for (what, why), count in self.skipped.items():
            yield f"did not happen: {why} ({what}{f', {count} cases' if count > 1 else ''})"

    def record(self, device: Device, command: str, filters: tuple[str, ...]) -> RunRecord:
        """Everything as one record."""
        from mxharness import environment
        from mxharness.device import cuda, host
        from mxharness.op import Outcome
        from mxharness.ops import OPS
        from mxharness.record import Failure, OtherTests, RunRecord, Skip

        return RunRecord(
            device_class=device.device_class,
            arithmetic=device.arithmetic,
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            seconds=time.time() - self.started,
            command=command,
            selected=len(self.selected),
            executed=len(self.outcomes),
            outcomes=tuple(Outcome(**{**row, "shape": tuple(row["shape"])}) for row in self.outcomes.values()),
            environment=environment.describe(device, flags=host.FLAGS if device.name == "host" else cuda.FLAGS),
            axes={op.name: op.axes for op in OPS},
            sources={op.name: op.source for op in OPS},
            filters=filters,
            skipped=tuple(Skip(what, why, count=count) for (what, why), count in self.skipped.items()),
            faults=tuple(self.faults) or None,
            tests=OtherTests(
                passed=self.passed,
                failed=self.failed,
                failures=tuple(Failure(name, message) for name, message in self.failures),
            ),
        )


def _properties(report: pytest.TestReport, wanted: str) -> Iterator[dict[str, Any]]:
    """What a test left under one name, from its call alone: setup and teardown repeat it."""
    for name, value in report.user_properties:
        if report.when == "call" and name == wanted and isinstance(value, dict):
            yield value


def _reason(report: pytest.TestReport) -> str:
    """What a test failed with, without the traceback."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longreprtext).strip()
