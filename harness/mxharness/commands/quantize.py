"""`mxharness quantize`: a model file to MXFP4."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mxharness.commands import common

if TYPE_CHECKING:
    from mxharness.model.quantising import Report
    from mxharness.model.selecting import Form


@click.command()
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["gguf", "safetensors"]),
    help="What OUT is: a .gguf file, or a folder of safetensors.  [default: by OUT's name]",
)
@click.option(
    "--scale-rule",
    type=click.Choice(["floor", "even", "rceil", "ceil"]),
    default="floor",
    show_default=True,
    help="How a block's scale follows from its largest value.",
)
@click.option(
    "--tie-rule",
    type=click.Choice(["even", "zero", "away"]),
    default="even",
    show_default=True,
    help="Where a value halfway between two goes.",
)
@click.option("--only", multiple=True, metavar="PATTERN", help="Quantise these tensors alone, by name, with * and ?.")
@click.option("--skip", multiple=True, metavar="PATTERN", help="Leave these tensors as they are.")
@common.json_option
def quantize(
    *,
    source: str,
    target: Path,
    form: Form | None,
    scale_rule: str,
    tie_rule: str,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    as_json: bool,
) -> int:
    """Write a model with its matrices in MXFP4.

    IN is a model that `fetch` knows, a .gguf file, a .safetensors file or a folder of them; OUT appears whole or not at
    all. Without --only, embeddings, output heads, routers, norms and convolutions stay as they are. What is MXFP4
    already is copied, never quantised again. Prints each tensor's signal to noise ratio.
    """
    from mxharness.model.quantising import quantise

    report = quantise(
        source, target, form, scale_rule=scale_rule, tie_rule=tie_rule, only=only, skip=skip, progress=not as_json
    )
    if as_json:
        common.print_json(report.to_json())
    else:
        _print(report)
    return common.PASS


def _print(report: Report) -> None:
    common.print_table(
        f"{report.path}: {report.rules}",
        ("tensor", "shape", "from", "to", "bytes", "SQNR, dB"),
        [
            (
                row.name,
                "x".join(map(str, row.shape)),
                row.before,
                row.after,
                f"{row.nbytes:,}",
                row.why if row.sqnr is None else f"{row.sqnr:.2f}",
            )
            for row in report.rows
        ],
    )
    done = sum(row.sqnr is not None for row in report.rows)
    total = "" if report.sqnr is None else f", SQNR of all together {report.sqnr:.2f} dB"
    click.echo(f"{done} of {len(report.rows)} tensors quantised: {report.before:,} -> {report.after:,} bytes{total}")
