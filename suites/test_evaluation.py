"""Tasks of lm-evaluation-harness on the kernels: its numbers against likelihoods written out, on a toy model."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from mxharness.device import Device, open_device
from mxharness.errors import UserError
from mxharness.model import decoder, toy
from mxharness.model.generation import GPTInferenceAdapter
from mxharness.model.tokenizer import decode

CHECKPOINT = replace(toy.checkpoint(toy.LLAMA), ends=(258,))
END = CHECKPOINT.ends[0]
TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def device() -> Device:
    return open_device("host")


@pytest.fixture(scope="module")
def evaluation() -> ModuleType:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed; not run: tasks of lm-evaluation-harness")
    return importlib.import_module("mxharness.evaluation")


@pytest.fixture(scope="module")
def model(evaluation, device):
    return evaluation.EvaluatedModel(CHECKPOINT, GPTInferenceAdapter(device), batch=3)


def logits_of(device: Device, ids: list[int]) -> torch.Tensor:
    """(T, vocabulary) float64, from the decoder itself, one sequence alone."""
    runner = decoder.kernels(CHECKPOINT, device, "bf16")
    return runner.logits(runner.hidden_states(torch.tensor([ids]))[0]).double()


def likelihood(device: Device, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logits = logits_of(device, context + continuation[:-1])[-len(continuation) :]
    log_p = logits.log_softmax(-1)
    greedy = logits.argmax(-1).tolist() == continuation
    return sum(float(log_p[i, token]) for i, token in enumerate(continuation)), greedy


def requests(*arguments: object) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=one) for one in arguments]


def test_likelihoods_in_batches_are_those_of_each_text_alone(model, device):
    pairs = [("In 2004, 1", " of"), ("b", "ytes were"), ("", "one"), ("th", "e")]
    for (context, continuation), found in zip(
        pairs, model.loglikelihood(requests(*pairs), disable_tqdm=True), strict=True
    ):
        want = likelihood(device, model.tok_encode(context) or [END], model.tok_encode(continuation))
        assert found[0] == pytest.approx(want[0], rel=1e-12)
        assert found[1] == want[1]


def test_a_greedy_continuation_says_so(model, device):
    context = model.tok_encode("abc")
    best = int(logits_of(device, context)[-1].argmax())
    other = (best + 1) % 256
    pairs = [(None, context, ids) for ids in ([best], [other], [best, best], [best, other])]
    found = model._loglikelihood_tokens(pairs, disable_tqdm=True)
    second = int(logits_of(device, [*context, best])[-1].argmax())
    assert [greedy for _, greedy in found] == [True, False, second == best, second == other]
    assert found[0][0] > found[1][0]


def test_a_text_longer_than_the_context_is_scored_once_per_token(model, device):
    text = "naïve bytes, " * 16
    ids = model.tok_encode(text)
    assert len(ids) > CHECKPOINT.config.context
    cut = CHECKPOINT.config.context
    want = likelihood(device, [END], ids[:cut])[0]
    rest = len(ids) - cut  # a second window sees a whole context and scores what is left
    want += likelihood(device, ids[len(ids) - cut - 1 : len(ids) - rest], ids[-rest:])[0]
    assert model.loglikelihood_rolling(requests((text,)), disable_tqdm=True)[0] == pytest.approx(want, rel=1e-12)


def test_answers_are_greedy_and_end_at_a_stop(evaluation, model, device):
    ids = model.tok_encode("abc")
    for _ in range(6):
        ids.append(int(logits_of(device, ids)[-1].argmax()))
    free = decode(CHECKPOINT.vocabulary, ids[3:])
    stop = free[2]
    settings = ({"max_gen_toks": 6}, {"max_gen_toks": 6, "until": [stop]})
    answers = model.generate_until(requests(*(("abc", one) for one in settings)), disable_tqdm=True)
    assert answers == [free, free[: free.index(stop)]]
    ended = evaluation.EvaluatedModel(replace(CHECKPOINT, ends=(ids[5],)), GPTInferenceAdapter(device))
    until_end = ids[3 : ids.index(ids[5], 3)]
    assert ended.generate_until(requests(("abc", settings[0])), disable_tqdm=True) == [
        decode(CHECKPOINT.vocabulary, until_end)
    ]


def test_a_prompt_longer_than_the_context_loses_its_beginning(model):
    prompt, settings = "bytes, " * 40, {"max_gen_toks": 3}
    kept = decode(CHECKPOINT.vocabulary, model.tok_encode(prompt)[3 - CHECKPOINT.config.context :])
    assert (
        model.generate_until(requests((prompt, settings), (kept, settings)), disable_tqdm=True)[0]
        == (model.generate_until(requests((kept, settings)), disable_tqdm=True)[0])
    )


def test_a_task_of_ones_own_is_measured(evaluation, model, device, tmp_path):
    rows = []
    for text in ("one ", "two ", "three ", "four "):
        choices = ["a", "b", "z"]
        scores = [likelihood(device, model.tok_encode(text.rstrip()), model.tok_encode(" " + c))[0] for c in choices]
        best = max(range(3), key=scores.__getitem__)
        rows.append({"text": text, "choices": choices, "answer": best if text != "four " else (best + 1) % 3})
    data = tmp_path / "letters.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "letters.yaml").write_text(TASK.format(data=data))
    scores = evaluation.evaluate(model, ["letters"], include=tmp_path)
    assert [(s.task, s.metric, s.value, s.samples) for s in scores] == [("letters", "acc", 0.75, 4)]
    assert scores[0].stderr == pytest.approx((0.75 * 0.25 / 3) ** 0.5)


def test_what_cannot_be_asked_is_said(evaluation, model, device, tmp_path):
    with pytest.raises(UserError, match="no task 'hellaswagg' among 2; near ones are hellaswag"):
        evaluation.check_names(["hellaswagg"], ["arc", "hellaswag"])
    with pytest.raises(UserError, match="no task 'x' among 1; --include names a folder"):
        evaluation.check_names(["x"], ["arc"])
    with pytest.raises(UserError, match="a continuation of 0 tokens"):
        model._loglikelihood_tokens([(None, [1], [])], disable_tqdm=True)
    with pytest.raises(UserError, match="an answer of 500 tokens does not fit a context of 128"):
        model.generate_until(requests(("abc", {"max_gen_toks": 500})), disable_tqdm=True)
    mute = replace(CHECKPOINT, name="mute", vocabulary=None)
    with pytest.raises(UserError, match="mute has no tokenizer"):
        evaluation.EvaluatedModel(mute, GPTInferenceAdapter(device))
    (tmp_path / "lost.yaml").write_text(TASK.format(data=tmp_path / "lost.jsonl").replace("letters", "lost"))
    with pytest.raises(UserError, match="data cannot be had"):
        evaluation.evaluate(model, ["lost"], include=tmp_path)
