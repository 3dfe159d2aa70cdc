"""Attention's core in float64, and what the kernel's roundings may do to it, element by element.

With weights w_j = exp(s_j) / sum exp(s), s_j = scale q.k_j, y = sum w_j v_j. The kernel counts s_j in powers of 2, as
z_j = s_j log2(e) - m, with an error of at most d_j = gamma_(D+3) scale |q|.|k_j| in s_j (the chain over D, log2(e) and
its product with the scale, that with q.k where it is rounded), and then
  - z_j, rounded to a multiple of 2^-12: 2^-13 ln(2)
  - 2^z and its product with a constant: under 3 u; joining chunks multiplies by powers of 2, without an error
  - the weight, rounded to 16 bits: u_16, or half the smallest subnormal where its chunk's largest is 0.47 at least;
    what is below 2^-126 is left out
The rounded weights are the ones that are summed in the denominator too, so all these errors act alike above and below:
with e_j = the sum of them, y' = sum w_j exp(+-e_j) v_j / sum w_j exp(+-e_j), and therefore
  |y' - y| <= sum w_j expm1(e_j) |v_j - y| / sum w_j exp(-e_j)
(subtract y from every v_j: nothing else changes). A sink is one more weight, its value zero. Roundings that differ
above and below the line - 128 products and 128 weights on the tensor core, a sum for either of a chunk that is joined,
the inverse and its product - are gamma_n sum w_j |v_j|. If q, k, v themselves are uncertain, their errors enter d_j and
sum w_j error_j.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mxharness import mxfp4, regimes
from mxharness.bounds import SMALLEST, UNIT_ROUNDOFF, Bounded, gamma
from mxharness.golden import VALUES, decode
from mxharness.op import Case, Expected, Tensors
from mxharness.ops.kv_cache_reference import gathered

CHUNK = 128
_U, _LEFT_OUT = 2.0**-24, 2.0**-125


@dataclass(frozen=True)
class Rule:
    """What a query sees, and how scores are scaled."""

    lengths: torch.Tensor
    """(B) int: keys that count; the T queries are the last of them."""
    scale: float
    causal: bool = True
    window: int | None = None
    sinks: torch.Tensor | None = None
    """(H) or None."""

    def visible(self, T: int, S: int) -> torch.Tensor:
        """(B, 1, T, S) bool."""
        length = self.lengths.long()[:, None, None]
        query = length - T + torch.arange(T, device=length.device)[None, :, None]
        key = torch.arange(S, device=length.device)[None, None, :]
        seen = (key < length).expand(-1, T, -1)
        if self.causal:
            seen = seen & (key <= query)
        if self.window is not None:
            seen = seen & (key > query - self.window)
        return seen.unsqueeze(1)


def heads_of(x: torch.Tensor, D: int) -> torch.Tensor:
    """(.., H D) as (.., H, D)."""
    return x.reshape(*x.shape[:-1], -1, D)


def decoded_cache(case: Case, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """K and v (B, Hkv, positions, D) float64 as the core reads them: its inputs, or the block's cache."""
    D = case.shape[4] if case.op == "attention" else case.shape[5]
    found: list[torch.Tensor] = []
    for name in "kv":
        if case.op != "attention":
            rows, scales = tensors[f"{name}_cache"], tensors.get(f"{name}_cache_scales")
        elif "table" in tensors:
            rows = gathered(tensors[f"{name}_pages"], tensors["table"][:, :-1])
            scales = tensors.get(f"{name}_scales_pages")
            scales = scales if scales is None else gathered(scales, tensors["table"][:, :-1])
        else:
            rows, scales = tensors[name], tensors.get(f"{name}_scales")
        if scales is not None:
            values = decode(mxfp4.unpack(rows), scales)[..., :D]
            rows = values.to(torch.float32).to(regimes.DTYPES[case.dtype])
        found.append(rows.double())
    return found[0], found[1]


def rule(case: Case, tensors: Tensors, lengths: torch.Tensor) -> Rule:
    """What the case's queries see; the scale as float32 holds it."""
    D = case.shape[4] if case.op == "attention" else case.shape[5]
    window = case.option("window")
    scale = float(torch.tensor(float(case.option("scale") or D**-0.5), dtype=torch.float32))
    return Rule(lengths, scale, "full" not in case.options, int(window) if window else None, tensors.get("sinks"))


def core_arguments(case: Case, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Rule]:
    """Queries (B, T, H, D), k and v (B, Hkv, positions, D), and what is seen, as the core reads them."""
    if case.op == "attention":
        return tensors["q"], *decoded_cache(case, tensors), rule(case, tensors, tensors["lengths"])
    queries = tensors.get("rotated", heads_of(tensors["q"], case.shape[5]))
    return queries, *decoded_cache(case, tensors), rule(case, tensors, tensors["positions"] + case.shape[1])


