"""A test that takes long shows how far it is, and leaves the terminal as it was."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mxharness import progress
from mxharness.plugin import watch
from mxharness.plugin.watch import Watch

TEST = "suites/test_fuzz.py::test_fuzz[gemm-@1of1@]"


def config(column: int = 0, *, workers: int = 0, verbosity: int = 0) -> Any:  # noqa: ANN401  what of a Config is asked
    writer = SimpleNamespace(width_of_current_line=column, fullwidth=90, hasmarkup=False)
    options = {"numprocesses": workers}
    return SimpleNamespace(
        get_terminal_writer=lambda: writer,
        getoption=lambda name, default=None: options.get(name, default),
        get_verbosity=lambda: verbosity,
    )


def watched(terminal: bool, seconds: float, **options: int) -> Watch:
    """A watch on one test that began so many seconds ago."""
    found = Watch(config(**options), io.StringIO(), terminal)
    found.running[TEST] = time.monotonic() - seconds
    return found


def written(found: Watch) -> str:
    assert isinstance(found.stream, io.StringIO)
    return found.stream.getvalue()


# Where there is no terminal


def test_a_line_now_and_then_says_how_long_and_how_far() -> None:
    found = watched(False, 31, column=20)
    with progress.counting("random cases", 1000) as advance:
        advance(412)
        found.tell()
        found.tell()
    line = "mxharness: test_fuzz.py::test_fuzz[gemm-@1of1@] has been running for 31 s, 412 of 1,000 random cases"
    assert written(found) == f"\n{line}\nsuites/test_fuzz.py ", "once, and pytest's line is begun again"
    found.told -= watch.LINE_EVERY
    found.tell()
    assert written(found).count("has been running for 31 s\n") == 1, "nothing is counted any more"


@pytest.mark.parametrize(
    ("options", "begun", "end"),
    [
        ({"column": 0}, "", ""),
        ({"column": 9, "verbosity": 1}, "\n", f"{TEST} "),
        ({"column": 9, "verbosity": -1}, "\n", ""),
        ({"column": 9, "workers": 2}, "\n", ""),
    ],
)
def test_a_line_of_its_own_whatever_pytest_has_begun(options: dict[str, int], begun: str, end: str) -> None:
    found = watched(False, 31, **options)
    with progress.counting("random cases", 1000):
        found.tell()
        found.told = 0.0
        found.tell()
    text = written(found)
    assert text.startswith(f"{begun}mxharness: ")
    assert text.endswith(f"\n{end}")
    assert text.count("\n\n") == 0
    assert ("0 of 1,000" in text) == ("workers" not in options), "of another process nothing is known but the time"


def test_what_is_short_is_not_told() -> None:
    for terminal, seconds in ((False, watch.LINE_EVERY - 1), (True, watch.SHOWN_AFTER - 1)):
        found = watched(terminal, seconds)
        found.tell()
        assert written(found) == ""


# On a terminal


@pytest.mark.parametrize(("column", "back"), [(20, 20), (90, 90), (110, 20)])
def test_a_bar_gives_way_before_pytest_writes(column: int, back: int) -> None:
    """A line of pytest's that is longer than the terminal is wide goes on below, and there the cursor was."""
    found = watched(True, 5, column=column)
    with progress.counting("random cases", 1000) as advance:
        advance(412)
        found.tell()
    assert written(found).startswith("\n")
    assert "test_fuzz.py::test_fuzz[gemm-@1of1@] 5 s" in written(found)
    assert "412 of 1,000 random cases" in written(found)
    found.pytest_runtest_logreport()
    assert written(found).endswith(f"\x1b[2K\x1b[1A\r\x1b[{back}C"), "the bar's line is erased and the cursor back"
    assert found.shown is None
    found.pytest_runtest_logfinish(TEST)
    before = written(found)
    found.tell()
    assert written(found) == before


def test_nothing_is_shown_while_somebody_debugs() -> None:
    found = watched(True, 5)
    found.pytest_enter_pdb()
    found.turn -= 1
    found.pytest_runtestloop()
    time.sleep(3 * watch._TICK)
    assert written(found) == ""
    found.pytest_leave_pdb()
    found.turn -= 1
    until = time.monotonic() + 30
    while not written(found) and time.monotonic() < until:
        time.sleep(watch._TICK)
    found.end.set()
    assert "test_fuzz.py::test_fuzz[gemm-@1of1@] " in written(found)


SLOW = """
import time
from mxharness.progress import counting

def test_fast():
    pass

def test_slow():
    print("captured")
    with counting("steps", 30) as advance:
        for _ in range(30):
            time.sleep(0.08)
            advance(1)
"""


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["here", "in a worker"])
def test_a_terminal_is_left_as_it_was(tmp_path: Path, workers: tuple[str, ...]) -> None:
    (tmp_path / "test_it.py").write_text(SLOW)
    (tmp_path / "conftest.py").write_text("from mxharness.plugin import watch\nwatch.SHOWN_AFTER = 1.0\n")
    ours, theirs = pty.openpty()
    start = (sys.executable, "-P", "-m", "pytest", "-c", "/dev/null", "--rootdir", tmp_path, "-p", "mxharness.plugin")
    options = ("--device", "host", "-p", "no:cacheprovider", *workers, tmp_path)
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of this run
    variables = {**own, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "90"}
    command = list(map(str, (*start, *options)))
    # In that folder, for the path that pytest writes to be short: a line that is nearly full it ends itself.
    with subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=theirs, env=variables) as process:
        os.close(theirs)
        text = b""
        try:
            while more := os.read(ours, 1 << 16):
                text += more
        except OSError:  # Linux: the other side has closed it
            pass
        os.close(ours)
    shown = text.decode()
    assert process.returncode == 0, shown
    assert "test_it.py::test_slow" in shown
    assert bool(re.search(r"[1-9]\d* of 30 steps", shown)) == (not workers)
    after = shown[shown.rindex("\x1b[2K") :]
    assert "of 30 steps" not in after
    assert "test_slow" not in after
    assert re.search(r"\x1b\[2K\x1b\[1A\r\x1b\[\d+C\.+ +\[100%\]", after), "pytest goes on in its own line"
    assert "captured" not in shown
    assert not re.search(r"\x1b\[[0-9;]*m", shown), "NO_COLOR"
    assert "2 passed" in after
