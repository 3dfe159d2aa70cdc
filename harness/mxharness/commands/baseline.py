"""`mxharness baseline create | compare | list`: bless a run, judge a run against a blessed one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mxharness import paths
from mxharness.commands import common
from mxharness.commands.running import Request, execute, require_baseline, write_report
from mxharness.errors import UserError

if TYPE_CHECKING:
    from mxharness.drift import Comparison

_run_option = click.option(
    "--run",
    "run_json",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Take this run.json instead of running everything now.",
)
_out_option = click.option("--out", **common.out_settings, help="Where a run made now puts run.json and report.html.")
_no_perplexity_option = click.option("--no-perplexity", is_flag=True, help="Leave the model out of a run made now.")


@click.group()
def baseline() -> None:
    """Bless runs and judge later runs by them."""


@baseline.command()
@click.argument("name")
@click.option("--replace", is_flag=True, help="Bless the run in place of the baseline of that name.")
@common.device_option
@_run_option
@_out_option
@_no_perplexity_option
@common.json_option
def create(
    *, name: str, replace: bool, device: str, run_json: Path | None, out: Path, no_perplexity: bool, as_json: bool
) -> int:
    """Run everything and bless it as baseline NAME.

    Only a run that passes is blessed, as a baseline of its device class.
    Writes baselines/<device class>/NAME in the checkout, or in the working directory outside of one.
    """
    from mxharness import baseline as store
    from mxharness import record

    def check(device_class: str) -> None:
        if not replace and (paths.writable_baselines() / device_class / name).exists():
            raise UserError(f"baseline {device_class}/{name} exists; --replace blesses this run in its place")

    store.checked_name(name)
    if run_json:
        found = record.load(run_json)
    else:
        request = _request(device, out, no_perplexity, as_json)
        found = execute(dataclasses.replace(request, blessing=True), check)
        write_report(found, out)
        verdict = record.verdict(found)
        if not verdict.passed:
            if as_json:
                common.print_json({"passed": False, "verdict": verdict.first_line, "baseline": None})
            else:
                click.echo(f"{verdict.first_line}\nnothing was blessed")
            return common.MISMATCH
    path = store.create(name, found, replace=replace)
    checks = len(store.entries(found))
    if as_json:
        common.print_json({"passed": True, "baseline": f"{found.device_class}/{name}", "path": path, "checks": checks})
    else:
        click.echo(f"blessed {checks} checks as {found.device_class}/{name}; review and commit {path}")
    return common.PASS


@baseline.command()
@click.argument("name", metavar="[CLASS/]NAME")
@common.device_option
@_run_option
@_out_option
@_no_perplexity_option
@common.json_option
def compare(*, name: str, device: str, run_json: Path | None, out: Path, no_perplexity: bool, as_json: bool) -> int:
    """Compare a run with a baseline.

    NAME is one of the run's own device class; CLASS/NAME of another class is compared bit for bit.
    """
    from mxharness import drift, record

    if run_json:
        found = record.load(run_json)
        comparison = drift.compare(name, found)
    else:
        found = execute(_request(device, out, no_perplexity, as_json), require_baseline(name))
        comparison = drift.compare(name, found)
        write_report(found, out, comparison)
    if as_json:
        document = {
            "passed": comparison.passed,
            "verdict": comparison.first_line,
            "counts": dict(comparison.counts),
            "changes": [dataclasses.asdict(change) for change in comparison.changes if change.status != "same"],
            "environment": [
                {"what": what, "baseline": before, "run": after} for what, before, after in comparison.environment
            ],
        }
        common.print_json(document)
    else:
        print_comparison(comparison)
    return common.PASS if comparison.passed else common.MISMATCH


@baseline.command("list")
@common.json_option
def list_(as_json: bool) -> int:
    """List the baselines that exist."""
    from mxharness import baseline as store

    found = store.list_baselines()
    if as_json:
        common.print_json({"baselines": [dataclasses.asdict(summary) for summary in found]})
        return common.PASS
    rows = [
        (f"{item.device_class}/{item.name}", item.checks, ", ".join(item.operators), item.created) for item in found
    ]
    common.print_table("Baselines", ("name", "checks", "operators", "created"), rows or [("none", "", "", "")])
    return common.PASS


def print_comparison(comparison: Comparison) -> None:
    """Print what moved and the verdict; where it fails, the command that blesses the run."""
    moved = [change for change in comparison.changes if change.status != "same"]
    if moved:
        rows = [(change.status, change.key, change.message) for change in moved]
        common.print_table(f"Moved from {comparison.baseline}", ("status", "check", "what"), rows)
    if comparison.environment:
        common.print_table("Environment", ("what", "in the baseline", "in the run"), comparison.environment)
    click.echo(comparison.first_line)
    if not comparison.passed:
        click.echo(f"where the change is meant, bless it: {comparison.command}")


def _request(device: str, out: Path, no_perplexity: bool, quiet: bool) -> Request:
    return Request(device=device, out=out, model=None if no_perplexity else common.DEFAULT_MODEL, quiet=quiet)
