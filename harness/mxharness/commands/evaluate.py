"""`mxharness evaluate`: task accuracy through the kernels, by lm-evaluation-harness."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mxharness.commands import common

if TYPE_CHECKING:
    from mxharness.model.decoder import Activations


@click.command()
@click.argument("tasks", nargs=-1, required=True)
@common.model_option
@click.option(
    "--include",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder of task files besides lm-evaluation-harness' own.",
)
@click.option("--shots", type=click.IntRange(min=0), help="Solved examples before each question.")
@click.option("--limit", type=click.IntRange(min=1), help="Only so many questions of each task.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Texts scored at once.")
@click.option("--activations", type=click.Choice(["fp16", "bf16"]), default="bf16", show_default=True)
@common.device_option
@common.json_option
def evaluate(
    tasks: tuple[str, ...],
    *,
    model: str,
    include: Path | None,
    shots: int | None,
    limit: int | None,
    batch: int,
    activations: Activations,
    device: str,
    as_json: bool,
) -> int:
    """Measure a model's accuracy at TASKS of lm-evaluation-harness, its weights in MXFP4 and on the kernels.

    Needs `pip install 'mxharness[eval]'` and each task's data: on the hub, or in files that a task of your own names.
    """
    from mxharness import evaluation
    from mxharness.device import open_device
    from mxharness.model.generation import GPTInferenceAdapter
    from mxharness.model.load import load

    checkpoint = load(model)
    adapter = GPTInferenceAdapter(open_device(device), activations)
    asked = evaluation.EvaluatedModel(checkpoint, adapter, batch)
    scores = evaluation.evaluate(asked, tasks, include=include, shots=shots, limit=limit)
    words = {"model": checkpoint.name, "device": adapter.device.device_class, "activations": activations}
    if as_json:
        common.print_json({**words, "scores": [asdict(score) for score in scores]})
    else:
        common.print_table(
            f"{checkpoint.name} in MXFP4, {activations} activations, kernels on {adapter.device.device_class}",
            ("task", "metric", "value", "standard error", "questions"),
            [
                (s.task, s.metric, f"{s.value:.4f}", "" if s.stderr is None else f"{s.stderr:.4f}", s.samples)
                for s in scores
            ],
        )
    return common.PASS
