"""References for choices by logits, in float64: which token, or which tokens, and where more than one answer is right.

Stage by stage a choice is made from the kernel's own logits: an order is then exact, and what hangs on probabilities
may differ only where a cumulated mass lies within its error of what it is compared with. Over the whole function each
logit is an interval, and every token is permitted that some logits within their intervals would choose (Outcome).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mxharness.op import Expected
from mxharness.ops.elementary import ULP

UNIT = 2.0**-24
GRID = 2.0**-40
"""Masses are cut off at multiples of it; the largest token's is 1."""


def counted(p: float) -> float:
    """A share 0 < p < 1 in the units of 2^-32 that the kernels count in, neither 0 nor 1."""
    return min(max(round(p * 2.0**32), 1), 2**32 - 1) / 2.0**32


def decided(value: torch.Tensor, permitted: torch.Tensor, exists: torch.Tensor) -> Expected:
    """Ids (M) from what is permitted (M, V); -1 in rows that have no answer. Exact where no row leaves a choice."""
    value = value.where(exists, -1)
    permitted = permitted & exists.unsqueeze(-1)
    return Expected(value, permitted=permitted) if int(permitted.sum(-1).max()) > 1 else Expected(value)


def has_softmax(z: torch.Tensor) -> torch.Tensor:
    """Rows (M) whose largest logit is finite."""
    return z.amax(-1).isfinite()


def inside(uniforms: torch.Tensor) -> torch.Tensor:
    """Uniforms (M) that are some: in [0, 1)."""
    return (uniforms >= 0) & (uniforms < 1)


def in_order(z: torch.Tensor) -> torch.Tensor:
    """Ids (M, V): the larger logit first, at equal ones the lower id."""
    return torch.sort(z, descending=True, stable=True).indices


def shifted(x: torch.Tensor) -> torch.Tensor:
    """A cumulated sum without its own term."""
    return torch.nn.functional.pad(x[..., :-1], (1, 0))


