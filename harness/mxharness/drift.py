"""How far a run has moved from a baseline, and from all baselines before it.

changes.py tells what moved since the one baseline; history.py tells what has come together over many, each of which
was small enough to be blessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mxharness import baseline, history
from mxharness.baseline import Baseline, Root
from mxharness.changes import NATS, PASSING, Change, Judged, Status, between
from mxharness.errors import UserError
from mxharness.record import RunRecord, is_right, perplexity_holds, perplexity_left_out, verdict
from mxharness.wording import named

__all__ = ("NATS", "PASSING", "Change", "Comparison", "Status", "compare", "overgrown")


@dataclass(frozen=True)
class Comparison:
    """A run against a baseline."""

    baseline: str
    """"sm_90/main"."""
    subject: str
    """What is compared: the device class of a run, or "sm_90/v2"."""
    created: str
    """UTC, ISO 8601: when the blessed run started."""
    changes: tuple[Change, ...]
    environment: tuple[tuple[str, str, str], ...]
    """What differs between the two environments: (what, in the baseline, in the run)."""
    incomplete: tuple[str, ...]
    """Why the run itself does not count, whatever the baseline says; empty when it does."""
    command: str
    """What to type, after looking, to bless the run; empty where there is none."""
    cross: bool = False
    """Whether the two are of different device classes."""
    damaged: tuple[str, ...] = ()
    """Sentences: other versions that cannot be read, over which growth was therefore not judged."""

    @property
    def counts(self) -> Mapping[str, int]:
        """How many changes have each status."""
        return Counter(change.status for change in self.changes)

    @property
    def passed(self) -> bool:
        """Nothing moved for the worse, the run itself passed, so it compared something, and growth was judged."""
        return not (self.incomplete or self.damaged or self.moved)

    @property
    def moved(self) -> bool:
        """Something failed, drifted, vanished or is new."""
        return any(change.status not in PASSING for change in self.changes)

    @property
    def summary(self) -> str:
        """How many checks have which status, the gravest first."""
        order: tuple[Status, ...] = ("failed", "drifted", "vanished", "new", "better", "same", "not run")
        return ", ".join(f"{self.counts[status]} {status}" for status in order if self.counts[status])

    @property
    def first_line(self) -> str:
        """One sentence that begins with PASS or FAIL."""
        word = "PASS" if self.passed else "FAIL"
        head = f"{word}: {self.subject} against {self.baseline}: {self.summary}"
        parts = [head, *self.incomplete, *self.damaged]
        if self.cross:
            parts.append(f"bit for bit, though these differ: {named([what for what, _, _ in self.environment])}")
        return "; ".join(parts)


def compare(name: str, record: RunRecord, device_class: str | None = None, root: Root = None) -> Comparison:
    """Compare a run with baseline `name`, or `device_class`/`name`; "sm_90/main" as `name` says both.

    root: the folder of all baselines, by default as in baseline.load.

    Another device class than the run's is compared only when named, and then bit for bit: any other digest fails.
    Raises UserError where the baseline is missing or damaged, and for a run in the host's float32 mode.
    """
    named, _, plain = name.rpartition("/")
    stored = baseline.load(device_class or named or record.device_class, plain, root)
    if record.arithmetic != "tensor-core":
        raise UserError(f"baselines hold tensor-core bits and this run used {record.arithmetic} arithmetic")
    command = f"mxharness baseline create {stored.name} --replace"
    if stored.device_class != record.device_class:
        command = f"{command}    (on a {stored.device_class} device)"
    found = _comparison(stored, baseline.of(record), _judged(record), root)
    return replace(found, subject=record.device_class, incomplete=verdict(record).reasons, command=command)


def diff(before: Baseline, after: Baseline, root: Root = None) -> Comparison:
    """What moved from one baseline to another; of two device classes bit for bit. root: as in baseline.load."""
    return _comparison(before, after, None, root)


def _comparison(stored: Baseline, found: Baseline, judged: Judged | None, root: Root) -> Comparison:
    cross = stored.device_class != found.device_class
    changes = between(stored, found, judged)
    others = baseline.Survey((), (), ()) if cross else baseline.survey(stored.device_class, root)
    changes = (*changes, *_cuts(stored, found, history.in_order(others.versions)))
    return Comparison(
        baseline=f"{stored.device_class}/{stored.name}",
        subject=f"{found.device_class}/{found.name}",
        created=stored.created,
        changes=tuple(sorted(changes, key=lambda change: (change.op, change.key))),
        environment=_environment_changes(stored, found),
        incomplete=(),
        command="",
        cross=cross,
        damaged=tuple(f"growth not judged over {one.device_class}/{one.name}: {one.why}" for one in others.damaged),
    )


def _judged(record: RunRecord) -> Judged:
    """What the run's own judges say, by the keys that a baseline uses."""
    wrong = dict.fromkeys(
        baseline.unstable(record), "ran twice with different bits; the kernel is not deterministic"
    ) | {
        baseline.key(outcome.case, outcome.gate): outcome.message or "failed without a message"
        for outcome in record.outcomes
        if not is_right(outcome)
    }
    for row in record.perplexity:
        if not perplexity_holds(row):
            wrong[baseline.perplexity_key(row)] = str(row.get("message", "")) or "out of tolerance"
    return Judged(wrong, bool(record.filters), perplexity_left_out(record))


def overgrown(found: Baseline, before: Sequence[Baseline]) -> list[tuple[history.Series, history.Growth]]:
    """What has grown past its budget over the versions `before` and `found`, its last: small moves add up."""
    earlier = [version for version in before if version.created <= found.created]
    grown = [(series, history.growth(series)) for series in history.all_series((*earlier, found))]
    return [(series, growth) for series, growth in grown if growth.exceeded and growth.until == found.name]


def _cuts(stored: Baseline, found: Baseline, versions: Sequence[Baseline]) -> list[Change]:
    """A line for all growth past its budget but what came since the stored baseline alone: `between` has that."""
    before = [version for version in versions if version.created <= stored.created]
    return [
        Change(
            f"{series.key} growth",
            series.op,
            "drifted",
            None,
            None,
            f"{growth.sentence(series.quantity)}; `mxharness baseline history {stored.device_class}` shows it",
        )
        for series, growth in overgrown(found, before)
        if growth.since != stored.name
    ]


def _environment_changes(stored: Baseline, found: Baseline) -> tuple[tuple[str, str, str], ...]:
    names = dict.fromkeys((*found.environment, *stored.environment))
    pairs = ((name, str(stored.environment.get(name, "-")), str(found.environment.get(name, "-"))) for name in names)
    return tuple(pair for pair in pairs if pair[1] != pair[2])
