"""Which test is running while it takes long: a bar on a terminal, elsewhere a line now and then; nothing in a worker.

A thread looks at the clock, because the test has the process, or runs in another one. It writes to the terminal itself,
whatever pytest captures, and gives way before pytest writes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from threading import Event, RLock, Thread
from typing import TYPE_CHECKING, TextIO

import pytest

from mxharness import manifest, progress

if TYPE_CHECKING:
    from rich.progress import Progress

SHOWN_AFTER, LINE_EVERY = 2.0, 20.0
"""Seconds that a test runs before a bar is shown, and between two lines where there is no terminal."""
_TICK, _GIVE_WAY = 0.2, 0.5
"""Seconds between two looks, and without a look after pytest may have written."""
_MOST = 4
"""Tests in the bar at once."""


@dataclass(eq=False)  # pytest keeps its plugins in a set
class Watch:
    """The tests under way; registered with pytest, it hears when each begins and ends, in workers, too."""

    config: pytest.Config
    stream: TextIO
    """The terminal, or what takes its place."""
    terminal: bool
    running: dict[str, float] = field(default_factory=dict)
    """By node id, when it began, in seconds of the monotonic clock."""
    told: float = 0.0
    """When the last line was written."""
    turn: float = 0.0
    """When pytest last had its turn to write."""
    paused: bool = False
    shown: Progress | None = None
    column: int = 0
    """Where the cursor was when the bar began; 0: in a line of its own."""
    left: int = 0
    """Where pytest believes it to be while it is below a line that was written here; else 0."""
    lock: RLock = field(default_factory=RLock)
    end: Event = field(default_factory=Event)

    def pytest_runtestloop(self) -> None:
        """Begin to look."""
        Thread(target=self._look, name="mxharness-watch", daemon=True).start()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        with self.lock:
            self._give_way()
            self.running[nodeid] = time.monotonic()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self) -> None:
        """Pytest is about to write."""
        self._give_way()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """A test has ended."""
        with self.lock:
            self._give_way()
            self.running.pop(nodeid, None)

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_testnodedown(self) -> None:
        """A worker has ended, maybe in the middle of a test."""
        self._give_way()

    def pytest_enter_pdb(self) -> None:
        """Somebody types."""
        with self.lock:
            self.paused = True
            self._give_way()

    def pytest_leave_pdb(self) -> None:
        """The test goes on."""
        self.paused = False

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self) -> Generator[None]:
        """All tests have ended, or nobody wants them any more."""
        with self.lock:
            self.end.set()
            self._give_way()
        yield
        self.stream.close()

    def _look(self) -> None:
        while not self.end.wait(_TICK):
            with self.lock:
                if not (self.end.is_set() or self.paused) and time.monotonic() - self.turn > _GIVE_WAY:
                    self.tell()

    def tell(self) -> None:
        """Show what has been running for long, if anything has."""
        now = time.monotonic()
        wait = SHOWN_AFTER if self.terminal else LINE_EVERY
        long = [(one, now - began) for one, began in self.running.items() if now - began >= wait]
        if not long:
            return
        if self.terminal:
            self._draw(long)
        elif now - self.told >= LINE_EVERY:
            self.told = now
            self._say(long)

    def _draw(self, long: list[tuple[str, float]]) -> None:
        if self.shown is None:
            writer = self.config.get_terminal_writer()
            begun, width = writer.width_of_current_line, writer.fullwidth
            self.column = (begun - 1) % width + 1 if begun else 0  # a long path goes on in the terminal's next line
            self.stream.write("\n" if begun else "")
            self.shown = _bar(self.stream, writer.hasmarkup)
            self.shown.start()
        for task in self.shown.task_ids:
            self.shown.remove_task(task)
        work = self._work()
        for node_id, seconds in long[:_MOST]:
            what = f"{manifest.label(node_id)} {seconds:.0f} s"
            count = f"{work}" if work else ""
            total, done = (work.total, work.done) if work else (None, 0)
            self.shown.add_task(what, total=total, completed=done, count=count, visible=True)
        self.shown.refresh()

    def _say(self, long: list[tuple[str, float]]) -> None:
        """Lines of their own; then what pytest had begun its line with, so that it can go on."""
        column = self.config.get_terminal_writer().width_of_current_line
        self.stream.write("\n" if column and column != self.left else "")
        self.left = column
        work = self._work()
        for node_id, seconds in long:
            count = f", {work}" if work else ""
            self.stream.write(f"mxharness: {manifest.label(node_id)} has been running for {seconds:.0f} s{count}\n")
        verbosity = self.config.get_verbosity()
        if column and not self._spread and verbosity >= 0:
            self.left = 0
            self.stream.write(long[0][0] + " " if verbosity else long[0][0].partition("::")[0] + " ")
        self.stream.flush()

    @property
    def _spread(self) -> bool:
        """Whether other processes run the tests."""
        return bool(self.config.getoption("numprocesses", None) or self.config.getoption("tx", None))

    def _work(self) -> progress.Work | None:
        """How far the one test of this process is."""
        return None if self._spread else progress.innermost()

    def _give_way(self) -> None:
        """Leave the cursor where pytest believes it to be, and be quiet for a moment."""
        with self.lock:
            if self.shown is not None:
                self.shown.stop()
                self.shown = None
                if self.column:
                    self.stream.write(f"\x1b[1A\r\x1b[{self.column}C")
                self.stream.flush()
            self.turn = time.monotonic()


def _bar(stream: TextIO, colour: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    console = Console(file=stream, force_terminal=True, no_color=not colour, legacy_windows=False, markup=False)
    what = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    columns = (what, BarColumn(bar_width=20), TextColumn("{task.fields[count]}", markup=False))
    return Progress(*columns, console=console, transient=True, auto_refresh=False, redirect_stdout=False,
                    redirect_stderr=False)  # fmt: skip


def of(config: pytest.Config) -> Watch | None:
    """A watch on this run; None where pytest writes nothing, or not to a terminal or a file. Not for workers."""
    if not config.pluginmanager.hasplugin("terminalreporter"):
        return None
    try:
        handle = os.dup(sys.stdout.fileno())
    except (OSError, ValueError):  # standard output is no file: pytest runs within another program
        return None
    stream = os.fdopen(handle, "w", encoding=sys.stdout.encoding, errors="replace")
    direct = config.getoption("capture", None) == "no"  # a test's own output would tear a bar apart
    return Watch(config, stream, terminal=sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not direct)
