"""How messages count and enumerate."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_SHOWN = 3


def counted(number: int, noun: str) -> str:
    """As "1 check", "2,472 checks"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def named(names: Sequence[str]) -> str:
    """The first few names, and how many there are besides: "a, b, c and 4 more"."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def closest(name: str, known: Iterable[str]) -> tuple[str, ...]:
    """The few of `known` that read most like `name`, the most alike first; empty where none does."""
    return tuple(difflib.get_close_matches(name, list(known), n=_SHOWN, cutoff=0.5))
