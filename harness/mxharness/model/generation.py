"""Text token by token: weights, a state per batch of sequences, prefill, decode; the sources' adapter in Python.

A state holds the KV cache and, between calls, where each sequence stands. Decoding draws a token from the last states
first and feeds it back at the next call, so that no token is computed that nobody asked for. On a GPU a decode step is
one CUDA graph once its settings have repeated. Tokens do not depend on the batch, on how a prompt was cut, nor on the
graph. Source of the names: the user's GPTInferenceAdapter.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from mxharness.device import Device, open_device
from mxharness.device.meter import Meter
from mxharness.errors import KernelFailure, UserError
from mxharness.functional.common import integer
from mxharness.functional.lm_head import lm_head_greedy, lm_head_sample
from mxharness.model.checkpoint import Checkpoint
from mxharness.model.decoder import Activations, Decoder, build, caches, step
from mxharness.model.load import load
from mxharness.model.runner import check_ids

if TYPE_CHECKING:
    from mxharness.functional.kv_cache import KVCache

PREFILL_ROWS = 2048
"""Tokens of all sequences together that a prefill computes at once, which bounds its activations."""
_MOST_SEEDS = 1 << 64
_NOT_DRAWN = -2
"""No kernel gives this id."""


class VramUsage(NamedTuple):
    """Bytes, by what they are for."""

    weights: int
    """MXFP4 codes and scales, norms, biases, sinks, routers and the table of angles."""
    kv_cache: int
    """Of all states that are allocated."""
    activations: int
    """What states hold between calls: inputs of a step and the last token's results."""
    peak_activations: int
    """The most that a step needed so far, `activations` included."""

    @property
    def total(self) -> int:
        """Weights, KV cache and activations: what the device reports as allocated."""
        return self.weights + self.kv_cache + self.activations

    @property
    def peak(self) -> int:
        """The most that was allocated at once since the weights were loaded."""
        return self.weights + self.kv_cache + self.peak_activations


class Sampling(NamedTuple):
    """How a token is drawn, as `lm_head_sample` takes it."""

    temperature: float
    top_k: int
    top_p: float


@dataclass(frozen=True, eq=False)
class Captured:
    """A decode step as a CUDA graph."""

    graph: torch.cuda.CUDAGraph
    sampling: Sampling
    last: torch.Tensor
    """Where a replay leaves the states (B, hidden)."""


@dataclass(eq=False, repr=False)
class InferenceState:
    """A batch of sequences; `GPTInferenceAdapter.allocate_state` makes one, the adapter's methods change it."""

    decoder: Decoder
    caches: tuple[KVCache, ...]
    max_tokens: int
    lengths: list[int]
    """Tokens of each sequence in the cache."""
    positions: torch.Tensor
    """(B) int32, the same on the device."""
    ids: torch.Tensor
    """(B) int64: the tokens drawn last."""
    uniforms: torch.Tensor
    """(B) float32: what they were drawn by."""
    last: torch.Tensor | None = None
    """(B, hidden): states of each sequence's last token in the cache; None before a prefill."""
    drawn: bool = False
    """Whether `ids` follow the tokens in the cache, and are not among them yet."""
    repeated: Sampling | None = None
    """What the last step drew by, without a graph."""
    captured: Captured | None = None
    freed: bool = False

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.lengths)


