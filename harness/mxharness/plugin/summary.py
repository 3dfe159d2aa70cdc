"""What the terminal shows at a run's end: a line for each operator, what is wrong and how to repeat it, what moved."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mxharness import fuzz
from mxharness.baseline import key
from mxharness.bounds import LAMBDA, multiplied
from mxharness.record import is_right
from mxharness.report import checks
from mxharness.wording import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mxharness.changes import Change
    from mxharness.op import Outcome
    from mxharness.plugin.against import Against
    from mxharness.record import Failure, RunRecord

Wrong = tuple[str, str, tuple[str, ...]]
"""What it is, why it is wrong, and the commands that repeat it; an empty one is none."""
_MOST_WRONG = 10
_MOST_MOVED = 40
_INDENT = 4
_LONGEST = 300
"""Characters of a sentence about a failure; the whole stands in pytest's own lines and in the record."""
_NARROW = 70
"""Below so few columns what moved is told in lines, not in a table."""
_DISPENSABLE = ("random", "cases", "worst case", "seconds", "drift", "error/bound")
"""Columns that are left out of a terminal that has no room for them, one by one."""
_ENDLESS = 10_000


@dataclass(frozen=True)
class Look:
    """What a terminal can show, and how much is wanted."""

    width: int
    colour: bool
    brief: bool
    """-q: nothing about what is right."""


@dataclass(frozen=True)
class Row:
    """One operator's part of a run."""

    op: str
    cases: int
    right: int
    wrong: int
    known: int
    """Wrong, and in the ledger."""
    worst: Outcome | None
    """The check with the largest error / bound; None where nothing was judged by a bound."""
    random: str
    """How many random cases held; empty where none was drawn."""
    drift: str
    """As "same" or "2 drifted, 1 new"; empty where nothing was compared."""
    seconds: float


def rows(record: RunRecord, against: Against | None, seconds: Mapping[str, float]) -> list[Row]:
    """One an operator that was judged or drawn, sorted."""
    known = {str(row.get("check")) for row in record.known}
    judged: defaultdict[str, list[Outcome]] = defaultdict(list)
    for outcome in record.outcomes:
        judged[outcome.op].append(outcome)
    drawn = {row.op: row for row in record.fuzz}
    moved: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for change in against.moved if against else ():
        moved[change.op][change.status] += 1
    found = []
    for op in sorted(judged.keys() | drawn.keys()):
        outcomes = judged[op]
        bad = [one for one in outcomes if not is_right(one)]
        excused = sum(f"{one.case} {one.gate}" in known for one in bad)
        bounded = [one for one in outcomes if one.gate in fuzz.BOUNDED]
        held = ", ".join(f"{number} {status}" for status, number in moved[op].items()) or "same"
        found.append(
            Row(
                op=op,
                cases=len({one.case for one in outcomes}),
                right=len(outcomes) - len(bad),
                wrong=len(bad) - excused,
                known=excused,
                worst=min(bounded, key=checks.severity) if bounded else None,
                random=_drawn(drawn[op]) if op in drawn else "",
                drift=held if against and against.held and outcomes else "",
                seconds=seconds.get(op, 0.0),
            )
        )
    return found


def _drawn(row: fuzz.FuzzRow) -> str:
    return f"{row.examples:,}" + (f" ({row.rejected:,} rejected)" if row.rejected else "")


def sections(
    record: RunRecord, against: Against | None, seconds: Mapping[str, float], look: Look
) -> Iterator[tuple[str, str]]:
    """What stands below the verdict, as (title, text); the text is empty where there is nothing to say."""
    if not look.brief:
        console = _console(look)
        found = rows(record, against, seconds)
        if found:
            console.print(_operators(found, console))
        for line in (*_line(record), *_skips(record)):
            console.print(line)
        yield "what ran", _text(console)
    console = _console(look)
    bad = _print_wrong(console, record)
    yield "what is wrong", _text(console)
    if against and (against.update or not look.brief):
        console = _console(look)
        _print_moved(console, against, look.width, bad)
        yield against.title, _text(console)


def _console(look: Look) -> Console:
    from rich.console import Console

    return Console(
        file=io.StringIO(),
        width=max(look.width, 1),
        height=25,  # without it the width counts for nothing where TERM is "dumb"
        force_terminal=look.colour,
        no_color=not look.colour,
        color_system="standard" if look.colour else None,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )


def _text(console: Console) -> str:
    """What was printed, without the blanks that fill a table's last column."""
    file = console.file
    text = file.getvalue() if isinstance(file, io.StringIO) else ""
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _operators(found: Sequence[Row], console: Console) -> Table:
    """As many columns as there is room for; those that nobody needs are left out in any case."""
    from rich.measure import Measurement
    from rich.text import Text

    columns = {
        "operator": [Text(row.op, "bold") for row in found],
        "cases": [Text(f"{row.cases:,}" if row.cases else "-") for row in found],
        "right": [Text(f"{row.right:,}" if row.cases else "-", "green" if row.right else "") for row in found],
        "wrong": [Text(f"{row.wrong:,}", "bold red") if row.wrong else Text("-") for row in found],
        "known": [Text(f"{row.known:,}", "yellow") if row.known else Text("-") for row in found],
        "error/bound": [Text(checks.short(row.worst.ratio, 3) if row.worst else "-") for row in found],
        "worst case": [Text(row.worst.case.removeprefix(f"{row.op}-") if row.worst else "-") for row in found],
        "random": [Text(row.random or "-") for row in found],
        "drift": [Text(row.drift or "-", "yellow" if row.drift not in ("same", "") else "") for row in found],
        "seconds": [Text(f"{row.seconds:.1f}") for row in found],
    }
    idle = {name for name, cells in columns.items() if all(cell.plain == "-" for cell in cells)} - {"wrong"}
    left_out: list[str] = []
    for one in ("", *_DISPENSABLE):
        left_out.append(one)
        shown = [name for name in columns if name not in idle and name not in left_out]
        table = _table(shown, right="cases right wrong known seconds")
        for cells in zip(*(columns[name] for name in shown), strict=True):
            table.add_row(*cells)
        if Measurement.get(console, console.options.update(width=_ENDLESS), table).maximum <= console.width:
            break
    return table


