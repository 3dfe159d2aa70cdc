"""A toy model that generates, and one that cannot: what tests of generation share."""

from __future__ import annotations

from dataclasses import replace

import torch
from mxharness.model import toy
from mxharness.model.checkpoint import Stored
from mxharness.model.generation import GPTInferenceAdapter

PROMPTS = ([72, 101, 108, 108, 111], [32, 116, 104], [200])


def loaded(device, checkpoint=None, activations="bf16", *, graphs=True):
    """An adapter that holds a checkpoint: the toy llama where none is given."""
    adapter = GPTInferenceAdapter(device, activations, graphs=graphs)
    adapter.load_weights_mxfp4(toy.checkpoint() if checkpoint is None else checkpoint)
    return adapter


def generate(adapter, prompts, count, kv=None, settings=None):
    """A list of new tokens for every prompt."""
    state = adapter.allocate_state(64, len(prompts), kv)
    adapter.prefill(prompts, state)
    tokens = [adapter.decode_next_token(state, **(settings or {})) for _ in range(count)]
    adapter.free_state(state)
    return [list(row) for row in zip(*tokens, strict=True)]


def not_a_number():
    """The toy with a last norm of NaN."""
    checkpoint = toy.checkpoint()
    norm = Stored((64,), "F32", lambda: torch.full((64,), torch.nan))
    return replace(checkpoint, tensors={**checkpoint.tensors, "final_norm": norm})