class GPTInferenceAdapter:
    """A model that generates. Every method raises UserError, in one sentence, where it is called out of order."""

    def __init__(
        self,
        device: Device | None = None,
        activations: Activations = "bf16",
        *,
        scale_rule: str = "floor",
        tie_rule: str = "even",
        graphs: bool = True,
    ) -> None:
        """Device: from `open_device`, the best there is by default; graphs: whether a GPU's steps become CUDA graphs.

        The rules are for weights that a file does not hold in MXFP4.
        """
        self.device = device or open_device()
        self._activations = activations
        self._rules = (scale_rule, tie_rule)
        self._graphs = graphs and self.device.torch_device.type == "cuda"
        self._meter = Meter(self.device)
        self._decoder: Decoder | None = None
        self._states: weakref.WeakSet[InferenceState] = weakref.WeakSet()

    def load_weights_mxfp4(self, model: str | Path | Checkpoint) -> None:
        """Move a model to the device; it replaces the one before, whose states are freed.

        model: what `load` takes, a name or the path of a file or folder, or a Checkpoint.
        """
        checkpoint = model if isinstance(model, Checkpoint) else load(model)
        for state in list(self._states):
            self.free_state(state)
        self._decoder = None  # before the next one needs its room
        self._meter = Meter(self.device)
        self._decoder = build(checkpoint, self.device, self._activations, *self._rules)

    @property
    def decoder(self) -> Decoder:
        """The model. UserError before one is loaded."""
        if self._decoder is None:
            raise UserError("no model is loaded; load_weights_mxfp4 loads one")
        return self._decoder

    def get_vram_usage(self) -> VramUsage:
        """What the model and its states occupy on the device now, and the most that activations occupied."""
        kv = sum(cache.nbytes for state in self._states for cache in state.caches)
        return VramUsage(self.decoder.nbytes, kv, self._meter.held, self._meter.peak)

    def allocate_state(self, max_tokens: int, batch: int = 1, kv: str | None = None) -> InferenceState:
        """Room for `batch` sequences of up to max_tokens tokens, prompt included.

        kv: "bf16" or "fp16", which must be the activations' (default), or "mxfp4".
        """
        decoder, max_tokens, batch = self.decoder, integer(max_tokens, "max_tokens"), integer(batch, "batch")
        if not 0 < max_tokens <= decoder.config.context:
            raise UserError(
                f"max_tokens must be from 1 to the model's context {decoder.config.context}, not {max_tokens}"
            )
        if batch < 1:
            raise UserError(f"a batch has at least one sequence, not {batch}")
        state = InferenceState(
            decoder=decoder,
            caches=caches(decoder, batch, max_tokens, kv),
            max_tokens=max_tokens,
            lengths=[0] * batch,
            positions=self._meter.upload(torch.zeros(batch, dtype=torch.int32)),
            ids=self._meter.upload(torch.zeros(batch, dtype=torch.int64)),
            uniforms=self._meter.upload(torch.zeros(batch)),
        )
        self._states.add(state)
        return state

    def prefill(self, tokens: Sequence[int] | Sequence[Sequence[int]], state: InferenceState) -> None:
        """Append tokens, one list for each sequence, or one list where there is one sequence.

        Tokens that were drawn last stand before them. What has a model's context behind it may be continued: a prefill
        can follow another one or a decode.
        """
        decoder = self._running(state)
        prompts = self._prompts(tokens, state)
        for b, (prompt, length) in enumerate(zip(prompts, state.lengths, strict=True)):
            if length + len(prompt) > state.max_tokens:
                raise UserError(
                    f"sequence {b} would have {length + len(prompt)} tokens, the state has room for {state.max_tokens}"
                )
        alike = len({len(prompt) for prompt in prompts}) == 1
        groups = [slice(0, state.batch)] if alike else [slice(b, b + 1) for b in range(state.batch)]
        last = self._meter.empty((state.batch, decoder.config.hidden), decoder.dtype)
        for group in groups:
            last[group] = self._feed(decoder, state, group, prompts[group])
        state.last = last
        state.lengths = [length + len(prompt) for prompt, length in zip(prompts, state.lengths, strict=True)]
        state.positions.copy_(torch.tensor(state.lengths, dtype=torch.int32))
        state.drawn = False

    def decode_next_token(
        self,
        state: InferenceState,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> list[int]:
        """The next token of each sequence: the most likely one at temperature 0, else drawn as `lm_head_sample` does.

        The uniform comes from the seed and the token's position alone, whatever else is in the batch: equal sequences
        go on equally unless each has a seed of its own. Raises KernelFailure where a model's logits are NaN.
        """
        self._running(state)
        if state.last is None:
            raise UserError("nothing to continue: prefill gives a state its first tokens")
        if state.drawn and max(state.lengths) >= state.max_tokens:
            raise UserError(f"the state has room for {state.max_tokens} tokens and is full; allocate a larger one")
        sampling = Sampling(temperature, top_k, top_p)
        if temperature != 0:
            state.uniforms.copy_(_uniforms(seed, [length + state.drawn for length in state.lengths]))
        if not state.drawn:
            state.ids.copy_(self._draw(state, state.last, sampling))
        elif state.captured and state.captured.sampling == sampling:
            state.captured.graph.replay()
            state.last = state.captured.last
        else:
            state.last, _ = self._advance(state, sampling)
            again = state.repeated == sampling
            state.repeated = sampling
            if self._graphs and again:  # the next steps will likely draw by the same
                state.captured = self._capture(state, sampling)
        state.lengths = [length + state.drawn for length in state.lengths]
        ids = state.ids.tolist()
        if min(ids) < 0:
            if _NOT_DRAWN in ids:
                raise KernelFailure("the CUDA graph did not capture the kernels: it drew no token")
            raise KernelFailure(f"the logits of sequence {int(np.argmin(ids))} hold NaN; fp16 ends at 65504, try bf16")
        state.drawn = True
        return [int(token) for token in ids]

    def free_state(self, state: InferenceState) -> None:
        """Give a state's memory back; it cannot be used any more. Idempotent."""
        self._states.discard(state)
        state.freed = True
        state.captured = state.last = None
        state.caches = ()
        state.positions = state.ids = state.uniforms = torch.empty(0)

    def _running(self, state: InferenceState) -> Decoder:
        """The decoder that counts what it allocates. UserError for a state that is of no use here."""
        if state.freed:
            raise UserError("this state was freed; allocate_state makes another")
        if state.decoder is not self.decoder:
            raise UserError("this state belongs to another model; allocate_state makes one for this")
        return replace(state.decoder, device=self._meter)

    def _prompts(self, tokens: Sequence[int] | Sequence[Sequence[int]], state: InferenceState) -> list[list[int]]:
        """Checked tokens for every sequence, those drawn last before them."""
        nested = [row for row in tokens if isinstance(row, Sequence)]
        if nested and len(nested) != len(tokens):
            raise UserError("tokens must be ids, or a list of ids for every sequence, not both")
        rows: list[list[object]] = [list(row) for row in nested] if nested else [list(tokens)]
        if len(rows) != state.batch:
            raise UserError(f"{len(rows)} lists of tokens for {state.batch} sequences")
        if not all(rows):
            raise UserError("a prompt has at least one token")
        prompts = [[integer(token, "a token") for token in row] for row in rows]
        for prompt in prompts:
            check_ids(state.decoder.config, torch.tensor([prompt]))
        if not state.drawn:
            return prompts
        return [[int(first), *prompt] for first, prompt in zip(state.ids.tolist(), prompts, strict=True)]

    def _feed(self, decoder: Decoder, state: InferenceState, group: slice, prompts: list[list[int]]) -> torch.Tensor:
        """Append equally long prompts to some of the sequences; states (b, hidden) of their last tokens."""
        ids = torch.tensor(prompts)
        own = [_part(cache, group) for cache in state.caches]
        lengths = torch.tensor(state.lengths[group], dtype=torch.int32)
        size = max(1, PREFILL_ROWS // len(prompts))
        for first in range(0, ids.shape[1], size):
            piece = decoder.device.upload(ids[:, first : first + size])
            states = step(decoder, piece, own, decoder.device.upload(lengths + first), validate=False)
        return states[:, -1]

    def _draw(self, state: InferenceState, last: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        """Ids (B) int64 from states (B, hidden)."""
        head, meter = state.decoder.head, self._meter
        if sampling.temperature == 0:
            return lm_head_greedy(last, head, device=meter)
        return lm_head_sample(
            last, head, state.uniforms, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
            validate=False, device=meter,
        )  # fmt: skip

    def _advance(self, state: InferenceState, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the tokens drawn last and draw the next; states and ids.

        Nothing here waits for the device or depends on what it computes.
        """
        ids = state.ids.unsqueeze(1)
        last = step(self._running(state), ids, state.caches, state.positions, validate=False).squeeze(1)
        drawn = self._draw(state, last, sampling)
        state.ids.copy_(drawn)
        state.positions.add_(1)
        return last, drawn

    def _capture(self, state: InferenceState, sampling: Sampling) -> Captured:
        """`_advance` as a CUDA graph. Nothing is computed yet; the kernels must have run before, to be loaded."""
        graph = torch.cuda.CUDAGraph()
        # The kernels go to the device's stream, which is torch's current one: it is this stream that must be captured,
        # or the graph would be empty.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            last, drawn = self._advance(state, sampling)
        drawn.fill_(_NOT_DRAWN)  # which a graph without the kernels would leave there
        return Captured(graph, sampling, last)


def _uniforms(seed: int | Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """(B) float32 in [0, 1), each a function of its sequence's seed and position alone."""
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(positions)
    if len(seeds) != len(positions):
        raise UserError(f"{len(seeds)} seeds for {len(positions)} sequences; give one for all or one for each")
    if not all(0 <= integer(one, "a seed") < _MOST_SEEDS for one in seeds):
        raise UserError(f"a seed is from 0 to 2^64 - 1, not {next(s for s in seeds if not 0 <= s < _MOST_SEEDS)}")
    keys = [np.array(pair, dtype=np.uint64) for pair in zip(seeds, positions, strict=True)]
    draws = [np.random.Generator(np.random.Philox(key=key)).random(dtype=np.float32) for key in keys]
    return torch.tensor(draws)


def _part(cache: KVCache, group: slice) -> KVCache:
    """The cache of some sequences."""
    k_scales, v_scales = (None if scales is None else scales[group] for scales in (cache.k_scales, cache.v_scales))
    return replace(
        cache, k=cache.k[group], v=cache.v[group], k_scales=k_scales, v_scales=v_scales, batch=group.stop - group.start
    )
