"""`mxharness report`: the HTML report of a run that is on disk."""

from __future__ import annotations

from pathlib import Path

import click

from mxharness.commands import common
from mxharness.errors import UserError


@click.command()
@click.argument("run_json", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write.  [default: report.html beside RUN_JSON]",
)
@click.option("--baseline", "baseline_name", metavar="[CLASS/]NAME", help="Compare with this baseline in the report.")
@common.json_option
def report(run_json: Path, out: Path | None, baseline_name: str | None, as_json: bool) -> int:
    """Write the report of a recorded run.

    Exits by the verdict of the run in RUN_JSON.
    """
    from mxharness import drift, record
    from mxharness import report as html

    found = record.load(run_json)
    comparison = drift.compare(baseline_name, found) if baseline_name else None
    path = out or run_json.with_name("report.html")
    try:
        html.write(found, path, comparison)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from error
    verdict = record.verdict(found)
    passed = verdict.passed and (comparison is None or comparison.passed)
    if as_json:
        common.print_json({"report": path, "passed": passed, "verdict": verdict.first_line})
    else:
        click.echo(verdict.first_line)
        if comparison:
            click.echo(comparison.first_line)
        click.echo(f"report: {path}")
    return common.PASS if passed else common.MISMATCH
