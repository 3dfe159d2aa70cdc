"""The ledger's side of the pytest plugin: known failures are expected to fail, and strictly so."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from mxharness import ledger
from mxharness.plugin import options
from mxharness.plugin.options import device_of, is_check, parameter

_KNOWN = pytest.StashKey["Known"]()
_EXCUSE, _UNUSED = "known failure", "unused known failures"
_FAILURES = (AssertionError, pytest.fail.Exception, BaseExceptionGroup)
"""What a test fails with; any other exception is an error of its own and excused by nothing."""


@dataclass
class Known:
    """What one run makes of the ledger; the controller takes in every report."""

    entries: tuple[ledger.Entry, ...]
    """Of the run's device class."""
    wrong: list[str] = field(default_factory=list)
    """Sentences: what the ledger gets wrong; any fails the run."""
    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    """By check or node id: what failed as it was expected to."""

    def take(self, report: pytest.TestReport) -> bool:
        """Take in a listed test that failed as expected or passed; False for any other report."""
        row = next((value for name, value in report.user_properties if name == _EXCUSE), None)
        if not isinstance(row, dict) or report.when != "call":
            return False
        if report.skipped and hasattr(report, "wasxfail"):
            self.rows[row["check"]] = row
            return True
        if report.failed and str(report.longrepr).startswith("[XPASS(strict)]"):
            self.wrong.append(ledger.passes(row["check"], row["entry"]))
            return True
        return False


def of(config: pytest.Config) -> Known:
    """The run's known failures. Raises UserError where the ledger cannot be read, or the device cannot be had."""
    if _KNOWN not in config.stash:
        named = config.getoption("--known-failures")
        entries = ledger.load(Path(named) if named else None)
        mine = ledger.of_device(entries, device_of(config).device_class) if entries else ()
        config.stash[_KNOWN] = Known(mine, list(ledger.expired(mine, _today())))
    return config.stash[_KNOWN]


def _today() -> date:
    """In UTC, so that an entry expires everywhere at once."""
    return datetime.now(UTC).date()


def _name(item: pytest.Item) -> str:
    """What the ledger calls a test: a check by its "case gate", any other by its node id."""
    return f"{parameter(item, 'case')} {parameter(item, 'gate')}" if is_check(item) else item.nodeid


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Expect listed tests to fail: pytest's strict xfail. In a whole run every entry must mean one."""
    known = of(config)
    if not known.entries:
        return
    for item in items:
        entry = ledger.excuse(known.entries, _name(item), _today())
        if entry is not None:
            reason = f"known failure until {entry.expires}: {entry.reason} ({entry.where})"
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True, raises=_FAILURES))
            item.user_properties.append((_EXCUSE, entry.row(_name(item))))
    if all(limit.startswith("--shard ") for limit in options.limits(config)):  # shards are cut after this
        unused = list(ledger.unused(known.entries, [_name(item) for item in items]))
        known.wrong += unused
        if hasattr(config, "workeroutput"):
            config.workeroutput[_UNUSED] = unused


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:  # noqa: ANN401  xdist's WorkerController, which has no stubs
    """Take over what a worker found: all workers collect the same."""
    wrong = of(node.config).wrong
    wrong += [one for one in getattr(node, "workeroutput", {}).get(_UNUSED, ()) if one not in wrong]
