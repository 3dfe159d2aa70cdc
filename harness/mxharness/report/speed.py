"""The section "Speed" of a report, and the same as a picture: times over rows beside the floor and the peers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mxharness import baseline
from mxharness.bench import result, table
from mxharness.bench.compare import Comparison, compare
from mxharness.bench.result import Bench, Row
from mxharness.errors import UserError
from mxharness.plot import Curve, curves_file, curves_svg
from mxharness.wording import counted

OWN, FLOOR = "mxharness", "floor"
_MOST_PANELS = 36


@dataclass(frozen=True)
class Group:
    """The rows of one operator."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sound: tuple[bool, ...]
    """Of each row."""


@dataclass(frozen=True)
class Section:
    """What the page shows of a bench."""

    bench: Bench
    verdict: str
    groups: tuple[Group, ...]
    svg: str
    """Empty where no operator was measured at more than one row count."""
    absent: Mapping[str, str]
    comparison: Comparison | None
    note: str
    """Whose times these are where they are not the run's, or why they are compared with none."""
    copied: str


def of_run(folder: Path, against: str) -> Section | None:
    """The section of the bench beside a run, held against that of baseline CLASS/NAME; None where neither is there.

    Without one beside the run it is the baseline's alone. Raises UserError for a damaged one.
    """
    own, older = result.beside(folder), _of_baseline(against)
    if own is None or older is None:
        found = own or older
        return section(found, note="" if own else f"of baseline {against}") if found else None
    try:
        return section(own, compare(older, own, against))
    except UserError as error:
        return section(own, note=str(error))


def _of_baseline(name: str) -> Bench | None:
    """None also where the baseline lies in no place that is known here."""
    device_class, _, plain = name.rpartition("/")
    try:
        return baseline.load(device_class, plain).speed if plain else None
    except UserError:
        return None


def section(bench: Bench, comparison: Comparison | None = None, note: str = "") -> Section:
    """What the page shows of a bench."""
    groups = []
    for op, rows in table.by_op(bench).items():
        names = table.columns(rows)
        cells = tuple(table.cells(row, names) for row in rows)
        groups.append(Group(f"{op}: {counted(len(rows), 'row')}", names, cells, tuple(row.sound for row in rows)))
    drawn = panels(bench)
    return Section(
        bench=bench,
        verdict=table.verdict(bench),
        groups=tuple(groups),
        svg=curves_svg(f"Speed on {bench.unit}", drawn, "rows", "us") if drawn else "",
        absent=table.absent(bench),
        comparison=comparison,
        note=note,
        copied=f"{bench.copy_bandwidth / 1e12:.3g} TB/s",
    )


def draw(bench: Bench, path: Path) -> None:
    """The panels as a .png or .svg file. Raises UserError for another suffix."""
    limited = f", {' '.join(bench.filters)}" if bench.filters else ""
    curves_file(path, f"{bench.unit}, {bench.started[:10]}{limited}", panels(bench), "rows", "us")


def panels(bench: Bench) -> dict[str, list[Curve]]:
    """By operator, shape and type: kernel, floor and peers over row counts; fp16, as fast as bf16, is left out."""
    found: dict[str, list[Row]] = {}
    for rows in table.by_op(bench).values():
        for row in rows:
            if row.rows and row.variant != "fp16":
                found.setdefault(f"{row.op} {row.shape} {row.variant}", []).append(row)
    several = {name: rows for name, rows in found.items() if len(rows) > 1}
    return {name: _curves(rows) for name, rows in list(several.items())[:_MOST_PANELS]}


def _curves(rows: Sequence[Row]) -> list[Curve]:
    peers = dict.fromkeys(name for row in rows for name in row.peers)
    reference = rows[0].reference
    return [
        Curve(FLOOR, [(row.rows, row.floor_us) for row in rows], "limit"),
        *(
            Curve(
                name,
                [(row.rows, row.peers[name].timing.us) for row in rows if name in row.peers],
                "reference" if name == reference else "other",
            )
            for name in peers
        ),
        Curve(OWN, [(row.rows, row.timing.us) for row in rows], "own"),
    ]
