"""`mxharness merge`: the shards of a run as one."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from mxharness import paths
from mxharness.commands import common
from mxharness.errors import UserError


@click.command()
@click.argument("run_json", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--out", **common.out_settings, help=f"Where {common.FILES} of the whole go.")
@common.json_option
def merge(run_json: tuple[Path, ...], out: Path, as_json: bool) -> int:
    """Put the shards of one run together.

    Each RUN_JSON is the record of `mxharness run --shard I/N`. Exits 0 when together they are all of the manifest, each
    test once, and everything passed; 1 when something is missing, doubled or wrong; 2 for shards of different runs.
    """
    from mxharness import manifest, record
    from mxharness.commands.running import RECORD, write_report
    from mxharness.merge import merge as merged

    shards = {str(path): record.load(path) for path in run_json}
    if len(shards) < len(run_json):
        raise UserError("the same record was given twice")
    command = shlex.join(("mxharness", *sys.argv[1:]))
    found = merged(shards, manifest.load(paths.root()), command)
    common.folder(out)
    record.save(found, out / RECORD)
    report = write_report(found, out)
    verdict = record.verdict(found)
    if as_json:
        document = {"passed": verdict.passed, "verdict": verdict.first_line, "reasons": list(verdict.reasons)}
        common.print_json({**document, "record": out / RECORD, "report": report})
    else:
        click.echo(verdict.first_line)
        click.echo(f"record: {out / RECORD}\nreport: {report}")
    return common.PASS if verdict.passed else common.MISMATCH
