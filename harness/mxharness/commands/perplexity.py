"""`mxharness perplexity`: measure a model in float32 and in MXFP4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from mxharness.commands import common
from mxharness.errors import KernelFailure, UserError
from mxharness.protocols import DEFAULT_WINDOWS

if TYPE_CHECKING:
    from mxharness.agreement import Triple
    from mxharness.model.checkpoint import Checkpoint
    from mxharness.model.decoder import Activations
    from mxharness.model.runner import Runner
    from mxharness.perplexity import Result
    from mxharness.text import Text

Weights = Literal["all", "float32", "decoded", "mxfp4"]

ACTIVATIONS: Activations = "fp16"
"""Where none are named."""

_ALL_WINDOWS = "all"


class Windows(click.ParamType[int | None]):
    """A count of windows, or "all", which is None."""

    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:  # noqa: ANN401  click's own signature
        """Turn what was typed into a count."""
        if value is None or value == _ALL_WINDOWS:
            return None
        if isinstance(value, str) and not value.lstrip("-").isdecimal():
            self.fail(f"'{value}' is neither a whole number nor '{_ALL_WINDOWS}'", param, ctx)
        return click.IntRange(min=1).convert(value, param, ctx)


WINDOWS = Windows()


@click.command()
@common.model_option
@common.text_option
@common.protocol_option
@click.option(
    "--windows",
    type=WINDOWS,
    default=DEFAULT_WINDOWS,
    show_default=True,
    help='How many evenly spaced windows, or "all".',
)
@common.limit_option
@click.option(
    "--weights",
    type=click.Choice(["all", "float32", "decoded", "mxfp4"]),
    default="all",
    show_default=True,
    help="float32: the original; decoded: what MXFP4 decodes to, in float32; mxfp4: through the kernels.",
)
@click.option(
    "--activations",
    type=click.Choice(["fp16", "bf16"]),
    default=ACTIVATIONS,
    show_default=True,
    help="What a linear layer's input is rounded to before the kernels.",
)
@click.option("--batch", type=click.IntRange(min=1), help="Windows at once.  [default: host 1, GPU 8]")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Keep the likelihood of every token there, batch by batch.",
)
@click.option("--resume", is_flag=True, help="Go on with what --out holds; refused where anything has changed.")
@common.device_option
@click.option("--fast", is_flag=True, help="The host device's float32 arithmetic: faster, other bits.")
@common.json_option
def perplexity(
    *,
    model: str,
    text: str,
    protocol: str,
    windows: int | None,
    limit: int | None,
    weights: Weights,
    activations: Activations,
    batch: int | None,
    out: Path | None,
    resume: bool,
    device: str,
    fast: bool,
    as_json: bool,
) -> int:
    """Measure a model in float32 and in MXFP4.

    Exits 1 where the kernels move the perplexity by more than the rounding of activations can. On several GPUs:
    torchrun --nproc-per-node N -m mxharness perplexity ...
    """
    from mxharness import agreement
    from mxharness import perplexity as measuring
    from mxharness.device import open_device
    from mxharness.model import decoder, ranks, reference

    if resume and out is None:
        raise UserError("--resume goes on with what --out names; it needs --out")
    with ranks.joined() as here:
        opened = open_device(device, fast=fast)
        checkpoint, words = load(model, text)
        reading = measuring.read(checkpoint, words, protocol, limit)
        keep = measuring.Keep(out, resume) if out else None

        def measured(runner: Runner) -> Result:
            return measuring.measure(
                reading, runner, windows=windows, batch=batch, progress=True, keep=keep, ranks=here
            )

        choices: dict[str, Callable[[], Runner]] = {
            "float32": lambda: reference.float32(original_of(model) or checkpoint, opened.torch_device),
            "decoded": lambda: reference.decoded(checkpoint, opened.torch_device),
            "mxfp4": lambda: decoder.kernels(checkpoint, opened, activations),
        }
        triple = None
        try:
            if weights == "all":
                triple = agreement.triple(
                    checkpoint, reading, opened, activations=activations, original=original_of(model), measured=measured
                )
                results = [triple.original, triple.decoded, triple.kernels]
            else:
                results = [measured(choices[weights]())]
        except (measuring.NotFiniteError, KernelFailure) as error:
            if as_json:
                common.print_json({"passed": False, "message": str(error)})
            else:
                click.echo(f"FAIL: {error}")
            return common.MISMATCH
        passed = triple is None or triple.passed
        if here.rank == 0:
            _print(results, triple, words.note, as_json=as_json)
    return common.PASS if passed else common.MISMATCH


def _print(results: list[Result], triple: Triple | None, note: str, *, as_json: bool) -> None:
    document = triple.to_json() if triple else results[0].to_json()
    if as_json:
        common.print_json({**document, "note": note})
        return
    _print_results(results, note)
    if triple:
        click.echo(f"{'PASS' if triple.passed else 'FAIL'}: {triple.message}")


def original_of(model: str) -> Checkpoint | None:
    """The embedded model before it was quantised; None for any other model, which is its own original."""
    from mxharness.model.load import load as load_model

    return load_model("embedded-original") if model == "embedded" else None


def require_model(model: str) -> None:
    """Raise UserError where `model` is neither a name that `fetch` knows nor a model that is there."""
    from mxharness import fetch as fetching
    from mxharness.model import embedded
    from mxharness.model.load import find

    if model not in fetching.ARTEFACTS and not find(model).exists():
        raise UserError(f"no model file {model}; by name there are {', '.join((*embedded.NAMES, *fetching.ARTEFACTS))}")


def load(model: str, source: str) -> tuple[Checkpoint, Text]:
    """The model called `model`, fetched if need be, or of that path; and a text.

    Raises UserError; for a name that does not exist, before anything is downloaded.
    """
    from mxharness.model.load import load as load_model
    from mxharness.text import load_text

    require_model(model)
    text = load_text(source)
    if text.note:
        click.echo(f"mxharness: {text.note}; measuring on {text.label}", err=True)
    return load_model(model), text


def _print_results(results: list[Result], note: str) -> None:
    first = results[0]
    common.print_table(
        f"{first.model} on {first.text}: {first.protocol}, {first.windows} of {first.windows_available} windows, "
        f"{first.scored:,} tokens scored",
        ("weights", "run by", "activations", "perplexity", "nats per token", "tokens/s"),
        [
            (
                result.weights,
                f"{result.backend} ({result.arithmetic}, {result.device_class})",
                result.activations,
                f"{result.perplexity:.4f}",
                f"{result.mean_nll:.6f}",
                f"{result.tokens_per_second:.0f}",
            )
            for result in results
        ],
    )
    click.echo(f"text sha256 {first.text_sha256[:16]}, token ids sha256 {first.ids_sha256[:16]}")
    if note:
        click.echo(note)
