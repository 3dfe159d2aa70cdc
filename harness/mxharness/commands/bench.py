"""`mxharness bench`: the speed of every kernel, with floor, peers, error, repeatability and batch invariance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mxharness.commands import common
from mxharness.errors import UserError

if TYPE_CHECKING:
    from mxharness.bench.compare import Comparison
    from mxharness.bench.result import Bench, Row


@click.command()
@click.option("--op", "ops", multiple=True, metavar="OP", help="Only this operator; repeat for more.")
@click.option("--shape", "shapes", multiple=True, metavar="NxK", help="Only this shape, as 4096x4096; repeat for more.")
@click.option("--rows", type=click.IntRange(min=1), multiple=True, metavar="M", help="Only so many rows; repeat.")
@click.option("--quick", is_flag=True, help="A few rows that stand for the others.")
@common.device_option
@click.option(
    "--save", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the record, as JSON."
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw times, floors and peers over rows, as .png or .svg.",
)
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Take this record instead of measuring now.",
)
@click.option(
    "--compare",
    "against",
    metavar="FILE|CLASS|CLASS/NAME",
    help="Exit 1 where a row is slower than in that record, the committed one of a class, or that of a baseline.",
)
@click.option(
    "--despite",
    type=click.Choice(["unit", "driver"]),
    multiple=True,
    help="Compare with a record of another GPU or processor (unit), or of another driver.",
)
@common.json_option
def bench(
    *,
    ops: tuple[str, ...],
    shapes: tuple[str, ...],
    rows: tuple[int, ...],
    quick: bool,
    device: str,
    save: Path | None,
    plot: Path | None,
    source: Path | None,
    against: str | None,
    despite: tuple[str, ...],
    as_json: bool,
) -> int:
    """Measure how fast every kernel is.

    On a GPU: CUDA graphs over copies that leave the L2 cache cold. On the host device: quantise and dequantise against
    ggml, gguf-py and torchao, and the products' rate, on one and two threads. Every row has its floor, its peers, its
    error, whether its bits repeat and whether they depend on the batch. Exits 1 where bits do, and where --compare
    finds a row slower than the spread explains.
    """
    from mxharness.bench import compare as comparing
    from mxharness.bench import result

    if plot and plot.suffix not in {".png", ".svg"}:
        raise UserError(f"a plot is a .png or .svg file, not '{plot}'")
    if source and (ops or shapes or rows or quick):
        raise UserError("--from takes a record as it is; leave out --op, --shape, --rows and --quick")
    before = _older(against) if against else None
    found = result.load(source) if source else _measured(ops, shapes, rows, quick, device, as_json)
    comparison = comparing.compare(before, found, str(against), despite) if before else None
    if save:
        result.save(found, save)
    if plot:
        from mxharness.report.speed import draw

        draw(found, plot)
    passed = found.sound and (comparison is None or comparison.passed)
    if as_json:
        _print_json(found, comparison, passed)
    else:
        _print(found, comparison)
    return common.PASS if passed else common.MISMATCH


def _older(name: str) -> Bench:
    """The record in a file, the committed one of a device class, or that of a baseline CLASS/NAME."""
    from mxharness import baseline
    from mxharness.bench import result

    device_class, slash, plain = name.rpartition("/")
    if not slash or Path(name).is_file() or name.endswith(".json"):
        return result.load(result.found(name))
    found = baseline.load(device_class, plain).speed
    if found is None:
        raise UserError(f"baseline {name} has no speed; `mxharness baseline create --speed FILE` makes one with it")
    return found


def _measured(
    ops: tuple[str, ...], shapes: tuple[str, ...], rows: tuple[int, ...], quick: bool, device: str, quiet: bool
) -> Bench:
    from tqdm import tqdm

    from mxharness.bench import entries, host, measure
    from mxharness.device import open_device

    opened = open_device(device)
    of_host = opened.torch_device.type == "cpu"
    chosen = entries.select(ops, shapes, rows, quick=quick, entries=host.ENTRIES if of_host else entries.ENTRIES)
    named = [("--op", ops), ("--shape", shapes), ("--rows", map(str, rows))]
    filters = (*(f"{option} {one}" for option, values in named for one in values), *(["--quick"] if quick else []))
    with tqdm(total=len(chosen), desc="bench", unit=" rows", disable=None if not quiet else True) as bar:

        def progress(row: Row) -> None:
            bar.set_postfix_str(row.key, refresh=False)
            bar.update()

        if of_host:
            return host.bench(opened, chosen, filters=filters, progress=progress)
        return measure.bench(opened, chosen, filters=filters, progress=progress)


def _print_json(found: Bench, comparison: Comparison | None, passed: bool) -> None:
    import dataclasses
    import json

    from mxharness.bench import result

    document = {"passed": passed, "bench": json.loads(result.text(found))}
    if comparison:
        moved = [dataclasses.asdict(row) for row in comparison.rows if row.status != "same"]
        document["comparison"] = {"verdict": comparison.first_line, "rows": moved, "differs": comparison.differs}
    common.print_json(document)


def _print(found: Bench, comparison: Comparison | None) -> None:
    from mxharness.bench.table import absent, by_op, cells, columns, verdict

    for op, rows in by_op(found).items():
        names = columns(rows)
        common.print_table(op, names, [cells(row, names) for row in rows])
    click.echo(
        f"{found.unit}, driver {found.driver}: {found.ceilings.source}; torch copied "
        f"{found.copy_bandwidth / 1e9:,.0f} GB/s in this run ({len(found.rows)} rows, {found.seconds:.0f} s)"
    )
    for name, why in absent(found).items():
        click.echo(f"not measured: {name}: {why}")
    if comparison:
        for what, old, new in comparison.differs:
            click.echo(f"another {what}: {old}, now {new}")
        moved = [(row.status, row.key, row.message) for row in comparison.rows if row.status != "same"]
        if moved:
            common.print_table(f"Moved from {comparison.before}", ("status", "row", "what"), moved)
        click.echo(comparison.first_line)
    click.echo(verdict(found))
