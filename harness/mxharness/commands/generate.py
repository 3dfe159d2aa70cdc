"""`mxharness generate`: a model goes on from a prompt, through the kernels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from mxharness.commands import common
from mxharness.errors import KernelFailure, UserError

if TYPE_CHECKING:
    from mxharness.model.decoder import Activations


@click.command()
@click.argument("prompt")
@common.model_option
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="New tokens at most.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0: always the most likely token.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draws.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="Of so many tokens; 0: of all.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Of the fewest tokens that have this probability together.",
)
@click.option(
    "--activations",
    type=click.Choice(["bf16", "fp16"]),
    default="bf16",
    show_default=True,
    help="What lies between two kernels.",
)
@click.option("--kv", type=click.Choice(["16-bit", "mxfp4"]), default="16-bit", show_default=True, help="The KV cache.")
@common.device_option
@common.json_option
def generate(
    *,
    prompt: str,
    model: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    top_k: int,
    top_p: float,
    activations: Activations,
    kv: str,
    device: str,
    as_json: bool,
) -> int:
    """Continue PROMPT with a model whose weights are MXFP4.

    Text goes to standard output as it comes, times and memory to standard error. The same arguments give the same text,
    on every device. It ends after --max-tokens or where the model ends it.
    """
    from mxharness.device import open_device
    from mxharness.model import tokenizer
    from mxharness.model.generation import GPTInferenceAdapter
    from mxharness.model.load import load

    adapter = GPTInferenceAdapter(open_device(device), activations)
    checkpoint = load(model)
    words = checkpoint.vocabulary
    ids = tokenizer.encode(words, prompt).tolist()
    context = checkpoint.config.context
    if len(ids) + max_tokens > context:
        raise UserError(
            f"a prompt of {len(ids)} tokens and {max_tokens} new ones do not fit the model's context of {context}"
        )
    adapter.load_weights_mxfp4(checkpoint)
    state = adapter.allocate_state(len(ids) + max_tokens, kv="mxfp4" if kv == "mxfp4" else None)
    new: list[int] = []

    def draw() -> Iterator[int]:
        while len(new) < max_tokens:
            token = adapter.decode_next_token(state, temperature, seed, top_k, top_p)[0]
            if token in checkpoint.ends:
                return
            new.append(token)
            yield token

    pieces = []
    start = time.perf_counter()
    try:
        adapter.prefill(ids, state)
        adapter.device.synchronize()
        ready = time.perf_counter()
        for piece in tokenizer.stream(words, draw()):
            pieces.append(piece)
            if not as_json:
                click.echo(piece, nl=False)
    except KernelFailure as error:
        if as_json:
            common.print_json({"passed": False, "message": str(error)})
        else:
            click.echo(f"FAIL: {error}")
        return common.MISMATCH
    seconds = time.perf_counter() - ready
    usage = adapter.get_vram_usage()
    told: dict[str, Any] = {
        "model": checkpoint.name,
        "model_sha256": checkpoint.sha256,
        "weights": adapter.decoder.words,
        "activations": activations,
        "device_class": adapter.device.device_class,
        "prompt_tokens": len(ids),
        "new_tokens": len(new),
        "prefill_seconds": ready - start,
        "decode_seconds": seconds,
        "weights_bytes": usage.weights,
        "kv_cache_bytes": usage.kv_cache,
        "peak_activations_bytes": usage.peak_activations,
    }
    if as_json:
        common.print_json({"text": "".join(pieces), "tokens": new, **told})
        return common.PASS
    click.echo()
    click.echo(
        f"{checkpoint.name} on {adapter.device.device_class}: {len(ids)} tokens read at "
        f"{len(ids) / (ready - start):.1f} tokens/s, {len(new)} written at {len(new) / seconds:.1f} tokens/s; "
        f"{usage.peak / 1e6:,.1f} MB: weights {usage.weights / 1e6:,.1f}, KV cache {usage.kv_cache / 1e6:,.1f}, "
        f"activations {usage.peak_activations / 1e6:,.1f}",
        err=True,
    )
    return common.PASS
