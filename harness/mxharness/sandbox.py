"""A process of its own for work that may crash, hang or lose the GPU's context: the caller gets a named result.

The child is started at the first call and kept; one that died or gave no answer is killed, and the next call starts
another. It is a plain `python -m mxharness.sandbox`, so nothing of the caller's main module is imported again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, TypeVar

from mxharness.errors import KernelFailure

Result = TypeVar("Result")
Task = TypeVar("Task")

LIMIT = 600.0
"""Seconds that a call may take unless the sandbox says otherwise."""


class Lost(KernelFailure):
    """The child died or gave no answer; the message says which, as "killed by SIGSEGV"."""

    def __init__(self, message: str, *, hung: bool = False) -> None:
        super().__init__(message)
        self.hung = hung
        """Whether it gave no answer in time."""


class Sandbox:
    """Runs functions in a child process, one at a time. Functions and arguments must be picklable."""

    def __init__(self, limit: float = LIMIT, *, cores: frozenset[int] | None = None) -> None:
        """limit: seconds for one call. cores: the CPU cores the child may use, None for the caller's own."""
        self.limit = limit
        self._cores = cores
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._end: weakref.finalize[Any, Any] | None = None
        """Also called when the sandbox is forgotten or this process ends."""

    def __enter__(self) -> Sandbox:
        """Nothing is started yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the child."""
        self.close()

    def call(self, function: Callable[..., Result], *arguments: object) -> Result:
        """What `function(*arguments)` returns in the child; raises what it raised, or Lost."""
        connection = self._start()
        try:
            connection.send_bytes(pickle.dumps((function, arguments)))
            if not connection.poll(self.limit):
                self.close()
                raise Lost(f"no answer within {self.limit:g} s", hung=True)
            worked, result = pickle.loads(connection.recv_bytes())  # noqa: S301  from our own child
        except (EOFError, OSError) as error:  # the child's end of the pipe has closed
            raise Lost(self._death()) from error
        if not worked:
            raise result
        value: Result = result
        return value

    def close(self) -> None:
        """Kill the child; the next call starts another. Idempotent."""
        if self._end is not None:
            self._end()
        self._process = self._connection = self._end = None

    def _start(self) -> Connection[Any, Any]:
        if self._connection is not None:
            return self._connection
        ours, theirs = multiprocessing.Pipe()
        cores = ",".join(map(str, sorted(self._cores or ())))
        command = [sys.executable, "-m", "mxharness.sandbox", str(theirs.fileno()), cores]
        self._process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)
        theirs.close()
        self._connection = ours
        self._end = weakref.finalize(self, _kill, self._process, ours)
        return ours

    def _death(self) -> str:
        """How the child ended, in words; the next call starts another."""
        process = self._process
        if process is None:
            return "the process was closed"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)  # a child that dumps core takes a moment
        code = process.returncode
        self.close()
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"the process ended with exit code {code}"


def _kill(process: subprocess.Popen[bytes], connection: Connection[Any, Any]) -> None:
    process.kill()
    process.wait()
    connection.close()


def spread(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    processes: int,
    limit: float = LIMIT,
    spent: Callable[[Result], bool] = lambda _: False,
) -> Iterator[tuple[Task, Result | Lost]]:
    """`function` of every task, over child processes that share the cores; in the order in which they are done.

    A task that took its process with it gives the Lost that says how, and the others go on. `spent` says of a result
    that its process must not be used again.
    """
    cores = sorted(os.sched_getaffinity(0))
    processes = max(1, min(processes, len(tasks)))
    shares = [frozenset(cores[i % len(cores) :: processes]) for i in range(processes)]
    free: queue.SimpleQueue[Sandbox] = queue.SimpleQueue()
    boxes = [Sandbox(limit, cores=share) for share in shares]
    for box in boxes:
        free.put(box)

    def one(task: Task) -> tuple[Task, Result | Lost]:
        box = free.get()
        try:
            result: Result | Lost = box.call(function, task)
            if spent(result):  # type: ignore[arg-type]  # what a call returns is no Lost
                box.close()
        except Lost as lost:
            result = lost
        finally:
            free.put(box)
        return task, result

    pool = ThreadPoolExecutor(processes)
    try:
        for done in as_completed([pool.submit(one, task) for task in tasks]):
            yield done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for box in boxes:
            box.close()


def _serve(connection: Connection[Any, Any]) -> None:
    """The child: answer calls until the caller is gone."""
    while True:
        try:
            function, arguments = pickle.loads(connection.recv_bytes())  # noqa: S301  from the parent process
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, function(*arguments)))
        except BaseException as error:
            answer = _failure(error)
        connection.send_bytes(answer)


def _failure(error: BaseException) -> bytes:
    """The error for the caller; one that cannot be pickled there and back is told in words."""
    try:
        answer = pickle.dumps((False, error))
        pickle.loads(answer)  # noqa: S301  our own bytes
    except Exception:
        return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
    return answer


if __name__ == "__main__":
    if sys.argv[2]:
        os.sched_setaffinity(0, map(int, sys.argv[2].split(",")))
    _serve(Connection(int(sys.argv[1])))
