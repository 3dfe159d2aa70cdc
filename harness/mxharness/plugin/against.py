"""--baseline and --update-baseline: what the run is compared with, and what it becomes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from mxharness.commands.running import Request, measured
from mxharness.errors import UserError
from mxharness.plugin import options
from mxharness.plugin.options import device_of
from mxharness.wording import counted

if TYPE_CHECKING:
    from mxharness.baseline import Baseline
    from mxharness.changes import Change
    from mxharness.record import RunRecord

_AGAINST = pytest.StashKey["Against | None"]()
_AGAIN = "run again without --update-baseline"


@dataclass
class Against:
    """The baseline that a run names, and what came of it."""

    device_class: str
    name: str
    stored: Baseline | None
    """None where it is not there yet, or is damaged, and is about to be written."""
    update: bool
    reasons: list[str] = field(default_factory=list)
    """Why the run fails on its account."""
    found: str = ""
    """What the comparison found, for the verdict of a run that passes."""
    held: bool = False
    """Whether the run was held against a baseline at all: the first of its class is against none."""
    moved: Sequence[Change] = ()
    """What is not the same, in the order of operators."""
    title: str = ""
    """Of a table of `moved`."""
    advice: str = ""
    """What to do after looking at it."""

    @property
    def label(self) -> str:
        """As "host/main"."""
        return f"{self.device_class}/{self.name}"


def of(config: pytest.Config) -> Against | None:
    """The run's baseline; None where it names none, and in a worker."""
    return config.stash.get(_AGAINST, None)


def settle(config: pytest.Config) -> None:
    """Find what --baseline names before anything runs; UserError where --update-baseline would lose something."""
    name, update = config.getoption("--baseline"), config.getoption("--update-baseline")
    if update and not name:
        raise UserError("--update-baseline rewrites the baseline that --baseline NAME names; name one")
    if not name:
        return
    from mxharness import baseline

    device = device_of(config)
    named, _, plain = name.rpartition("/")
    place = (named or device.device_class, baseline.checked_name(plain))
    if update:
        _refuse_part(config, device.device_class, place)
    try:
        stored = baseline.load(*place)
    except UserError:
        if not update:
            raise
        stored = None
    config.stash[_AGAINST] = Against(*place, stored, update)


def _refuse_part(config: pytest.Config, device_class: str, place: tuple[str, str]) -> None:
    """One baseline has one environment: rows of another run are not kept beside those of this one."""
    if place[0] != device_class:
        raise UserError(f"--update-baseline: a run on {device_class} cannot rewrite {'/'.join(place)}")
    limits = " ".join(options.limits(config))
    if limits or not options.whole(config):
        raise UserError(
            f"--update-baseline rewrites a whole baseline, and this run ({limits or 'of no project'}) would lose what "
            f"it leaves out; run all suites"
        )


def header(config: pytest.Config) -> str:
    """The baseline and its age, in words."""
    against = of(config)
    if against is None:
        return "compared with no baseline (--baseline NAME)"
    doing = "will be rewritten if everything passes" if against.update else "compared with it"
    if against.stored is None:
        return f"baseline {against.label} {doing.replace('rewritten', 'written')}"
    checks = counted(len(against.stored.checks), "check")
    return f"baseline {against.label}, {_age(against.stored.created)}, {checks}; {doing}"


def _age(created: str) -> str:
    """As "3 days old"; the date itself where it is none of ours."""
    try:
        days = (datetime.fromtimestamp(time.time(), UTC) - datetime.fromisoformat(created)).days
    except (ValueError, TypeError):
        return f"of {created}"
    return f"{counted(days, 'day')} old"


def compare(against: Against, record: RunRecord) -> None:
    """Hold the run against its baseline; what pytest does not measure was not asked for."""
    from mxharness import drift
    from mxharness.record import Skip

    no_model = Skip("perplexity", "the suites measure no model", asked=True)
    held = replace(record, skipped=(*record.skipped, no_model), kernels={})
    try:
        found = drift.compare(against.label, held)
    except UserError as error:  # it was there when the run began
        against.reasons.append(str(error))
        return
    against.held = True
    against.moved = [change for change in found.changes if change.status not in ("same", "not run")]
    against.title = f"Moved from {found.baseline}"
    if found.moved:
        against.reasons.append(f"moved from baseline {found.baseline}: {found.summary}")
        command = found.command if found.cross else f"pytest --baseline {against.name} --update-baseline"
        against.advice = f"where the change is meant, bless it: {command}"
    else:
        against.found = f"against {found.baseline}: {found.summary}"
    against.reasons += found.damaged


def bless(against: Against, record: RunRecord, config: pytest.Config, *, right: bool) -> RunRecord:
    """Make the run its baseline where everything is right, and fail it all the same; the record, with a model in it."""
    from mxharness import baseline
    from mxharness.blessing import weigh

    if not right:
        against.reasons.append(f"baseline {against.label} not written: a failing result is never blessed")
        return record
    if config.get_terminal_writer().width_of_current_line:
        config.get_terminal_writer().line()
    opened = device_of(config)
    record = measured(record, Request(device=opened.name), opened)
    try:
        weighed = weigh(against.name, record)
        if weighed.grown:
            grown = "; ".join(f"{what}: {how}" for what, how in weighed.grown)
            why = "growth past its budget is blessed by `mxharness baseline create --accept-growth WHY` only"
            raise UserError(f"{why} ({grown})")  # noqa: TRY301  the one way out that says so
        path = baseline.create(against.name, record, replace=True)
    except (UserError, OSError) as error:
        against.reasons.append(f"baseline {against.label} not written: {error}")
        return record
    done = "rewritten" if against.stored else "written"
    against.reasons.insert(0, f"baseline {against.label} {done}; {_AGAIN}")
    against.moved = [change for change in weighed.changes if change.status != "same"]
    against.held = weighed.against is not None
    against.title = f"Blessed, against {weighed.against}" if weighed.against else "Blessed"
    against.advice = f"review and commit {path}"
    return record