def masses(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(z - max z) (M, V) and how far the kernel's integer may be from it.

    The difference is rounded, which changes the exponential by |z - max| u; exp32 by its ulps; then it is cut off.
    """
    distance = z.double() - z.double().amax(-1, keepdim=True)
    value = distance.exp()
    error = (value * (distance.abs() + 2 * ULP["exp"])).nan_to_num(0.0) * UNIT * 1.001 + GRID
    return value, error.where((distance < 0) & (distance > -torch.inf), 0.0)


def cumulated(value: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums along the row, of which the last is S, and how far each times S / (the kernel's S) may be from it.

    What is lost before and after a place moves its share of the whole in opposite directions.
    """
    total, lost = value.cumsum(-1), error.cumsum(-1)
    S, everything = total[..., -1:], lost[..., -1:]
    return total, 1.001 * ((S - total) * lost + total * (everything - lost)) / S


def greedy(z: torch.Tensor) -> Expected:
    """Ids (M): the first in order."""
    first = in_order(z)[:, 0]
    return Expected(first.where(~z.isnan().any(-1), -1))


def top_k(z: torch.Tensor, k: int) -> Expected:
    """The last token kept (M)."""
    return Expected(in_order(z)[:, k - 1].where(~z.isnan().any(-1), -1))


def top_p(z: torch.Tensor, p: float) -> Expected:
    """The last token kept (M): the first in order with which the mass reaches p."""
    ids = in_order(z)
    value, error = masses(z)
    total, slack = cumulated(value.gather(-1, ids), error.gather(-1, ids))
    goal = counted(p) * total[..., -1:]
    right = (total + slack >= goal) & (shifted(total) - shifted(slack) < goal)
    choice = ids.gather(-1, (total >= goal).int().argmax(-1, keepdim=True)).squeeze(-1)
    return decided(choice, torch.zeros_like(right).scatter(-1, ids, right), has_softmax(z))


def filtered(z: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Z (M, V) with all past `last` (M) in the order -Inf; NaN throughout where nothing is last."""
    at = last.clamp(0, z.shape[-1] - 1).unsqueeze(-1)
    edge = z.gather(-1, at)
    kept = (z > edge) | ((z == edge) & (torch.arange(z.shape[-1], device=z.device) <= at))
    return z.where(kept, -torch.inf).where(last.unsqueeze(-1) >= 0, torch.nan)


def probabilities(z: torch.Tensor) -> Expected:
    """Softmax (M, V): errors of a mass and of the denominator, and one rounding each for it and the quotient."""
    value, error = masses(z)
    S = value.sum(-1, keepdim=True)
    own = value * ((z.double() - z.double().amax(-1, keepdim=True)).abs() + 2 * ULP["exp"]).nan_to_num(0.0)
    relative = 1.001 * (error.sum(-1, keepdim=True) / S / UNIT + 1)
    magnitude = (1.001 * own + value * relative) / S
    exists = has_softmax(z).unsqueeze(-1)
    return Expected((value / S).where(exists, torch.nan), magnitude.where(exists, 0.0), 1, torch.float32)


def sample(z: torch.Tensor, uniforms: torch.Tensor) -> Expected:
    """Ids (M): the first, in ascending order, with which the mass passes the uniform's share of the whole."""
    total, slack = cumulated(*masses(z))
    goal = torch.floor(uniforms.double() * 2.0**32).unsqueeze(-1) / 2.0**32 * total[..., -1:]
    right = (total + slack > goal) & (shifted(total) - shifted(slack) <= goal) & (z > -torch.inf)
    return decided((total > goal).int().argmax(-1), right, has_softmax(z) & inside(uniforms))


@dataclass(frozen=True)
class Outcome:
    """What tokens may be when each logit lies somewhere in low..high; all (M, V)."""

    low: torch.Tensor
    high: torch.Tensor
    least: torch.Tensor
    """Mass of a token in the least case: 0 where a filter may have dropped it."""
    most: torch.Tensor
    """And in the best: 0 where a filter must have."""

    def ahead(self, weights: torch.Tensor) -> torch.Tensor:
        """What the tokens weigh that stand before a token for sure."""
        return _weighed(self.low, weights, self.high, equal=False)

    def not_behind(self, weights: torch.Tensor) -> torch.Tensor:
        """What the tokens weigh that may stand before a token, with itself."""
        return _weighed(self.high, weights, self.low, equal=True)

    def only(self, sure: torch.Tensor, possible: torch.Tensor) -> Outcome:
        """After a filter."""
        return Outcome(self.low, self.high, self.least.where(sure, 0.0), self.most.where(possible, 0.0))


def outcome(value: torch.Tensor, error: torch.Tensor) -> Outcome:
    """Of logits (M, V) no further than `error` from `value`."""
    distance = value - value.amax(-1, keepdim=True)
    relative = (distance.abs() + 2 * ULP["exp"]) * UNIT * 1.001
    least = ((distance - error).exp() * (1 - relative)).nan_to_num(0.0) - 2 * GRID
    most = ((distance + error).exp() * (1 + relative)).nan_to_num(0.0) + 2 * GRID
    return Outcome(value - error, value + error, least.clamp_min(0.0), most.where(value > -torch.inf, 0.0))


def possible_top_k(tokens: Outcome, k: int) -> tuple[Outcome, torch.Tensor]:
    """What top-k leaves, and which tokens (M, V) may be the last kept."""
    one = torch.ones_like(tokens.low)
    ahead, not_behind = tokens.ahead(one), tokens.not_behind(one)
    return tokens.only(not_behind <= k, ahead < k), (ahead < k) & (not_behind >= k)


def possible_top_p(tokens: Outcome, p: float) -> tuple[Outcome, torch.Tensor]:
    """What top-p leaves, and which tokens (M, V) may be the last kept."""
    p, least, most = counted(p), tokens.least, tokens.most
    ahead = tokens.ahead(least)
    possible = (most > 0) & (ahead < p * (ahead + most.sum(-1, keepdim=True) - tokens.ahead(most)))
    up_to, behind = tokens.not_behind(most), least.sum(-1, keepdim=True) - tokens.not_behind(least)
    before = up_to - most
    sure = (least > 0) & (before < p * (before + least + behind))
    return tokens.only(sure, possible), possible & (up_to >= p * (up_to + behind))


def possible_sample(tokens: Outcome, uniforms: torch.Tensor) -> torch.Tensor:
    """Which tokens (M, V) may be drawn."""
    u = torch.floor(uniforms.double() * 2.0**32).unsqueeze(-1) / 2.0**32
    least, most = tokens.least.cumsum(-1), tokens.most.cumsum(-1)
    before, after = shifted(least), most[..., -1:] - shifted(most)
    reached = most > u * (most + least[..., -1:] - least)
    return (tokens.most > 0) & reached & (before <= u * (before + after))


def possible_probabilities(value: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """How far probabilities (M, V) may be from the softmax of `value` when logits are no further than `error` from it.

    The numerator is an exponential that nothing cuts off.
    """
    tokens = outcome(value, error)
    own = value - value.amax(-1, keepdim=True)
    middle = own.exp() / own.exp().sum(-1, keepdim=True)
    relative = (own.abs() + 2 * ULP["exp"]) * UNIT * 1.001
    low, high = (own - error).exp() * (1 - relative), (own + error).exp() * (1 + relative)
    others_most = tokens.most.sum(-1, keepdim=True) - tokens.most
    others_least = tokens.least.sum(-1, keepdim=True) - tokens.least
    highest, lowest = high / (high + others_least), low / (low + others_most)
    return torch.maximum(highest - middle, middle - lowest) + 3 * UNIT * highest + 2.0**-149


def _weighed(keys: torch.Tensor, weights: torch.Tensor, bounds: torch.Tensor, *, equal: bool) -> torch.Tensor:
    """For every bound (M, V) the weights (M, V) whose key is larger, or equal where asked, summed."""
    ordered = keys.sort(-1)
    tail = weights.gather(-1, ordered.indices).flip(-1).cumsum(-1).flip(-1)
    first = torch.searchsorted(ordered.values, bounds.contiguous(), right=not equal)
    return torch.nn.functional.pad(tail, (0, 1)).gather(-1, first)
