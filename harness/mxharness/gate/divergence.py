"""How far a model's prediction is from a reference's: KL divergence, in full and from a part that can be stored.

    KL = sum_i p_i (log p_i - log q_i) = sum_i p_i k(d_i),   d_i = log q_i - log p_i,   k(d) = exp(d) - 1 - d >= 0

The second form has the same value, as p and q both sum to one, and no term that cancels another. A float32 vocabulary
for each token would be gigabytes, so of the reference's p are stored the K most probable words and S words drawn from
the others in proportion to p. That gives

    an estimate   sum_top p_i k(d_i) + p_rest mean_drawn k(d_j), whose expectation is KL, and
    a bound       KL of the K + 1 cells (each top word, all the others together), which by the data processing
                  inequality is at most KL: nothing the other words do inside their cell can lower it.

Sources: Cover and Thomas, Elements of Information Theory, 2nd edition, section 2.8; the control variate in k:
Schulman, "Approximating KL divergence", 2020.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Cells(NamedTuple):
    """What is stored of a reference's predictions of R tokens."""

    top: Tensor  # (R, K) int64, the most probable words, the first of them first
    top_log: Tensor  # (R, K) float32, log p
    drawn: Tensor  # (R, S) int64, drawn from the other words with replacement
    drawn_log: Tensor  # (R, S) float32, log p


class Distance(NamedTuple):
    """Of a candidate's predictions of R tokens from a reference's."""

    kl: Tensor  # (R,) float64, nats: in full, or the estimate
    bound: Tensor  # (R,) float64, nats: a lower bound of it, or in full
    same: Tensor  # (R,) bool: the most probable word is the same


def cells(logits: Tensor, top: int, drawn: int, seed: int) -> Cells:
    """The `top` most probable words and `drawn` of the others; logits (R, V) float32.

    A vocabulary of at most `top` words is kept whole, and none is drawn. seed: of the draw, on the logits' device.
    """
    log = logits.log_softmax(-1)
    first = log.topk(min(top, log.shape[1]), dim=-1)
    if first.indices.shape[1] == log.shape[1]:
        drawn = 0
    if not drawn:
        none = log.new_empty((len(log), 0))
        return Cells(first.indices, first.values, none.long(), none)
    tiny = torch.finfo(torch.float64).tiny  # so that the others never sum to zero
    rest = log.double().exp().clamp_(min=tiny).scatter_(-1, first.indices, 0.0)
    generator = torch.Generator(logits.device).manual_seed(seed)
    words = torch.multinomial(rest, drawn, replacement=True, generator=generator)
    return Cells(first.indices, first.values, words, log.gather(-1, words))


def from_cells(stored: Cells, logits: Tensor) -> Distance:
    """The estimate and the bound for a candidate's logits (R, V) float32 of the same tokens."""
    log = logits.log_softmax(-1)
    p_log, q_log = stored.top_log.double(), log.gather(-1, stored.top).double()
    kl = (p_log.exp() * _excess(q_log - p_log)).sum(-1)
    bound = (p_log.exp() * (p_log - q_log)).sum(-1)
    if stored.top.shape[1] < log.shape[1]:
        p_rest, q_rest = (_rest(of) for of in (p_log, q_log))
        bound = bound + p_rest * (p_rest.log() - q_rest.log())
        if stored.drawn.shape[1]:
            d = log.gather(-1, stored.drawn).double() - stored.drawn_log.double()
            kl = kl + p_rest * _excess(d).mean(-1)
    return Distance(kl, bound, logits.argmax(-1) == stored.top[:, 0])


def in_full(reference: Tensor, candidate: Tensor) -> Distance:
    """The divergence itself from logits (R, V) float32 of both."""
    p_log, q_log = reference.log_softmax(-1), candidate.log_softmax(-1)
    kl = (p_log.exp() * _excess(q_log - p_log)).sum(-1).double()
    return Distance(kl, kl, reference.argmax(-1) == candidate.argmax(-1))


def _excess(d: Tensor) -> Tensor:
    """exp(d) - 1 - d, which loses no digit that matters: for a small d its error is a rounding of d itself."""
    return torch.expm1(d) - d


def _rest(log: Tensor) -> Tensor:
    """What the probabilities (R, K) leave over, at least a rounding of float32."""
    return (1 - log.exp().sum(-1)).clamp(min=torch.finfo(torch.float32).eps)
