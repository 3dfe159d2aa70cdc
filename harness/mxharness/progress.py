"""How far long work is, for whoever watches: the pytest plugin does (plugin/watch.py). Nothing is printed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Work:
    """Something that takes a while in this process."""

    noun: str
    """What is counted, as "random cases"."""
    total: int
    done: int = 0

    def advance(self, number: int = 1) -> None:
        """So many more are done."""
        self.done += number

    def __str__(self) -> str:
        return f"{self.done:,} of {self.total:,} {self.noun}"


_under_way: list[Work] = []


@contextmanager
def counting(noun: str, total: int) -> Iterator[Callable[[int], None]]:
    """Count what is done of `total`, with the function that it gives; the number is asked for with `innermost`."""
    work = Work(noun, total)
    _under_way.append(work)
    try:
        yield work.advance
    finally:
        _under_way.remove(work)


def innermost() -> Work | None:
    """What is being counted in this process, the part of a part where there are several; None where nothing is."""
    return next(reversed(tuple(_under_way)), None)
