"""How often the gate errs: its procedure on differences that were measured, drawn again and shifted.

The differences of mean NLL of a candidate's windows are centred, drawn with replacement and shifted by a true change of
perplexity that is then known; a verdict is right or wrong. Only perplexity is simulated: KL sees each of the planted
defects on its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mxharness.document import read_document
from mxharness.errors import UserError
from mxharness.gate.sequence import stages
from mxharness.gate.statistics import clustered
from mxharness.gate.verdict import Word, of_change

TOKENS = 255.0
"""Scored in a window."""
WINDOWS = 592
"""Of WikiText-2's test split."""


@dataclass(frozen=True)
class Rates:
    """Shares of verdicts for one true change."""

    change: float
    """True change of perplexity, relative."""
    once: Mapping[Word, float]
    """On the first stage's windows alone."""
    ended: Mapping[Word, float]
    """After doubling; what is inconclusive then does not pass."""
    windows: float
    """Read on average."""


def read(path: Path) -> dict[str, tuple[float, list[float]]]:
    """Of each candidate in a JSON file its margin, relative, and its windows' differences of mean NLL, nats.

    Raises UserError for a file that is missing, damaged or without them.
    """
    candidates = read_document(path, "file of differences").get("candidates", {})
    try:
        found = {
            str(name): (float(one["margin"]), [float(value) for value in one["differences"]])
            for name, one in candidates.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        found = {}
    if not found or not all(margin > 0 and np.isfinite([margin, *values]).all() for margin, values in found.values()):
        raise UserError(f"{path} is no file of differences: candidates, each with a margin and a list of differences")
    return found


def rates(
    differences: Sequence[float],
    changes: Sequence[float],
    margin: float,
    *,
    trials: int = 2000,
    windows: int = WINDOWS,
    seed: int = 0,
) -> list[Rates]:
    """Rates for each true change.

    differences (W,): candidate less reference, mean NLL of each window in nats. changes, margin: of perplexity,
    relative. Raises UserError for fewer than two differences.
    """
    pool = np.asarray(differences, dtype=np.float64)
    if len(pool) < 2:
        raise UserError(f"a simulation needs the differences of two windows or more, not of {len(pool)}")
    pool = pool - pool.mean()
    generator = np.random.default_rng(seed)
    draws = generator.choice(pool, size=(trials, windows))
    return [_rates(draws, change, margin) for change in changes]


def _rates(draws: np.ndarray[tuple[int, ...], np.dtype[np.float64]], change: float, margin: float) -> Rates:
    once: Counter[Word] = Counter()
    ended: Counter[Word] = Counter()
    read = 0
    for row in draws + math.log1p(change):
        first: Word | None = None
        word: Word = "inconclusive"
        for count in stages(len(row)):
            word = _verdict(row[:count], margin)
            first = first or word
            if word != "inconclusive":
                break
        once[first or word] += 1
        ended[word] += 1
        read += count
    trials = len(draws)
    return Rates(
        change,
        {word: number / trials for word, number in once.items()},
        {word: number / trials for word, number in ended.items()},
        read / trials,
    )


def _verdict(means: np.ndarray[tuple[int, ...], np.dtype[np.float64]], margin: float) -> Word:
    found = clustered(means * TOKENS, np.full(len(means), TOKENS))
    return of_change(found, margin, found.beyond(0.0), 1 - found.beyond(-math.log1p(margin)))[0]
