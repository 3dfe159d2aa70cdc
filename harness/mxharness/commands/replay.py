"""`mxharness replay`: whether a saved failure still fails, here and now."""

from __future__ import annotations

import math
from pathlib import Path

import click

from mxharness.commands import common


def _positive(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    """A number that a bound can be made of."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise click.BadParameter(f"{value:g} is no positive number")
    return value


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@common.device_option
@click.option("--scale-bound", type=float, callback=_positive, metavar="X", help="Judge with the whole bound times X.")
@click.option(
    "--unit-roundoff", type=float, callback=_positive, metavar="U", help="Judge with another unit roundoff of the sums."
)
@common.json_option
def replay(folder: Path, *, device: str, scale_bound: float | None, unit_roundoff: float | None, as_json: bool) -> int:
    """Judge a saved failure again.

    Runs the kernel on the tensors in FOLDER, which a failing check wrote, on any device, and judges it by the saved
    rule or another. Exits 0 when it passes now, 1 when it still fails, 2 for a folder that cannot be read.
    """
    from mxharness import repro
    from mxharness.device import open_device
    from mxharness.replay import replay as judged_again

    saved = repro.load(folder)
    found = judged_again(saved, open_device(device), scale=scale_bound, unit_roundoff=unit_roundoff)
    if as_json:
        common.print_json(
            {
                "passed": found.outcome.passed,
                "verdict": found.first_line,
                "same_outputs": found.same_outputs,
                "other_inputs": list(saved.other_inputs),
                "notes": list(found.notes),
                "ratio": found.outcome.ratio,
                "saved_ratio": saved.outcome.ratio,
                "message": found.outcome.message,
                "saved_message": saved.outcome.message,
                "device_class": found.outcome.device,
                "saved_device_class": saved.outcome.device,
            }
        )
    else:
        for line in (*([found.outcome.message] if found.outcome.message else []), *found.notes, found.first_line):
            click.echo(line)
    return common.PASS if found.outcome.passed else common.MISMATCH
