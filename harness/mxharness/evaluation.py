"""A model as lm-evaluation-harness takes one, so that its tasks run on the project's kernels.

The only module that imports lm_eval. Log likelihoods are summed in float64 from the kernels' logits, answers come
from GPTInferenceAdapter. Source: Gao et al., lm-evaluation-harness (10.5281/zenodo.12608602), `TemplateLM`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from mxharness.errors import Unavailable, UserError
from mxharness.model.decoder import runner
from mxharness.model.tokenizer import decode, encode

try:
    from lm_eval import evaluator
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise Unavailable("tasks need lm-evaluation-harness: pip install 'mxharness[eval]'") from error

if TYPE_CHECKING:
    from mxharness.model.checkpoint import Checkpoint
    from mxharness.model.generation import GPTInferenceAdapter

_MOST_NEW = 256
"""Tokens of an answer where a task names no limit."""


class EvaluatedModel(TemplateLM):  # type: ignore[misc]  # lm_eval ships no types
    """A checkpoint on the kernels; an input longer than its context loses its beginning."""

    def __init__(self, checkpoint: Checkpoint, adapter: GPTInferenceAdapter, batch: int = 1) -> None:
        """Adapter: loads the checkpoint's weights; batch: texts that are scored at once.

        UserError for a model without a tokenizer, or without a token that ends a text.
        """
        super().__init__()
        if checkpoint.vocabulary is None:
            raise UserError(f"{checkpoint.name} has no tokenizer, so no task can be asked of it")
        if not checkpoint.ends:
            raise UserError(f"{checkpoint.name} names no end-of-text token, which stands before a text without context")
        self._vocabulary, self._ends = checkpoint.vocabulary, checkpoint.ends
        adapter.load_weights_mxfp4(checkpoint)
        self._runner, self._adapter, self._batch = runner(adapter.decoder), adapter, batch

    @property
    def eot_token_id(self) -> int:
        """The end of a text, which is also what stands before one."""
        return self._ends[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids; nothing is ever added."""
        return [int(token) for token in encode(self._vocabulary, string)]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        """For each (.., context, continuation): log P(continuation) in nats, and whether it is the greedy one."""
        found: dict[int, tuple[float, bool]] = {}
        longest_first = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        with tqdm(total=len(requests), desc="likelihoods", unit="request", disable=disable_tqdm) as bar:
            for first in range(0, len(requests), self._batch):
                group = longest_first[first : first + self._batch]
                for i, scored in zip(group, self._score([requests[i][1:] for i in group]), strict=True):
                    found[i] = scored
                bar.update(len(group))
        return [found[i] for i in range(len(requests))]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        room = self._runner.config.context + 1
        for _, continuation in pairs:
            if not 0 < len(continuation) < room:
                raise UserError(f"a continuation of {len(continuation)} tokens; from 1 to {room - 1} can be scored")
        rows = [(context + continuation)[-room:] for context, continuation in pairs]
        length = max(len(row) for row in rows) - 1
        ids = torch.zeros(
            len(rows), length, dtype=torch.int64
        )  # what follows a row's end is seen by none of its tokens
        for i, row in enumerate(rows):
            ids[i, : len(row) - 1] = torch.tensor(row[:-1])
        with torch.inference_mode():
            states = self._runner.hidden_states(ids)
            scored = []
            for i, (row, (_, continuation)) in enumerate(zip(rows, pairs, strict=True)):
                end, count = len(row) - 1, len(continuation)
                logits = self._runner.logits(states[i, end - count : end].contiguous()).double().cpu()
                targets = torch.tensor(continuation)
                likelihood = -torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
                scored.append((float(likelihood), bool((logits.argmax(-1) == targets).all())))
        return scored

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log P(text) in nats, every token scored once, in windows of the context's length."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.eot_token_id, self._runner.config.context, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += likelihood
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each prompt, up to one of the request's stops, a token that ends a text, or its limit."""
        return [self._answer(*request.args) for request in tqdm(requests, desc="answers", disable=disable_tqdm)]

    def _answer(self, prompt: str, settings: dict[str, Any]) -> str:
        wanted = normalize_gen_kwargs(settings, default_max_gen_toks=_MOST_NEW)
        new, stops = int(wanted["max_gen_toks"]), wanted["until"]
        context = self._runner.config.context
        if not 0 < new < context:
            raise UserError(f"an answer of {new} tokens does not fit a context of {context}")
        tokens = (self.tok_encode(prompt) or [self.eot_token_id])[new - context :]
        state = self._adapter.allocate_state(len(tokens) + new)
        try:
            self._adapter.prefill(tokens, state)
            answer: list[int] = []
            while len(answer) < new:
                [token] = self._adapter.decode_next_token(
                    state,
                    float(wanted.get("temperature", 0.0)),
                    seed=int(wanted.get("seed", 0)),
                    top_k=int(wanted.get("top_k", 0)),
                    top_p=float(wanted.get("top_p", 1.0)),
                )
                if token in self._ends:
                    break
                answer.append(token)
                if any(stop in decode(self._vocabulary, answer) for stop in stops):
                    break
        finally:
            self._adapter.free_state(state)
        text = decode(self._vocabulary, answer)
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


@dataclass(frozen=True)
class Score:
    """One number of one task."""

    task: str
    metric: str
    """lm-evaluation-harness' name, with its filter where that is not "none": "acc", "exact_match,strict-match"."""
    value: float
    stderr: float | None
    samples: int


def evaluate(
    model: EvaluatedModel,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
) -> list[Score]:
    """Every metric of the tasks called `tasks`; include: a folder of more task files.

    shots: solved examples before each question, the task's own number by default. limit: documents of each task.
    Raises UserError for a task that does not exist, and for data that cannot be had.
    """
    manager = _manager(tasks, include)
    try:
        found = evaluator.simple_evaluate(
            model, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=1000,
            log_samples=False,
        )  # fmt: skip
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(f"a task's data cannot be had: {error}") from error
    return [score for task in sorted(found["results"]) for score in _scores(found, task)]


def _manager(tasks: Sequence[str], include: Path | None) -> TaskManager:
    """What finds the tasks: in `include` alone where they all are, as reading all others takes seconds."""
    if include is not None:
        own = TaskManager(include_path=str(include), include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=None if include is None else str(include))
    check_names(tasks, manager.all_tasks)
    return manager


def check_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    """UserError, with what is near, for a task that is not known."""
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, 3)
            hint = f"; near ones are {', '.join(near)}" if near else "; --include names a folder of task files"
            raise UserError(f"no task '{task}' among {len(known):,}{hint}")


def _scores(found: dict[str, Any], task: str) -> list[Score]:
    results = found["results"][task]
    scores = []
    for key, value in results.items():
        metric, _, which = key.partition(",")
        if not isinstance(value, (int, float)) or not which or metric.endswith("_stderr"):
            continue
        error = results.get(f"{metric}_stderr,{which}")
        scores.append(
            Score(
                task=task,
                metric=metric if which == "none" else key,
                value=float(value),
                stderr=float(error) if isinstance(error, (int, float)) else None,
                samples=int(found["n-samples"][task]["effective"]),
            )
        )
    return scores
