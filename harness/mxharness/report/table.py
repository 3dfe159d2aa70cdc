"""A long table as data in the page: columns of values that reports/report.js shows, sorts and filters.

20,000 rows of HTML take a browser seconds; as data they take a few dozen milliseconds, and only what is looked at
becomes rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mxharness.document import json_ready

Kind = Literal["mark", "text", "name", "number", "bits", "message"]
"""mark: a verdict, with a sign beside its colour; text: few different values; name: the row's own; bits: monospaced;
message: sentences."""

_DIGITS = 4
_MOST_ROWS = 500


@dataclass(frozen=True)
class Column:
    """One column, top to bottom."""

    title: str
    kind: Kind
    values: Sequence[object]
    chosen: bool = False
    """Whether the reader may pick one of its values from a list."""


@dataclass(frozen=True)
class Detail:
    """What a row shows when it is opened."""

    lines: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows, and what belongs to them."""

    noun: str
    """What the rows are, as "checks"."""
    columns: tuple[Column, ...]
    anchors: Sequence[str]
    """One a row: what stands behind # in a link to it."""
    bad: Sequence[bool]
    """Which rows are shown by "failed only", and first."""
    details: Mapping[int, Detail]
    """By row; a row that has none shows how to repeat it."""
    page: int = 50
    """Rows that are shown at once; the rest follow on request."""
    badly: str = "failed"
    """The word for them."""
    repeat: str = ""
    """The command that repeats a row: {0} and {1} stand for the first two values of `repeated`."""
    repeated: tuple[int, ...] = ()
    """Columns that fill `repeat`: operator, case, gate."""

    @property
    def shown_without_script(self) -> list[int]:
        """The bad rows, as many as a browser lays out at once."""
        return [row for row, bad in enumerate(self.bad) if bad][:_MOST_ROWS]


def payload(table: Table) -> str:
    """The table as JSON that may stand in a <script>: nothing in it ends the element."""
    document = {
        "noun": table.noun,
        "badly": table.badly,
        "page": table.page,
        "columns": [_column(column) for column in table.columns],
        "anchors": list(table.anchors),
        "bad": [row for row, bad in enumerate(table.bad) if bad],
        "details": {row: [list(detail.lines), list(detail.commands)] for row, detail in table.details.items()},
        "repeat": table.repeat,
        "repeated": list(table.repeated),
    }
    text = json.dumps(json_ready(document), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _column(column: Column) -> dict[str, object]:
    head: dict[str, object] = {"title": column.title, "kind": column.kind, "chosen": column.chosen}
    if column.kind in {"mark", "text"}:
        words = list(dict.fromkeys(map(str, column.values)))
        places = {word: place for place, word in enumerate(words)}
        return {**head, "words": words, "values": [places[str(value)] for value in column.values]}
    if column.kind == "number":
        return {**head, "values": [_rounded(value) for value in column.values]}
    return {**head, "values": [str(value) for value in column.values]}


def _rounded(value: object) -> object:
    """A float with as many digits as are shown; the whole number is in run.json."""
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value
