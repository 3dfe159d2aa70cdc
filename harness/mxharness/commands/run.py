"""`mxharness run`: the main job."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mxharness.commands import common
from mxharness.commands.running import (
    FUZZ,
    HOST_WINDOWS,
    RECORD,
    NothingSelectedError,
    Request,
    execute,
    require_baseline,
    require_device,
    write_report,
)
from mxharness.errors import UserError
from mxharness.protocols import DEFAULT_WINDOWS

if TYPE_CHECKING:
    from mxharness.drift import Comparison
    from mxharness.fuzz import FuzzRow
    from mxharness.record import RunRecord


def _workers(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """What pytest-xdist takes for -n."""
    if value and value != "auto" and not value.isdecimal():
        raise click.BadParameter(f"'{value}' is neither a whole number nor 'auto'")
    return value


def _seed(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """A number, or that any will do."""
    if value and value != "random" and not value.isdecimal():
        raise click.BadParameter(f"'{value}' is neither a whole number nor 'random'")
    return value


@click.command()
@common.device_option
@click.option("--op", "ops", metavar="NAME", multiple=True, help="Only this operator, or all of FILE.cu; repeatable.")
@click.option("--out", **common.out_settings, help=f"Where {common.FILES} go.")
@click.option("--quick", is_flag=True, help="Fewer cases and shorter fuzzing; the verdict says so.")
@click.option("-k", "expression", default="", metavar="EXPR", help="Only checks that match, as in pytest -k.")
@click.option(
    "-n", "workers", default="", metavar="N|auto", callback=_workers, help="Worker processes.  [default: all cores]"
)
@click.option(
    "--fuzz",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Random cases of every operator.  [default: {FUZZ}, with --quick 10]",
)
@click.option(
    "--fuzz-seed",
    default="",
    metavar="SEED",
    callback=_seed,
    help="Seed of the random cases, a number or 'random'.  [default: 0]",
)
@click.option("--shard", default="", metavar="I/N", help="Only part I of N; `mxharness merge` puts the parts together.")
@click.option("--require-device", "required", metavar="CLASS", help="Refuse to run on another device class, as sm_90.")
@click.option(
    "--known-failures",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Failures that are known, each with a reason and an end.  [default: baselines/known_failures.toml]",
)
@common.model_option
@click.option("--no-perplexity", is_flag=True, help="Leave the model out.")
@click.option(
    "--perplexity-windows",
    "windows",
    type=click.IntRange(min=1),
    help=f"How many windows of text the model reads.  [default: host {HOST_WINDOWS}, GPU {DEFAULT_WINDOWS}]",
)
@click.option("--baseline", "baseline_name", metavar="[CLASS/]NAME", help="Fail on drift from this baseline, too.")
@click.option(
    "--sensitivity",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="What `mxharness sensitivity --json` printed, for the report; kept beside run.json.",
)
@common.json_option
def run(
    *,
    device: str,
    ops: tuple[str, ...],
    out: Path,
    quick: bool,
    expression: str,
    workers: str,
    fuzz: int | None,
    fuzz_seed: str,
    shard: str,
    required: str | None,
    known_failures: Path | None,
    model: str,
    no_perplexity: bool,
    windows: int | None,
    baseline_name: str | None,
    sensitivity: Path | None,
    as_json: bool,
) -> int:
    """Validate every kernel and a model; write a report.

    Takes the best device present. Exits 0 when everything passed, 1 on any mismatch, 2 when it cannot run.
    """
    from mxharness import drift, record

    request = Request(
        device=device,
        out=out,
        ops=ops,
        quick=quick,
        expression=expression,
        workers=workers,
        fuzz=fuzz,
        fuzz_seed=fuzz_seed,
        shard=shard,
        known_failures=known_failures,
        model=None if no_perplexity else model,
        windows=windows,
        quiet=as_json,
    )
    _keep_sensitivity(sensitivity, out)
    checks = [require_baseline(baseline_name)] if baseline_name else []
    checks += [require_device(required)] if required else []
    try:
        found = execute(request, *checks)
    except NothingSelectedError as error:
        line = f"FAIL: nothing was selected: {error}"
        common.print_json({"passed": False, "verdict": line}) if as_json else click.echo(line)
        return common.MISMATCH
    comparison = drift.compare(baseline_name, found) if baseline_name else None
    report = write_report(found, out, comparison)
    verdict = record.verdict(found)
    passed = verdict.passed and (comparison is None or comparison.passed)
    if as_json:
        common.print_json(
            {
                "passed": passed,
                "verdict": verdict.first_line,
                "reasons": list(verdict.reasons),
                "selected": found.selected,
                "executed": found.executed,
                "device_class": found.device_class,
                "seconds": found.seconds,
                "perplexity": list(found.perplexity),
                "fuzz": [{**dataclasses.asdict(row), "margin": row.margin} for row in found.fuzz],
                "skipped": [dataclasses.asdict(skip) for skip in found.skipped],
                "baseline": comparison.first_line if comparison else None,
                "record": out / RECORD,
                "report": report,
            }
        )
    else:
        print_summary(found, comparison)
        click.echo(f"record: {out / RECORD}\nreport: {report}")
    return common.PASS if passed else common.MISMATCH


def _keep_sensitivity(given: Path | None, out: Path) -> None:
    """Put the file beside the record, where the report finds it; a file that is none is refused before the run."""
    from mxharness.document import write_atomically
    from mxharness.report import sensitivity

    if given is None:
        sensitivity.beside(out)
        return
    sensitivity.read(given)
    try:
        write_atomically(out / sensitivity.FILE, given.read_bytes())
    except OSError as error:
        raise UserError(common.file_error(error)) from error


def _margin(row: FuzzRow) -> str:
    """How far the worst element stayed below its bound; a dash for an operator that has none."""
    return common.short(row.margin) if row.bounded else "-"


def print_summary(found: RunRecord, comparison: Comparison | None) -> None:
    """Print the outcomes by operator and gate, the model, what was skipped, where to start, and the verdict."""
    from mxharness import record
    from mxharness import report as html

    groups: dict[tuple[str, str], list[bool]] = {}
    largest: dict[tuple[str, str], float] = {}
    for outcome in found.outcomes:
        place = (outcome.op, outcome.gate)
        groups.setdefault(place, []).append(record.is_right(outcome))
        largest[place] = max(largest.get(place, 0.0), outcome.ratio)
    common.print_table(
        f"Checks on {found.device_class}",
        ("operator", "gate", "right", "of", "largest error / bound"),
        [(op, gate, sum(right), len(right), common.short(largest[op, gate])) for (op, gate), right in groups.items()],
    )
    if found.fuzz:
        common.print_table(
            "Random cases",
            ("operator", "right", "rejected", "verdicts on bits", "smallest margin"),
            [(row.op, row.examples, row.rejected, row.bitwise, _margin(row)) for row in found.fuzz],
        )
    if found.perplexity:
        columns = ("name", "text", "protocol", "weights", "activations", "perplexity")
        rows = [[common.short(row.get(name, "")) for name in columns] for row in found.perplexity]
        common.print_table("Perplexity", columns, rows)
    for row in found.perplexity:
        click.echo(f"{row['message']}\n")
    if found.skipped:
        common.print_table("Skipped", ("what", "why"), [(skip.what, skip.why) for skip in found.skipped])
    for outcome in html.smallest(found):
        click.echo(f"smallest failed check of {outcome.op}: {outcome.message or outcome.case}\n")
    for row in found.known:
        click.echo(f"known failure until {row['expires']}: {row['check']}: {row['reason']} ({row['where']})\n")
    for failure in found.tests.failures:
        click.echo(f"{failure.id}: {failure.message}\n")
    click.echo(record.verdict(found).first_line)
    if comparison:
        click.echo(comparison.first_line)