def _table(columns: Iterable[str], right: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for place, name in enumerate(columns):
        justify: Literal["left", "right"] = "right" if name in right.split() else "left"
        table.add_column(name, overflow="fold", justify=justify, no_wrap=place == 0)
    return table


def _line(record: RunRecord) -> Iterator[str]:
    """How far the largest error of what is right is along its bound, and the probabilistic line (docs/judging.md)."""
    judged = [one for one in record.outcomes if one.passed and one.gate in fuzz.BOUNDED]
    if judged:
        closest = max(judged, key=lambda one: one.ratio)
        yield f"largest error {closest.ratio:.3g} of the bound ({closest.case})"
        worst = max(judged, key=lambda one: one.line)
        compared = sum(one.elements for one in record.outcomes)
        yield (
            f"largest error {worst.line:.3g} of the probabilistic line, lambda = {LAMBDA:g} ({worst.case}); past it: "
            f"{sum(one.drifted for one in judged) or 'none'}; as sure for all {compared:,} elements together: "
            f"lambda = {multiplied(compared):.3g}"
        )


def _skips(record: RunRecord) -> Iterator[str]:
    for skip in record.skipped:
        if not skip.asked:
            yield f"did not happen: {skip.why} ({skip.what}{f', {skip.count} cases' if skip.count > 1 else ''})"


def _print_wrong(console: Console, record: RunRecord) -> frozenset[str]:
    """The smallest failing check of each operator, other tests, faults, more checks; each with what repeats it.

    The keys of all failing checks, as a baseline has them.
    """
    from rich.padding import Padding

    known = {str(row.get("check")) for row in record.known}
    bad = {key(one.case, one.gate): one for one in record.outcomes if not is_right(one)}
    first = [name for one in checks.smallest(record) if (name := key(one.case, one.gate)) not in known]
    found = [_check(bad[name]) for name in first]
    found += [_test(one) for one in record.tests.failures]
    for row in record.faults or ():
        if not row.get("caught"):
            name = str(row.get("name", "?"))
            told = str(row.get("message") or row.get("symptom") or "no check saw it")
            found.append((f"planted fault {name}", f"not caught: {told}", (str(row.get("command", "")),)))
    found += [_check(one) for name, one in bad.items() if name not in known and name not in first]
    for what, why, again in found[:_MOST_WRONG]:
        console.print(what, style="bold red", soft_wrap=True)
        console.print(Padding(why if len(why) <= _LONGEST else f"{why[:_LONGEST]} ...", (0, 0, 0, _INDENT)))
        for command in filter(None, again):  # unbroken, to be copied
            console.print(f"{'':{_INDENT}}{command}", soft_wrap=True)
    if len(found) > _MOST_WRONG:
        console.print(f"and {len(found) - _MOST_WRONG:,} more")
    return frozenset(bad)


def _check(outcome: Outcome) -> Wrong:
    """A failing check, its worst element, and the saved failure's command."""
    said = checks.message(outcome.message)
    what = said.what.partition(": ")[2] if said.what.startswith(f"{outcome.op} ") else said.what
    return key(outcome.case, outcome.gate), _why(what, said.worst), (said.replay or checks.repeat(outcome),)


def _test(failure: Failure) -> Wrong:
    """A failing test; of a random one the saved failure, too."""
    line = _first_line(failure.message)
    said = checks.message(line)
    why = _why(said.what, said.worst) if said.replay else line
    return failure.id, why, (said.replay, failure.command)


def _why(what: str, worst: str) -> str:
    return f"{what}; worst {worst}" if worst else what


def _first_line(text: str) -> str:
    """The first line that says something."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")


def _print_moved(console: Console, against: Against, width: int, told: Container[str]) -> None:
    """What is not as in the baseline, or what was blessed, and what to do now. told: checks that stand above."""
    moved = [change for change in against.moved if change.key not in told]
    if moved and width >= _NARROW:
        table = _table(("status", "check", "what"), right="")
        for change in moved[:_MOST_MOVED]:
            table.add_row(change.status, change.key, _clause(change))
        console.print(table)
    else:  # no room for columns
        for change in moved[:_MOST_MOVED]:
            console.print(f"{change.status} {change.key} {_clause(change)}".strip())
    if len(moved) > _MOST_MOVED:
        console.print(f"and {counted(len(moved) - _MOST_MOVED, 'other')}")
    if against.advice and (moved or against.update):
        console.print(against.advice, soft_wrap=True)


def _clause(change: Change) -> str:
    """What moved, without what follows from it."""
    return next(iter(checks.clauses(change.message)), "")