def core(q: Bounded, k: Bounded, v: Bounded, rule: Rule, dtype: torch.dtype) -> Expected:
    """Y (B, T, H, D) for q (B, T, H, D), k and v (B, Hkv, S, D) of dtype, computed from weights of that dtype."""
    D, G = q.value.shape[-1], q.value.shape[2] // k.value.shape[1]
    query, query_error = q.value.transpose(1, 2), q.error.transpose(1, 2)  # (B, H, T, D)
    key, key_error, value, value_error = (
        x.repeat_interleave(G, 1) for x in (k.value, k.error, v.value, v.error)
    )  # (B, H, S, D)
    seen = rule.visible(query.shape[2], key.shape[2])
    lost = value.isnan()
    touched = seen.double() @ lost.double() > 0  # (B, H, T, D): sees a NaN
    infinite = torch.where(value.isinf(), value.sign(), 0.0)
    value = torch.where(seen.any(2).unsqueeze(-1) & value.isfinite(), value, 0.0)

    scale = abs(rule.scale)
    size = scale * ((query.abs() + query_error) @ (key.abs() + key_error).mT)
    off = scale * (query_error @ key.abs().mT + (query.abs() + query_error) @ key_error.mT) + gamma(D + 3) * size
    score = torch.where(seen, rule.scale * (query @ key.mT), -torch.inf)
    off = torch.where(score > -torch.inf, off, 0.0)
    if rule.sinks is not None:  # one more score, exact but for log2(e), whose value is zero
        sink = rule.sinks.double()[None, :, None, None].expand(*score.shape[:3], 1)
        score, off = torch.cat((score, sink), -1), torch.cat((off, _U * sink.abs()), -1)
        value = torch.nn.functional.pad(value, (0, 0, 0, 1))
        value_error = torch.nn.functional.pad(value_error, (0, 0, 0, 1))
    top = score.amax(-1, keepdim=True)
    below = torch.where(score == -torch.inf, 0.0, top - score)
    weight = torch.where(score == -torch.inf, 0.0, torch.exp(-below))
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1.0)  # the largest weight is 1; no key: 0
    y = weight @ value
    past = _infinities(seen, weight[..., : infinite.shape[2]], infinite)

    chunks = -(-int(rule.lengths.max()) // CHUNK)
    off = off + 2.0**-13 * math.log(2) + 3 * _U + UNIT_ROUNDOFF[dtype]
    first = torch.arange(weight.shape[-1], device=weight.device) // CHUNK
    tops = torch.stack([torch.where(first == c, weight, 0.0).amax(-1) for c in range(chunks + 1)], -1)
    smallest = SMALLEST[dtype] / 2 / 0.47 + _LEFT_OUT
    flushed = torch.where(weight > 0, smallest * tops[..., first.clamp_max(chunks)] + _LEFT_OUT, 0.0)
    moved = weight * torch.expm1(off) + flushed
    left = (weight * torch.exp(-off) - flushed).sum(-1, keepdim=True)
    left = torch.where(weight.sum(-1, keepdim=True) > 0, left, 1.0)
    each = [moved[:, :, t, None] @ (value - y[:, :, t, None]).abs() for t in range(y.shape[2])]  # (B, H, 1, D)
    slack = (torch.cat(each, 2) + (weight * torch.exp(off)) @ value_error) / left
    slack = torch.where(slack.isnan(), torch.inf, slack)  # uncertain beyond what exp can hold
    y = torch.where(touched, torch.nan, y + past)
    chain = 2 * CHUNK + 2 * chunks + 2
    return Expected(
        y.transpose(1, 2), (weight @ value.abs()).transpose(1, 2), chain, dtype, slack=slack.transpose(1, 2)
    )


def _infinities(seen: torch.Tensor, weight: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """What values of +-Inf, whose signs are given, add to (B, H, T, D): 0 where none is seen, NaN for weights of 0."""
    visible = seen.double()
    taken, left = (visible * (weight > 0)), (visible * (weight == 0))
    above, below, lost = taken @ (signs > 0).double(), taken @ (signs < 0).double(), left @ signs.abs()
    found = torch.where(above > 0, torch.inf, 0.0) - torch.where(below > 0, torch.inf, 0.0)
    return torch.where(lost > 0, torch.nan, found)


def stored_as_mxfp4(rows: Bounded) -> Bounded:
    """Rows (.., D) quantised by the floor rule and decoded; what a row's uncertainty may make of it.

    The block's largest magnitude may lie in an interval, and so may pass a power of two; under either scale an element
    is rounded monotonically, so that the ends of its own interval are the furthest it can get.
    """
    D = rows.value.shape[-1]
    value, error = (
        torch.nn.functional.pad(x, (0, -D % 32)).reshape(*x.shape[:-1], -1, 32) for x in (rows.value, rows.error)
    )
    largest = (value.abs() - error).amax(-1), value.abs().amax(-1), (value.abs() + error).amax(-1)
    low, middle, high = (torch.exp2((x.clamp_min(2.0**-120).log2() + 1e-12).floor() - 2) for x in largest)
    stored = _nearest(value, middle)
    furthest = torch.zeros_like(stored)
    for scale in (low, high):
        for end in (value - error, value + error):
            furthest = torch.maximum(furthest, (_nearest(end, scale) - stored).abs())
    return Bounded(stored.flatten(-2)[..., :D], furthest.flatten(-2)[..., :D])


def _nearest(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The closest value of E2M1 times scale (.., 1), ties to the even code."""
    scaled = x.abs() / scale.unsqueeze(-1)
    values = VALUES.to(x.device)
    distance = (scaled.unsqueeze(-1) - values).abs()
    lower = distance.argmin(-1)
    upper = (lower + 1).clamp_max(7)
    tie = distance.gather(-1, lower.unsqueeze(-1)) == distance.gather(-1, upper.unsqueeze(-1))
    code = torch.where(tie.squeeze(-1) & (lower % 2 == 1), upper, lower)
    return values[code] * scale.unsqueeze(-1) * x.sign()
