"""`mxharness diverge`: the first operator of a whole model's run that leaves its bound."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from mxharness.commands import common
from mxharness.errors import UserError

if TYPE_CHECKING:
    from mxharness.diverge import Report, Step
    from mxharness.model.decoder import Activations


@click.command()
@common.model_option
@click.option("--text", default="default", show_default=True, help='As for `perplexity`: "default" is embedded.')
@click.option(
    "--tokens", type=click.IntRange(min=1), default=64, show_default=True, help="The text's first tokens to run over."
)
@click.option(
    "--activations",
    type=click.Choice(["fp16", "bf16"]),
    default="fp16",
    show_default=True,
    help="What kernels give to each other.",
)
@click.option("--source", metavar="FILE", help="Run with one change of this file of kernels/.")
@click.option(
    "--replace", nargs=2, metavar="OLD NEW", help="With --source: the text OLD, which occurs once, becomes NEW."
)
@common.device_option
@common.json_option
def diverge(
    *,
    model: str,
    text: str,
    tokens: int,
    activations: Activations,
    source: str | None,
    replace: tuple[str, str] | None,
    device: str,
    as_json: bool,
) -> int:
    """Find the first operator of a model's run that goes wrong, layer by layer.

    Every launch is judged from the activations it was given and the checkpoint's weights; of a large product evenly
    spaced rows are. Exits 1 where one leaves its bound or a weight on the device is not the checkpoint's.
    """
    import torch
    from tqdm import tqdm

    from mxharness import diverge as finding
    from mxharness.commands.perplexity import load
    from mxharness.device import open_device
    from mxharness.device.source import shipped
    from mxharness.model.tokenizer import encode

    if (source is None) != (replace is None):
        raise UserError("--source FILE and --replace OLD NEW belong together")
    sources = shipped().replaced(source, *replace) if source and replace else None
    opened = open_device(device, sources=sources)
    checkpoint, words = load(model, text)
    ids = encode(checkpoint.vocabulary, words.text)[:tokens]
    if len(ids) < tokens:
        raise UserError(f"{words.label} has {len(ids):,} tokens, not {tokens:,}")
    with tqdm(desc="launches", unit="", disable=as_json, mininterval=1) as bar:
        report = finding.run(
            checkpoint, opened, torch.from_numpy(ids).long()[None], activations, progress=bar.update
        )  # fmt: skip
    if as_json:
        common.print_json(report.to_json())
    else:
        _print(report)
    return common.PASS if report.passed else common.MISMATCH


def _print(report: Report) -> None:
    places = dict.fromkeys(step.place for step in report.steps)
    states = {each.place: each.relative for each in report.growth}
    rows = [_row([step for step in report.steps if step.place == place], states.get(place)) for place in places]
    common.print_table(
        f"{report.model}, {report.tokens} tokens, {report.activations} activations, {report.arithmetic} arithmetic on "
        f"{report.device_class}",
        ("place", "verdicts", "elements", "error / bound", "in", "states from float32", "diverged"),
        rows,
    )
    sampled = {(step.role, step.outcome.gate, *step.rows) for step in report.steps if step.rows[0] < step.rows[1]}
    for role, gate, some, all_rows in sorted(sampled):
        click.echo(f"{role} ({gate}): {some} of {all_rows} rows judged, evenly spaced")
    refused = [step for step in report.steps if step.outcome.refused]
    if refused:
        words = f"{refused[0].place}, {refused[0].role}: {refused[0].outcome.message}"
        click.echo(
            f"{len(refused)} verdicts are within bounds on data that a wrong kernel might pass; the first: {words}"
        )
    first = report.first
    if first:
        others = sum(step.diverged for step in report.steps) - 1
        click.echo(f"FAIL: first in {first.place}, {first.role} ({first.outcome.gate}): {first.outcome.message}")
        click.echo(f"{others} more verdicts are failures" if others else "it is the only one")
    if report.failure:
        click.echo(f"FAIL: {report.failure}")
    if report.passed:
        click.echo(f"PASS: {len(report.steps)} verdicts, every operator within its bound")


def _row(steps: list[Step], relative: float | None) -> tuple[object, ...]:
    worst = max(steps, key=lambda step: (step.diverged, step.outcome.ratio))
    diverged = list(dict.fromkeys(step.role for step in steps if step.diverged))
    ratio = worst.outcome.ratio
    return (
        steps[0].place,
        len(steps),
        f"{sum(step.outcome.elements for step in steps):,}",
        f"{ratio:.3g}" if math.isfinite(ratio) else "other bits",
        worst.role,
        "" if relative is None else f"{relative:.2e}",
        ", ".join(diverged),
    )
