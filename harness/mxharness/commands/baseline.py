"""`mxharness baseline create | compare | list`: bless a run, judge a run against a blessed one.

commands/versions.py and commands/diff.py have the rest of the group: show, history, prune, diff.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mxharness.commands import common, diff, versions
from mxharness.commands.running import Request, execute, require_baseline, write_report

if TYPE_CHECKING:
    from mxharness.changes import Change
    from mxharness.drift import Comparison

_run_option = click.option(
    "--run",
    "run_json",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Take this run.json instead of running everything now.",
)
_out_option = click.option("--out", **common.out_settings, help=f"Where a run made now puts {common.FILES}.")
_no_perplexity_option = click.option("--no-perplexity", is_flag=True, help="Leave the model out of a run made now.")


_SHOWN = 40
"""Rows of what is blessed on the screen; `git diff` has them all."""


_GROWN = "FAIL: growth past its budget is blessed for a reason only: --accept-growth WHY"


@click.group()
def baseline() -> None:
    """Bless runs and judge later runs by them.

    They lie in baselines/ of the checkout or of the working directory; --at, or MXHARNESS_BASELINES in the environment,
    names another folder or an address such as s3://bucket/baselines.
    """


for _command in (versions.show, versions.history, versions.prune, diff.diff):
    baseline.add_command(_command)


@baseline.command()
@click.argument("name")
@click.option("--replace", is_flag=True, help="Bless the run in place of the baseline of that name.")
@click.option(
    "--accept-growth", "accepted", metavar="WHY", default="", help="Count slow growth anew from here, for this reason."
)
@click.option(
    "--speed",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="What `mxharness bench --save` wrote.  [default: bench.json beside the run's run.json, where it is]",
)
@common.device_option
@_run_option
@_out_option
@_no_perplexity_option
@versions.at_option
@common.json_option
def create(
    *,
    name: str,
    replace: bool,
    accepted: str,
    speed: Path | None,
    device: str,
    run_json: Path | None,
    out: Path,
    no_perplexity: bool,
    at: str | None,
    as_json: bool,
) -> int:
    """Run everything and bless it as baseline NAME.

    Only a run that passes is blessed, as a baseline of its device class. Shows what it blesses: what differs from the
    baseline it replaces, or from the newest of its class.
    """
    from mxharness import baseline as store
    from mxharness import record
    from mxharness.bench import result
    from mxharness.blessing import weigh

    def check(device_class: str) -> None:
        store.refuse_taken(device_class, name, at, replace=replace)

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
    weighed = weigh(name, found, at)
    versions.print_damaged(weighed.damaged, err=True)  # one that is damaged must not keep its own successor
    if weighed.grown and not accepted:
        if as_json:
            common.print_json({"passed": False, "verdict": _GROWN, "baseline": None, "grown": dict(weighed.grown)})
        else:
            common.print_table("Grown", ("what", "how"), weighed.grown)
            click.echo(f"{_GROWN}\nnothing was blessed")
        return common.MISMATCH
    times = result.load(speed) if speed else result.beside(run_json.parent if run_json else out)
    path = store.create(name, found, replace=replace, root=at, accepted=accepted, speed=times)
    checks = len(store.entries(found))
    if as_json:
        document = {"passed": True, "baseline": f"{found.device_class}/{name}", "path": path, "checks": checks}
        rows = [dataclasses.asdict(change) for change in weighed.changes if change.status != "same"]
        common.print_json({**document, "before": weighed.against, "changes": rows})
    else:
        _print_changes(f"Blessed, against {weighed.against}", weighed.changes, _SHOWN)
        click.echo(f"blessed {checks} checks as {found.device_class}/{name}; review and commit {path}")
    return common.PASS


@baseline.command()
@click.argument("name", metavar="[CLASS/]NAME")
@common.device_option
@_run_option
@_out_option
@_no_perplexity_option
@versions.at_option
@common.json_option
def compare(
    *, name: str, device: str, run_json: Path | None, out: Path, no_perplexity: bool, at: str | None, as_json: bool
) -> int:
    """Compare a run with a baseline.

    NAME is one of the run's own device class; CLASS/NAME of another class is compared bit for bit.
    """
    from mxharness import drift, record

    if run_json:
        found = record.load(run_json)
        comparison = drift.compare(name, found, root=at)
    else:
        found = execute(_request(device, out, no_perplexity, as_json), require_baseline(name, at))
        comparison = drift.compare(name, found, root=at)
        write_report(found, out, comparison)
    if as_json:
        common.print_json(comparison_document(comparison))
    else:
        print_comparison(comparison)
    return common.PASS if comparison.passed else common.MISMATCH


@baseline.command("list")
@versions.at_option
@common.json_option
def list_(*, at: str | None, as_json: bool) -> int:
    """List the baselines that exist; exits 1 where one of them cannot be read."""
    from mxharness import baseline as store

    found = store.survey(root=at)
    if as_json:
        damaged = [dataclasses.asdict(one) for one in found.damaged]
        common.print_json({"baselines": [dataclasses.asdict(one) for one in found.summaries], "damaged": damaged})
    else:
        rows = [
            (f"{one.device_class}/{one.name}", str(one.checks), ", ".join(one.operators), one.created)
            for one in found.summaries
        ]
        rows += [(f"{one.device_class}/{one.name}", "damaged", "", "") for one in found.damaged]
        common.print_table("Baselines", ("name", "checks", "operators", "created"), rows or [("none", "", "", "")])
        versions.print_damaged(found.damaged)
    return common.MISMATCH if found.damaged else common.PASS


def comparison_document(comparison: Comparison) -> dict[str, object]:
    """What `--json` says of a comparison."""
    return {
        "passed": comparison.passed,
        "verdict": comparison.first_line,
        "counts": dict(comparison.counts),
        "changes": [dataclasses.asdict(change) for change in comparison.changes if change.status != "same"],
        "environment": [
            {"what": what, "baseline": before, "run": after} for what, before, after in comparison.environment
        ],
    }


def print_comparison(comparison: Comparison) -> None:
    """Print what moved and the verdict; where it fails, the command that blesses the run."""
    _print_changes(f"Moved from {comparison.baseline}", comparison.changes)
    if comparison.environment:
        common.print_table("Environment", ("what", f"in {comparison.baseline}", "now"), comparison.environment)
    click.echo(comparison.first_line)
    if comparison.moved and comparison.command:
        click.echo(f"where the change is meant, bless it: {comparison.command}")


def _print_changes(title: str, changes: Sequence[Change], most: int | None = None) -> None:
    """A row for everything that is not the same, `most` at most."""
    moved = [change for change in changes if change.status != "same"]
    if moved:
        rows = [(change.status, change.key, change.message) for change in moved[:most]]
        common.print_table(title, ("status", "check", "what"), rows)
    if most is not None and len(moved) > most:
        click.echo(f"and {len(moved) - most:,} more")


def _request(device: str, out: Path, no_perplexity: bool, quiet: bool) -> Request:
    return Request(device=device, out=out, model=None if no_perplexity else common.DEFAULT_MODEL, quiet=quiet)
