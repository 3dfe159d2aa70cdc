"""The row of a run that says what the kernels do to a whole model: its perplexity, and the gate's verdict on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mxharness.commands.perplexity import ACTIVATIONS, load, original_of
from mxharness.errors import KernelFailure
from mxharness.protocols import DEFAULT_PROTOCOL, DEFAULT_WINDOWS
from mxharness.repeat import of_perplexity

if TYPE_CHECKING:
    from mxharness.device import Device
    from mxharness.document import Labelled
    from mxharness.gate import judged
    from mxharness.perplexity import Reading
    from mxharness.text import Text


def row_of_run(model: str, device: str, windows: int | None) -> Labelled:
    """The perplexity row of a run record: `model` three ways on the default text, judged by limit and gate.

    windows: None for the default number. A gate that these windows leave open is no failure here: `mxharness gate`
    reads on until it is closed.

    Raises UserError where the model or what reads it cannot be had.
    """
    from mxharness import perplexity as measuring
    from mxharness.device import open_device
    from mxharness.gate import judged
    from mxharness.gate.verdict import Failed
    from mxharness.protocols import select

    opened = open_device(device)
    checkpoint, words = load(model, "auto")
    reading = measuring.read(checkpoint, words)
    spans = select(reading.available, windows or DEFAULT_WINDOWS)
    repeated = {"command": of_perplexity(opened.name, model, len(spans))}
    try:
        found = judged.on_windows(
            checkpoint, reading, opened, ACTIVATIONS, spans, original=original_of(model), progress=True
        )
    except (Failed, KernelFailure) as error:
        return {
            "name": checkpoint.name,
            "text": words.label,
            "protocol": DEFAULT_PROTOCOL,
            "weights": "mxfp4",
            "activations": ACTIVATIONS,
            "perplexity": math.nan,
            "passed": False,
            "message": str(error),
            **repeated,
        }
    return {**_row(found, reading, words, opened), **repeated}


def _row(found: judged.Measured, reading: Reading, words: Text, device: Device) -> Labelled:
    """One row of a run record. Its strings and integers fix the experiment; a baseline compares them exactly."""
    import numpy as np

    from mxharness import perplexity as measuring
    from mxharness.agreement import LIMITS
    from mxharness.gate.statistics import clustered
    from mxharness.gate.verdict import percent

    columns = found.references.columns
    original, decoded = (float(columns[name].mean(dtype=np.float64)) for name in ("original", "nll"))
    kernels = clustered(
        np.array([float(window.candidate.sum(dtype=np.float64)) for window in found.windows]),
        np.array([float(len(window.candidate)) for window in found.windows]),
    )
    place = f"{device.arithmetic} arithmetic on {device.device_class}"
    own = kernels.mean
    judgement, limit = found.judgement, LIMITS[ACTIVATIONS]
    within = abs(math.expm1(min(own - decoded, 1.0))) <= limit.relative
    note = f" [{words.note}]" if words.note else ""
    return {
        "name": reading.model,
        "text": reading.text,
        "protocol": f"{reading.protocol}, {len(found.windows)} of {len(reading.available)} windows",
        "weights": found.references.fixed["weights"],
        "activations": ACTIVATIONS,
        "perplexity": measuring.perplexity_of(own),
        "perplexity_lower": measuring.perplexity_of(kernels.lower),
        "perplexity_upper": measuring.perplexity_of(kernels.upper),
        "change": math.expm1(min(judgement.change.mean, 700.0)),
        "change_lower": math.expm1(min(judgement.change.lower, 700.0)),
        "change_upper": math.expm1(min(judgement.change.upper, 700.0)),
        "perplexity_decoded_float32": measuring.perplexity_of(decoded),
        "perplexity_original_float32": measuring.perplexity_of(original),
        "kl": judgement.divergence.mean,
        "kl_lower": max(judgement.divergence.lower, 0.0),
        "kl_upper": judgement.divergence.upper,
        "same_word": judgement.same,
        "gate": judgement.verdict,
        "tokens_scored": kernels.tokens,
        "tokens_per_second": sum(span.stop - span.start for span in found.references.spans) / found.seconds,
        "model_sha256": reading.model_sha256,
        "text_sha256": reading.text_sha256,
        "token_ids_sha256": reading.ids_sha256,
        "passed": within and judgement.verdict not in {"fail", "drift"},
        "message": f"perplexity through kernels {measuring.perplexity_of(own):.4f}, float32 on the decoded weights "
        f"{measuring.perplexity_of(decoded):.4f}: {'within' if within else 'past'} {limit.relative:g} ({limit.why}); "
        f"gate: {judgement.verdict}, {judgement.reason}; the format itself costs {percent(decoded - original)} against "
        f"float32 {measuring.perplexity_of(original):.4f}; {place}{note}",
    }
