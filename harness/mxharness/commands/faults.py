"""`mxharness faults` and `mxharness mutants`: whether the harness would have noticed."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mxharness.commands import common
from mxharness.errors import UserError

if TYPE_CHECKING:
    from mxharness.faults import Matrix
    from mxharness.faults.mutation import MutantResult

ENOUGH = 0.95
"""Share of the mutants that can be seen at all which must be."""
_out = click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the results to this file.")
_workers = click.option(
    "-n",
    "workers",
    type=click.IntRange(min=1),
    default=lambda: len(os.sched_getaffinity(0)),
    show_default="all cores",
    help="Processes.",
)


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@common.device_option
@click.option("--list", "listed", is_flag=True, help="List the faults with what they did to people; run none.")
@click.option("--matrix", is_flag=True, help="Try every detector on every fault, not only until one sees it.")
@click.option("--source", metavar="FILE", help="Judge one change of this file of kernels/ instead.")
@click.option(
    "--replace", nargs=2, metavar="OLD NEW", help="With --source: the text OLD, which occurs once, becomes NEW."
)
@click.option("--op", "op_name", default="", metavar="NAME", help="With --source: run this operator only.")
@_out
@_workers
@common.json_option
def faults(
    names: tuple[str, ...],
    device: str,
    listed: bool,
    matrix: bool,
    source: str | None,
    replace: tuple[str, str] | None,
    op_name: str,
    out: Path | None,
    workers: int,
    as_json: bool,
) -> int:
    """Plant known bugs and report which were caught.

    All of them, or those NAMEd; exits 1 unless every one was caught. With --source and --replace one change of a
    kernel is judged: exits 0 when some check sees it, 1 when none does.
    """
    if listed:
        if source or replace or op_name or matrix or out:
            raise UserError("--list goes with names of faults and --json only")
        return _listed(names, as_json=as_json)
    if (source is None) != (replace is None) or (op_name and source is None):
        raise UserError("--source FILE and --replace OLD NEW belong together, and --op is for them")
    if source is not None and replace is not None:
        if names or matrix or out:
            raise UserError("--source judges one change: leave out names of faults, --matrix and --out")
        return _one_change(source, *replace, device, op_name, as_json=as_json)
    if matrix:
        return _matrix(names, device, out, workers, as_json=as_json)
    if out:
        raise UserError("--out is for --matrix")
    return _catalogue(names, device, as_json=as_json)


def _listed(names: tuple[str, ...], *, as_json: bool) -> int:
    from mxharness.faults import select

    rows = [(fault.name, fault.op, fault.symptom, fault.seen_in) for fault in select(names or None)]
    columns = ("name", "op", "symptom", "seen_in")
    if as_json:
        common.print_json({"faults": [dict(zip(columns, row, strict=True)) for row in rows]})
    else:
        common.print_table("Planted faults", ("name", "operator", "symptom", "seen in"), rows)
    return common.PASS


def _catalogue(names: tuple[str, ...], device: str, *, as_json: bool) -> int:
    from mxharness.faults import run_faults

    started = time.monotonic()
    results = run_faults(device, names or None)
    seconds = time.monotonic() - started
    caught = sum(result.caught for result in results)
    if as_json:
        rows = [dataclasses.asdict(result) for result in results]
        score = caught / len(results) if results else 0.0
        common.print_json({"faults": rows, "score": score, "seconds": seconds})
    else:
        common.print_table(
            "Planted faults",
            ("name", "caught", "by", "on", "seconds", "symptom"),
            [
                (row.name, "yes" if row.caught else "NO", row.detector, row.device, f"{row.seconds:.1f}", row.symptom)
                for row in results
            ],
        )
        word = "PASS" if caught == len(results) > 0 else "FAIL"
        click.echo(f"{word}: {caught} of {len(results)} planted faults caught, in {seconds:.0f} s")
    return common.PASS if caught == len(results) > 0 else common.MISMATCH


def _matrix(names: tuple[str, ...], device: str, out: Path | None, workers: int, *, as_json: bool) -> int:
    from mxharness import faults as planted
    from mxharness.device import open_device

    started = time.monotonic()
    rows = planted.matrix(device, names or None, workers)
    seconds = time.monotonic() - started
    if out:
        out.write_text(planted.matrix_text(rows, open_device(device).device_class))
    missed = [name for name, seen in rows.items() if not seen]
    if as_json:
        common.print_json({"faults": rows, "alone": planted.alone(rows), "seconds": seconds})
    else:
        _print_matrix(rows)
        word = "FAIL" if missed else "PASS"
        click.echo(f"{word}: {len(rows) - len(missed)} of {len(rows)} planted faults caught, in {seconds:.0f} s")
    return common.MISMATCH if missed else common.PASS


def _print_matrix(rows: Matrix) -> None:
    from mxharness.faults import alone
    from mxharness.faults.detectors import DETECTORS

    seen = [name for name in DETECTORS if any(name in found for found in rows.values())]
    common.print_table(
        "Which detector sees which fault",
        ("name", *seen),
        [(name, *("x" if detector in found else "" for detector in seen)) for name, found in rows.items()],
    )
    for detector, only in alone(rows).items():
        count = sum(detector in found for found in rows.values())
        click.echo(f"{detector:16} sees {count:3}, alone {len(only):3}{': ' if only else ''}{', '.join(only[:4])}")


def _one_change(source: str, old: str, new: str, device: str, op_name: str, *, as_json: bool) -> int:
    from mxharness.device import open_device
    from mxharness.faults.mutation import try_change

    tried = try_change(source, old, new, open_device(device).name, op_name)
    if tried.verdict == "does not compile":
        raise UserError(tried.message)
    if as_json:
        common.print_json(dataclasses.asdict(tried))
    elif tried.verdict == "killed":
        click.echo(f"CAUGHT by {tried.detector}, in {tried.seconds:.0f} s: {tried.message}")
    else:
        same = " (the compiled code is the same)" if tried.verdict == "equivalent" else ""
        click.echo(f"SURVIVED every check, in {tried.seconds:.0f} s{same}")
    return common.PASS if tried.verdict == "killed" else common.MISMATCH


@click.command()
@click.option("--seed", type=int, default=0, show_default=True, help="Which ones are taken with --sample.")
@click.option(
    "--sample", "count", type=click.IntRange(min=1), help="How many, from all files and kinds.  [default: all]"
)
@click.option("--file", metavar="FILE", help="Only this file of kernels/.")
@common.device_option
@_out
@_workers
@common.json_option
def mutants(
    seed: int, count: int | None, file: str | None, device: str, out: Path | None, workers: int, as_json: bool
) -> int:
    """Edit kernels at every place where a pen can slip and report which edits the checks see.

    Exits 1 when fewer than 95 % of those that can be seen are. With --out FILE every result is written as it is there,
    and a run that was interrupted goes on.
    """
    from mxharness.device import open_device
    from mxharness.device.source import shipped
    from mxharness.faults.mutants import generate, sample
    from mxharness.faults.mutation import run_mutants, score

    started = time.monotonic()
    name = open_device(device).name
    chosen = generate(shipped(), name, file)
    if count is not None:
        chosen = sample(chosen, count, seed)
    results = run_mutants(chosen, name, workers, out)
    seconds = time.monotonic() - started
    share = score(results)
    if as_json:
        rows = [result.row() for result in results]
        common.print_json({"mutants": rows, "score": share, "seed": seed, "seconds": seconds})
    else:
        _print_mutants(results)
        killed = sum(result.tried.verdict == "killed" for result in results)
        survived = sum(result.tried.verdict == "survived" for result in results)
        word = "PASS" if share >= ENOUGH else "FAIL"
        click.echo(f"{word}: {killed} of {killed + survived} mutants killed ({share:.1%}), in {seconds:.0f} s")
    return common.PASS if share >= ENOUGH else common.MISMATCH


def _print_mutants(results: list[MutantResult]) -> None:
    from mxharness.faults.mutation import VERDICTS, score

    files = dict.fromkeys(result.mutant.file for result in results)
    groups = {file: [result for result in results if result.mutant.file == file] for file in files}
    common.print_table(
        "Mutants",
        ("file", *VERDICTS, "score"),
        [
            (file, *(sum(row.tried.verdict == verdict for row in group) for verdict in VERDICTS), f"{score(group):.1%}")
            for file, group in groups.items()
        ],
    )
    detectors = Counter(row.tried.detector for row in results if row.tried.verdict == "killed")
    common.print_table("Killed first by", ("detector", "mutants"), detectors.most_common())
    for row in results:
        if row.tried.verdict == "survived":
            where = f"{row.mutant.file}:{row.line} {row.mutant.operator}"
            click.echo(f"survived  {where}\n    {row.before}\n    {row.after}")
