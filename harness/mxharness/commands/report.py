"""`mxharness report`: the report of a run that is on disk, or of two side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mxharness.commands import common
from mxharness.errors import UserError

if TYPE_CHECKING:
    from mxharness.record import RunRecord

_BESIDE = "report"
"""Folder for two runs: neither run's own report is overwritten."""


@click.command()
@click.argument("run_json", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("other_json", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder to write to.  [default: where RUN_JSON lies; of two runs, report/ there]",
)
@click.option("--baseline", "baseline_name", metavar="[CLASS/]NAME", help="Compare with this baseline in the report.")
@click.option(
    "--sensitivity",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="What `mxharness sensitivity --json` printed.  [default: sensitivity.json beside RUN_JSON, where it is]",
)
@common.json_option
def report(
    run_json: Path,
    other_json: Path | None,
    out: Path | None,
    baseline_name: str | None,
    sensitivity: Path | None,
    as_json: bool,
) -> int:
    """Write the report of a recorded run, or of two side by side.

    One run: report.html, junit.xml, run.csv and summary.md; exits by the verdict of the run. Two runs: report.html and
    summary.md of what changed from RUN_JSON to OTHER_JSON; exits 1 where anything is broken, still wrong or gone.
    """
    from mxharness import record

    first = record.load(run_json)
    if other_json is not None:
        if baseline_name or sensitivity:
            raise UserError("--baseline and --sensitivity are for the report of one run")
        return _two(first, run_json, other_json, out or run_json.parent / _BESIDE, as_json)
    from mxharness import drift
    from mxharness import report as files
    from mxharness.report import sensitivity as parts

    comparison = drift.compare(baseline_name, first) if baseline_name else None
    measured = parts.read(sensitivity) if sensitivity else parts.beside(run_json.parent)
    try:
        path = files.write(first, out or run_json.parent, comparison, measured)
    except OSError as error:
        raise UserError(common.file_error(error)) from error
    verdict = record.verdict(first)
    passed = verdict.passed and (comparison is None or comparison.passed)
    if as_json:
        common.print_json({"report": path, "passed": passed, "verdict": verdict.first_line})
    else:
        click.echo(verdict.first_line)
        if comparison:
            click.echo(comparison.first_line)
        click.echo(f"report: {path}")
    return common.PASS if passed else common.MISMATCH


def _two(first: RunRecord, first_path: Path, second_path: Path, out: Path, as_json: bool) -> int:
    from mxharness import record
    from mxharness import report as files

    second = record.load(second_path)
    try:
        path, found = files.write_pair(first, second, _names(first_path, second_path), out)
    except OSError as error:
        raise UserError(common.file_error(error)) from error
    if as_json:
        common.print_json({"report": path, "worse": found.worse, "counts": dict(found.counts)})
    else:
        click.echo(found.headline)
        click.echo(f"report: {path}")
    return common.MISMATCH if found.worse else common.PASS


def _names(first: Path, second: Path) -> tuple[str, str]:
    """What tells the two apart: their file names, else their folders'."""
    for names in ((first.stem, second.stem), (first.absolute().parent.name, second.absolute().parent.name)):
        if names[0] != names[1]:
            return names
    return str(first), str(second)
