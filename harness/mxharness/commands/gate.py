"""`mxharness gate`: a model on the kernels against its float32 reference, with a verdict of known error rates."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mxharness.commands import common
from mxharness.commands.perplexity import WINDOWS, load, original_of
from mxharness.errors import KernelFailure, UserError
from mxharness.protocols import DEFAULT_PROTOCOL, PROTOCOLS

if TYPE_CHECKING:
    from mxharness.gate.judged import Gated
    from mxharness.model.decoder import Activations

_text_option = click.option("--text", default="auto", show_default=True, help="A text, as for `mxharness perplexity`.")
_protocol_option = click.option(
    "--protocol", type=click.Choice(tuple(PROTOCOLS)), default=DEFAULT_PROTOCOL, show_default=True
)
_limit_option = click.option(
    "--limit", type=click.IntRange(min=1), metavar="TOKENS", help="Use the text's first TOKENS tokens only."
)


@click.group(invoke_without_command=True)
@click.pass_context
@click.option("--baseline", metavar="NAME", help="A stored reference, or its .safetensors file.  [default: run it]")
@common.model_option
@_text_option
@_protocol_option
@_limit_option
@click.option("--windows", type=WINDOWS, default="all", show_default=True, help="Read at most so many windows.")
@click.option(
    "--activations",
    type=click.Choice(["fp16", "bf16"]),
    multiple=True,
    default=("fp16",),
    show_default=True,
    help="Of the kernels; repeatable: one gate each.",
)
@common.device_option
@click.option("--fast", is_flag=True, help="The host device's float32 arithmetic: faster, other bits.")
@common.json_option
def gate(
    context: click.Context,
    *,
    baseline: str | None,
    model: str,
    text: str,
    protocol: str,
    limit: int | None,
    windows: int | None,
    activations: tuple[Activations, ...],
    device: str,
    fast: bool,
    as_json: bool,
) -> int:
    """Judge a model on the kernels: pass, fail, drift or inconclusive.

    First the KL divergence from float32 on the same weights, then the paired change of perplexity. Reads 64 windows and
    twice as many while the verdict is open; what stays open does not pass. Exits 0 on pass, else 1.
    """
    if context.invoked_subcommand:
        return common.PASS
    from mxharness.device import open_device
    from mxharness.gate import judged, stored
    from mxharness.gate.verdict import Failed

    if baseline:
        stored.find(baseline)  # a wrong name is told before a model is loaded
    opened = open_device(device, fast=fast)
    checkpoint, words = load(model, text)
    try:
        found = judged.judge_model(
            checkpoint, words, opened, activations, protocol, tokens=limit, windows=windows, baseline=baseline,
            original=original_of(model), progress=True,
        )  # fmt: skip
    except (Failed, KernelFailure) as error:
        if as_json:
            common.print_json({"passed": False, "verdict": "fail", "reason": str(error)})
        else:
            click.echo(f"FAIL: {error}")
        return common.MISMATCH
    if as_json:
        common.print_json(_document(found))
    else:
        _print(found)
    return common.PASS if found.passed else common.MISMATCH


@gate.command()
@click.argument("name")
@common.model_option
@_text_option
@_protocol_option
@_limit_option
@click.option("--windows", type=WINDOWS, default="all", show_default=True, help="How many evenly spaced windows.")
@click.option("--top", type=click.IntRange(min=1), default=64, show_default=True, help="Most probable words to store.")
@click.option("--drawn", type=click.IntRange(min=1), default=16, show_default=True, help="Words to draw of the others.")
@click.option("--replace", is_flag=True, help="Write over a baseline of this name.")
@common.device_option
@common.json_option
def create(
    name: str,
    *,
    model: str,
    text: str,
    protocol: str,
    limit: int | None,
    windows: int | None,
    top: int,
    drawn: int,
    replace: bool,
    device: str,
    as_json: bool,
) -> int:
    """Store a float32 reference for `mxharness gate --baseline NAME`.

    NAME is a plain name, stored under baselines/gate, or the path of a .safetensors file.
    """
    from mxharness import paths
    from mxharness.baseline import checked_name
    from mxharness.device import open_device
    from mxharness.gate import judged, stored

    own = paths.writable_baselines() / "gate"
    path = Path(name) if name.endswith(stored.SUFFIX) else own / f"{checked_name(name)}{stored.SUFFIX}"
    if path.exists() and not replace:
        raise UserError(f"{path} exists; --replace writes over it")
    opened = open_device(device)
    checkpoint, words = load(model, text)
    made = judged.make_baseline(
        checkpoint, words, opened.torch_device, protocol, tokens=limit, windows=windows, top=top, drawn=drawn,
        original=original_of(model), progress=True,
    )  # fmt: skip
    stored.save(made, path)
    size = path.stat().st_size
    if as_json:
        common.print_json({"path": path, "bytes": size, **made.fixed})
    else:
        click.echo(f"{path}: {len(made.spans)} windows, {len(made.columns['nll']):,} scored tokens, {size:,} bytes")
    return common.PASS


@gate.command()
@click.argument("differences", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--trials", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@common.json_option
def simulate(differences: Path, *, trials: int, seed: int, as_json: bool) -> int:
    """Show how often the gate errs, on measured differences.

    DIFFERENCES is a JSON file: candidates, each with its margin and its windows' differences of mean NLL.
    """
    from mxharness.gate.simulate import rates, read

    rows = []
    for name, (margin, measured) in read(differences).items():
        changes = (0.0, margin / 2, margin, 2 * margin, -2 * margin)
        for rate in rates(measured, changes, margin, trials=trials, seed=seed):
            rows.append({"candidate": name, "margin": margin, **asdict(rate)})
    if as_json:
        common.print_json({"trials": trials, "seed": seed, "rates": rows})
        return common.PASS
    words = ("pass", "fail", "drift", "inconclusive")
    common.print_table(
        f"Verdicts on perplexity in {trials} simulated runs, on 64 windows alone / after doubling",
        ("candidate", "true change", *words, "windows read"),
        [
            (
                row["candidate"],
                f"{row['change']:+.2%}",
                *(f"{row['once'].get(word, 0):.3f} / {row['ended'].get(word, 0):.3f}" for word in words),
                f"{row['windows']:.0f}",
            )
            for row in rows
        ],
    )
    return common.PASS


def _document(found: Gated) -> dict[str, Any]:
    gates = {
        name: {
            **asdict(one),
            "divergence": _numbers(one.divergence),
            "change": _numbers(one.change),
            "detectable": one.detectable,
        }
        for name, one in found.judgements.items()
    }
    cost = _numbers(found.cost) if found.cost else None
    return {
        "passed": found.passed,
        "gates": gates,
        "reference": found.reference,
        "repeated": asdict(found.repeated) if found.repeated else None,
        "format": cost,
        "notes": list(found.notes),
    }


def _numbers(estimate: Any) -> dict[str, float]:  # noqa: ANN401
    return {**asdict(estimate), "lower": estimate.lower, "upper": estimate.upper}


def _print(found: Gated) -> None:
    from mxharness.gate.verdict import moved

    common.print_table(
        found.title,
        (
            "activations",
            "windows",
            "mean KL",
            "99 %",
            "99.9 %",
            "worst window",
            "same word",
            "perplexity",
            "detectable",
        ),
        [
            (
                name,
                one.change.windows,
                f"{one.divergence.mean:.2e} (< {one.divergence.upper:.2e})",
                f"{one.percentiles[0]:.2e}",
                f"{one.percentiles[1]:.2e}",
                f"{one.worst[1]:.2e} at token {one.worst[0]}",
                f"{one.same:.2%}",
                moved(one.change),
                f"{one.detectable:.3%}",
            )
            for name, one in found.judgements.items()
        ],
    )
    for line in found.notes:
        click.echo(line)
    for name, one in found.judgements.items():
        click.echo(f"{one.verdict.upper()}: kernels with {name} activations: {one.reason}")
