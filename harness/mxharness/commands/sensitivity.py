"""`mxharness sensitivity`: which weights it hurts to quantise, and what other formats would cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mxharness.commands import common
from mxharness.commands.perplexity import WINDOWS
from mxharness.errors import UserError

if TYPE_CHECKING:
    import torch

    from mxharness.sensitivity import Group, Loss, Sensitivity

_GROUPS: tuple[Group, ...] = ("roles", "layers", "formats")


@click.command()
@common.model_option
@common.text_option
@common.protocol_option
@click.option("--windows", type=WINDOWS, default=16, show_default=True, help='How many evenly spaced, or "all".')
@common.limit_option
@click.option(
    "--only", "groups", type=click.Choice(_GROUPS), multiple=True, help="Measure this group; repeat for more.  [all]"
)
@click.option(
    "--device",
    type=click.Choice(["auto", "host", "cuda"]),
    default="auto",
    show_default=True,
    help="Where torch runs: no kernel of the project does.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw the divergences with their intervals, as .png or .svg.",
)
@common.json_option
def sensitivity(
    *,
    model: str,
    text: str,
    protocol: str,
    windows: int | None,
    limit: int | None,
    groups: tuple[Group, ...],
    device: str,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Rank roles and layers by what it costs to quantise each alone, and compare formats.

    Float32 torch on weights that were stored and read back, against float32 on the weights as they are: mean KL and
    change of perplexity per token, each with one-sided 95 % bounds from windows as units. Judges nothing: exits 0.
    """
    from mxharness import perplexity as measuring
    from mxharness import sensitivity as finding
    from mxharness.commands.perplexity import load, original_of

    if plot and plot.suffix not in {".png", ".svg"}:
        raise UserError(f"a plot is a .png or .svg file, not '{plot}'")
    where = _torch_device(device)
    checkpoint, words = load(model, text)
    checkpoint = original_of(model) or checkpoint
    reading = measuring.read(checkpoint, words, protocol, limit)
    asked = finding.changes(checkpoint, groups or _GROUPS)
    found = finding.measure(checkpoint, reading, asked, where, windows=windows, progress=not as_json)
    if plot:
        _draw(found, plot)
    if as_json:
        common.print_json(found.to_json())
    else:
        _print(found)
        if words.note:
            click.echo(words.note)
    return common.PASS


def _torch_device(name: str) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU; leave out --device cuda")
    return torch.device("cuda" if name != "host" and torch.cuda.is_available() else "cpu")


def _fallbacks(loss: Loss) -> str:
    """How many weights are stored in another format, as their rows do not fit: "180 of 211 in Q5_0"."""
    whole = len(loss.change.weights)
    return ", ".join(f"{len(names)} of {whole} in {form}" for form, names in loss.fell_back.items())


def _print(found: Sensitivity) -> None:
    from mxharness.report.sensitivity import TITLES

    reading = found.reading
    click.echo(
        f"{reading.model} on {reading.text}: {reading.protocol}, {found.windows} of {len(reading.available)} windows, "
        f"{found.scored:,} tokens scored; float32 perplexity {found.perplexity:.4f} (torch on {found.device_class})"
    )
    for group in _GROUPS:
        if losses := found.ranked(group):
            columns = ("what", "10^6 weights", "mean KL", "perplexity", "same word", "note")
            common.print_table(TITLES[group], columns, [_row(loss) for loss in losses])
    for loss in found.losses:
        if loss.missing:
            click.echo(f"not measured: {loss.change.name} {loss.missing}")
    if found.stored:
        click.echo(f"{len(found.stored)} weights are MXFP4 in the file: what that cost is not in these numbers")
    click.echo(f"text sha256 {reading.text_sha256[:16]}, token ids sha256 {reading.ids_sha256[:16]}")


def _row(loss: Loss) -> tuple[str, ...]:
    from mxharness.gate.verdict import moved

    name, size = loss.change.name, f"{loss.parameters / 1e6:.3g}"
    if loss.kl is None or loss.moved is None:
        return name, size, *["not measured"] * 3, ""
    kl = f"{loss.kl.mean:.4g}, {max(loss.kl.lower, 0.0):.4g} to {loss.kl.upper:.4g}"
    return name, size, kl, moved(loss.moved), f"{loss.same:.1%}", _fallbacks(loss)


def _draw(found: Sensitivity, path: Path) -> None:
    from mxharness.plot import Bar, bars_file
    from mxharness.report.sensitivity import AXIS, TITLES

    panels = {}
    for group in _GROUPS:
        losses = found.ranked(group)
        if group == "layers":  # along the model
            losses = sorted(losses, key=lambda loss: int(loss.change.name.split()[1]))
        bars = [Bar(loss.change.name, loss.kl.mean, loss.kl.lower, loss.kl.upper) for loss in losses if loss.kl]
        if bars:
            panels[TITLES[group]] = bars
    reading = found.reading
    title = (
        f"{reading.model}, float32 perplexity {found.perplexity:.3f}\n"
        f"{found.windows} windows of {reading.text}, {reading.protocol}"
    )
    bars_file(path, title, panels, AXIS)
