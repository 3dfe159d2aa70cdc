"""`mxharness fetch` and `mxharness perplexity`: get a model, and measure it in float32 and in MXFP4."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from mxharness.commands import common
from mxharness.errors import KernelFailure, UserError
from mxharness.protocols import DEFAULT_PROTOCOL, DEFAULT_WINDOWS, PROTOCOLS

if TYPE_CHECKING:
    from mxharness.document import Labelled
    from mxharness.model.backend import Activations
    from mxharness.model.gguf import ModelFile
    from mxharness.perplexity import Result, Triple
    from mxharness.text import Text

Weights = Literal["all", "float32", "decoded", "mxfp4"]

_ACTIVATIONS: Activations = "fp16"
_ALL_WINDOWS = "all"


class _Windows(click.ParamType[int | None]):
    """A count of windows, or "all", which is None."""

    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:  # noqa: ANN401  click's own signature
        """Turn what was typed into a count."""
        if value is None or value == _ALL_WINDOWS:
            return None
        if isinstance(value, str) and not value.lstrip("-").isdecimal():
            self.fail(f"'{value}' is neither a whole number nor '{_ALL_WINDOWS}'", param, ctx)
        return click.IntRange(min=1).convert(value, param, ctx)


@click.command()
@click.argument("name")
@common.json_option
def fetch(name: str, as_json: bool) -> int:
    """Get a model into the cache, checked.

    NAME is "smollm2": SmolLM2-135M-Instruct, 98 MB. Prints where the file lies.
    """
    from mxharness import fetch as fetching

    path = fetching.fetch(name, progress=not as_json)
    if as_json:
        wanted = fetching.artefact(name)
        common.print_json({"name": name, "path": path, "sha256": wanted.file.sha256, "licence": wanted.licence})
    else:
        click.echo(str(path))
    return common.PASS


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="A model that `fetch` knows, or a GGUF file.")
@click.option(
    "--text",
    default="auto",
    show_default=True,
    help='"wikitext-2", "default" (embedded), "auto" (the first, else the second), or a file.',
)
@click.option(
    "--protocol",
    type=click.Choice(tuple(PROTOCOLS)),
    default=DEFAULT_PROTOCOL,
    show_default=True,
    help="Which windows are read and which of their tokens are scored.",
)
@click.option(
    "--windows",
    type=_Windows(),
    default=DEFAULT_WINDOWS,
    show_default=True,
    help='How many evenly spaced windows, or "all".',
)
@click.option("--limit", type=click.IntRange(min=1), metavar="TOKENS", help="Use the text's first TOKENS tokens only.")
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
    default=_ACTIVATIONS,
    show_default=True,
    help="What a linear layer's input is rounded to before the kernels.",
)
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
    device: str,
    fast: bool,
    as_json: bool,
) -> int:
    """Measure a model in float32 and in MXFP4.

    Exits 1 where the kernels move the perplexity by more than the rounding of activations can.
    """
    from mxharness import perplexity as measuring
    from mxharness.device import open_device
    from mxharness.model import backend as backends

    opened = open_device(device, fast=fast)
    file, words = _load(model, text)
    where = opened.torch_device
    triple = None
    try:
        if weights == "all":
            triple = measuring.triple(
                file, words, opened, protocol, activations=activations, windows=windows, tokens=limit, progress=True
            )
            results = [triple.original, triple.decoded, triple.kernels]
        else:
            choices: dict[str, Callable[[], Any]] = {
                "float32": lambda: backends.float32(where),
                "decoded": lambda: backends.decoded(where),
                "mxfp4": lambda: backends.kernels(opened, activations),
            }
            backend = choices[weights]()
            results = [measuring.measure(file, words, backend, protocol, windows=windows, tokens=limit, progress=True)]
    except (measuring.NotFiniteError, KernelFailure) as error:
        if as_json:
            common.print_json({"passed": False, "message": str(error)})
        else:
            click.echo(f"FAIL: {error}")
        return common.MISMATCH
    passed = triple is None or triple.passed
    document = triple.to_json() if triple else results[0].to_json()
    if as_json:
        common.print_json({**document, "note": words.note})
    else:
        _print_results(results, words.note)
        if triple:
            click.echo(f"{'PASS' if passed else 'FAIL'}: {triple.message}")
    return common.PASS if passed else common.MISMATCH


def row_of_run(model: str, device: str, windows: int | None) -> Labelled:
    """The perplexity row of a run record: `model` three ways on the default text, judged.

    windows: None for the default number.
    Raises UserError where the model or what reads it cannot be had.
    """
    from mxharness import perplexity as measuring
    from mxharness.device import open_device

    opened = open_device(device)
    file, words = _load(model, "auto")
    try:
        triple = measuring.triple(
            file, words, opened, activations=_ACTIVATIONS, windows=windows or DEFAULT_WINDOWS, progress=True
        )
    except (measuring.NotFiniteError, KernelFailure) as error:
        return {
            "name": file.name,
            "text": words.label,
            "protocol": DEFAULT_PROTOCOL,
            "weights": "mxfp4",
            "activations": _ACTIVATIONS,
            "perplexity": math.nan,
            "passed": False,
            "message": str(error),
        }
    return _row(triple, words)


def require_model(model: str) -> None:
    """Raise UserError where `model` is neither a name that `fetch` knows nor a .gguf file that is there."""
    from mxharness import fetch as fetching

    if model in fetching.ARTEFACTS:
        return
    if Path(model).suffix != ".gguf":
        raise UserError(f"no model '{model}'; there are {', '.join(fetching.ARTEFACTS)} and the path of a .gguf file")
    if not Path(model).is_file():
        raise UserError(f"no model file {model}; `mxharness fetch smollm2` gets one")


def _load(model: str, source: str) -> tuple[ModelFile, Text]:
    """The model called `model`, fetched if need be, or the GGUF file of that path; and a text.

    Raises UserError; for a name that does not exist, before anything is downloaded.
    """
    from mxharness import fetch as fetching
    from mxharness.model import gguf
    from mxharness.text import load_text

    require_model(model)
    text = load_text(source)
    if text.note:
        click.echo(f"mxharness: {text.note}; measuring on {text.label}", err=True)
    return gguf.load(fetching.fetch(model) if model in fetching.ARTEFACTS else Path(model)), text


def _row(triple: Triple, words: Text) -> Labelled:
    """One row of a run record. Its strings and integers fix the experiment; a baseline compares them exactly."""
    result = triple.kernels
    cost = f"the format itself costs {triple.cost.relative:+.1%} against float32 {triple.original.perplexity:.4f}"
    note = f" [{words.note}]" if words.note else ""
    return {
        "name": result.model,
        "text": result.text,
        "protocol": f"{result.protocol}, {result.windows} of {result.windows_available} windows",
        "weights": result.weights,
        "activations": result.activations,
        "perplexity": result.perplexity,
        "perplexity_decoded_float32": triple.decoded.perplexity,
        "perplexity_original_float32": triple.original.perplexity,
        "tokens_scored": result.scored,
        "tokens_per_second": result.tokens_per_second,
        "model_sha256": result.model_sha256,
        "text_sha256": result.text_sha256,
        "token_ids_sha256": result.ids_sha256,
        "passed": triple.passed,
        "message": f"{triple.message}; {cost}; {result.arithmetic} arithmetic on {result.device_class}{note}",
    }


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
