"""What one pytest run found: collected from reports, told on the terminal, written as a run record."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mxharness import fuzz
from mxharness.coverage import Coverage, idle, is_check, lawful, reasons
from mxharness.manifest import operator, parameters
from mxharness.plugin.known import Known
from mxharness.repeat import of_test

if TYPE_CHECKING:
    from mxharness.device import Device
    from mxharness.record import RunRecord

_RANDOM = re.compile(r"@[0-9]+of[0-9]+@")
"""In the node id of a test that draws random cases: which part of them (fuzz.Part)."""


@dataclass(eq=False)  # pytest keeps its plugins in a set
class Session:
    """What the controller knows about the run; registered with pytest, it receives every report."""

    started: float = field(default_factory=time.time)
    collection: dict[str, Any] = field(default_factory=dict)
    """What was collected, held against the manifest: some fields of a Coverage."""
    shard: str = ""
    whole: bool = False
    """Whether nothing narrows the run."""
    selected: set[str] = field(default_factory=set)
    """Node ids of the tests that must run."""
    ran: set[str] = field(default_factory=set)
    beyond: set[str] = field(default_factory=set)
    """Node ids of checks under a gate that cannot judge this device, for want of a device fact."""
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The verdicts by "case gate"; of several on one check a failing one is kept."""
    passed: int = 0
    """Tests that are no checks."""
    failed: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    """(node id, reason) of tests that failed beside their check, or that are none."""
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(test function, reason) -> how many of its cases."""
    errors: list[str] = field(default_factory=list)
    """Files that could not be collected."""
    faults: list[dict[str, Any]] = field(default_factory=list)
    fuzz: list[dict[str, Any]] = field(default_factory=list)
    known: Known = field(default_factory=lambda: Known(()))
    """Failures that the ledger lists."""
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By operator, what its tests took, all phases of all processes together."""
    redrawn: tuple[str, ...] = ()
    """The options that a random test takes to draw the same cases again."""
    kept: RunRecord | None = None
    """The record that was saved or compared, where one was."""
    diary: Path | None = None
    """A file that names the test that began last: what to look at when this process is killed."""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note what is about to run."""
        if self.diary:
            self.diary.write_text(nodeid, encoding="utf-8")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Take in a file that cannot be collected."""
        if report.failed:
            error = f"{report.nodeid or 'the suites'} ({report.longreprtext.strip().splitlines()[-1].strip()})"
            if error not in self.errors:  # every worker collects
                self.errors.append(error)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in a report; under xdist they arrive at the controller."""
        if report.when not in ("setup", "teardown") or not report.passed:  # a crashed worker's test has no `when`
            self.ran.add(report.nodeid)
        self.seconds[operator(report.nodeid)] += report.duration
        outcomes = list(_properties(report, "outcome"))
        for row in outcomes:
            key = f"{row['case']} {row['gate']}"
            if key not in self.outcomes or self.outcomes[key]["passed"]:
                self.outcomes[key] = row
        self.beyond |= {report.nodeid for _ in _properties(report, "beyond")}
        self.faults += _properties(report, "fault")
        self.fuzz += _properties(report, "fuzz")
        if self.known.take(report):
            return
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            why = str(reason).removeprefix("Skipped: ")
            self.skipped[report.nodeid.partition("[")[0], why] += 1
        elif report.failed and all(row["passed"] for row in outcomes):
            self.failed += 1
            self.failures.append((report.nodeid, _reason(report)))
        elif report.passed and report.when == "call" and not outcomes:
            self.passed += 1

    @property
    def checks(self) -> set[str]:
        """Node ids of the selected checks that must leave a verdict."""
        from mxharness.ops import OPS

        names = {op.name for op in OPS}
        return {node_id for node_id in self.selected - self.beyond if is_check(node_id, names)}

    @property
    def missing(self) -> set[str]:
        """What was selected and did not run, or left no verdict though it is a check."""
        judged = {f"{row['case']}-{row['gate']}" for row in self.outcomes.values()}
        silent = {check for check in self.checks if parameters(check) not in judged}
        return (self.selected - self.ran) | silent

    def coverage(self) -> Coverage:
        """What was to run and what did."""
        held = bool(self.collection.get("manifest"))
        skips = [
            f"{what.rpartition('/')[2]} was skipped for no lack of the machine's ({why})"
            for what, why in self.skipped
            if held and not lawful(why)
        ]
        return Coverage(
            **self.collection,
            errors=tuple(self.errors),
            skips=tuple(skips),
            selected=tuple(sorted(self.selected)),
            missing=tuple(sorted(self.missing)),
            shard=self.shard,
        )

    @property
    def failing(self) -> int:
        """How many verdicts are bad, whatever their tests made of them."""
        return sum(not row["passed"] for key, row in self.outcomes.items() if key not in self.known.rows)

    def problems(self) -> list[str]:
        """Why the run fails, whatever a baseline says, the gravest first; empty when it passes."""
        drawn = fuzz.merged(self.fuzz)
        found = [*reasons(self.coverage()), *fuzz.reasons(drawn), *self.known.wrong]
        if self.whole and self.collection.get("manifest"):
            found += idle({row["op"] for row in self.outcomes.values()}, {row.op for row in drawn}, len(self.faults))
        for number, noun in ((self.failing, "check"), (self.failed, "other test")):
            if number:
                found.append(f"{number:,} {noun}{'s' if number > 1 else ''} failed")
        return found

    def first_line(self, record: RunRecord, exitstatus: int, reasons: Sequence[str] = (), compared: str = "") -> str:
        """The verdict with its coverage, as pytest's summary says it first.

        reasons: why else it fails. compared: what a comparison with a baseline found that is no such reason.
        """
        from mxharness.record import achieved

        found = [*self.problems(), *reasons]
        if exitstatus and not found:
            found = [f"pytest ended with code {exitstatus:d}"]
        return f"{'FAIL' if found else 'PASS'}: {'; '.join(filter(None, (*found, *achieved(record), compared)))}"

    def record(
        self, device: Device, command: str, filters: tuple[str, ...], *, incomplete: str = "", facts: bool = True
    ) -> RunRecord:
        """Everything as one record. facts: ask the machine what it is, which takes a moment."""
        from mxharness import environment
        from mxharness.device import cuda, host
        from mxharness.op import Outcome
        from mxharness.ops import OPS
        from mxharness.record import Failure, OtherTests, RunRecord, Skip

        flags = host.FLAGS if device.name == "host" else cuda.FLAGS
        return RunRecord(
            device_class=device.device_class,
            arithmetic=device.arithmetic,
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            seconds=time.time() - self.started,
            command=command,
            selected=len(self.checks),
            executed=len(self.outcomes),
            outcomes=tuple(Outcome(**{**row, "shape": tuple(row["shape"])}) for row in self.outcomes.values()),
            environment=environment.describe(device, flags=flags) if facts else {},
            axes={op.name: op.axes for op in OPS},
            sources={op.name: op.source for op in OPS},
            tolerances={op.name: op.tolerance.provenance for op in OPS},
            filters=filters,
            skipped=tuple(Skip(what, why, count=count) for (what, why), count in self.skipped.items()),
            faults=tuple(self.faults) or None,
            tests=OtherTests(
                passed=self.passed,
                failed=self.failed,
                failures=tuple(
                    Failure(name, message, self._repeat(name, device.name)) for name, message in self.failures
                ),
            ),
            coverage=self.coverage(),
            fuzz=fuzz.merged(self.fuzz),
            incomplete=incomplete,
            known=tuple(self.known.rows[key] for key in sorted(self.known.rows)),
            ledger=tuple(self.known.wrong),
        )

    def _repeat(self, node_id: str, device: str) -> str:
        """What to type to run one test again."""
        drawn = _RANDOM.search(node_id) is not None
        return of_test(device, node_id, self.redrawn if drawn else ())


def _properties(report: pytest.TestReport, wanted: str) -> Iterator[dict[str, Any]]:
    """What a test left under one name, from its call alone: setup and teardown repeat it."""
    for name, value in report.user_properties:
        if report.when == "call" and name == wanted and isinstance(value, dict):
            yield value


def _reason(report: pytest.TestReport) -> str:
    """What a test failed with, without the traceback; of what is no failed assertion also where it was raised."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:
        return str(report.longreprtext).strip()
    message = str(crash.message).strip()
    asserted = message.startswith(("assert ", "AssertionError", "Failed: "))
    return message if asserted else f"{message} ({Path(crash.path).name}, line {crash.lineno})"
