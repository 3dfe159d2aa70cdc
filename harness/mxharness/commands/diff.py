"""`mxharness baseline diff`: what moved from one baseline to another."""

from __future__ import annotations

from pathlib import Path

import click

from mxharness.commands import common, versions
from mxharness.errors import UserError


@click.command()
@click.argument("old", metavar="[CLASS/]OLD")
@click.argument("new", metavar="[CLASS/]NEW")
@click.option(
    "--page",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write it as one HTML page, too, with the versions up to NEW.",
)
@versions.at_option
@common.json_option
def diff(*, old: str, new: str, page: Path | None, at: str | None, as_json: bool) -> int:
    """Show what moved from baseline OLD to NEW.

    Exits 1 where anything drifted, failed, vanished or is new, as a comparison with a run would. Two device classes are
    compared bit for bit.
    """
    from mxharness import drift
    from mxharness.commands.baseline import comparison_document, print_comparison
    from mxharness.document import write_atomically
    from mxharness.report import moved, trend

    later = versions.named(new, at)
    comparison = drift.diff(versions.named(old, at), later, at)
    if page:
        try:
            write_atomically(page, moved.render(comparison, trend.of(later.device_class, at, until=later.created)))
        except OSError as error:
            raise UserError(common.file_error(error)) from error
    if as_json:
        common.print_json({**comparison_document(comparison), "page": page})
    else:
        print_comparison(comparison)
        if page:
            click.echo(f"page: {page}")
    return common.PASS if comparison.passed else common.MISMATCH
