"""From what windows show of a candidate to a verdict: pass, fail, drift or inconclusive.

KL first, because perplexity is blind: 1 % corrupt codes do not move it, and a wrong scale rule improves it. Then the
paired change of log perplexity against a margin. Nothing here looks at a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from mxharness.gate.statistics import CONFIDENCE, DETECTABLE, Estimate, clustered, holm

if TYPE_CHECKING:
    from mxharness.protocols import Span

    Column = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

Word = Literal["pass", "fail", "drift", "inconclusive"]
_NOISE = 3  # times the divergence of an honest candidate


class Failed(ArithmeticError):
    """The gate fails before any statistics: nothing scored, NaN or Inf, or another experiment than the reference's."""


@dataclass(frozen=True)
class Rules:
    """What a candidate must keep."""

    margin: float
    """Of perplexity, relative."""
    divergence: float = 0.004
    """Mean KL, nats per token."""
    noise: float = 0.0
    """Mean KL of an honest candidate of this dtype, where it was measured."""
    same: float = 0.95
    """Share of tokens whose most probable word is the reference's."""

    @property
    def limit(self) -> float:
        """Of the upper bound of mean KL."""
        return max(self.divergence, _NOISE * self.noise)

    @property
    def nats(self) -> float:
        """The margin as a change of log perplexity."""
        return math.log1p(self.margin)


@dataclass(frozen=True, eq=False)
class Window:
    """What one window shows, per scored token (T,)."""

    span: Span
    reference: Column
    """NLL of the reference, nats."""
    candidate: Column
    """NLL of the candidate, nats."""
    kl: Column
    """Nats."""
    bound: Column
    """A lower bound of kl, or kl itself."""
    same: Column
    """1 where the most probable word is the same, else 0."""


@dataclass(frozen=True)
class Judgement:
    """A verdict with all its numbers."""

    verdict: Word
    reason: str
    divergence: Estimate
    """KL, nats per token."""
    bound: float
    """What KL is at least, nats per token: for KL that was estimated from stored cells."""
    limit: float
    percentiles: tuple[float, float]
    """99th and 99.9th percentile of one token's KL."""
    worst: tuple[int, float]
    """First token and mean KL of the window with the largest mean KL."""
    same: float
    change: Estimate
    """Of log perplexity, nats per token."""
    margin: float
    needed: int
    """Scored tokens that would decide, were the change the one seen; 0 where it is decided."""

    @property
    def passed(self) -> bool:
        """Whether the candidate passes; what stays inconclusive does not."""
        return self.verdict == "pass"

    @property
    def detectable(self) -> float:
        """The smallest relative change of perplexity that these windows tell from none, errors 5 % either way."""
        return math.expm1(self.change.detectable)


def judge(windows: Sequence[Window], rules: Rules) -> Judgement:
    """The verdict on one candidate. Raises Failed where nothing was scored and for NaN or Inf."""
    return judge_together([(windows, rules)])[0]


def judge_together(gates: Sequence[tuple[Sequence[Window], Rules]]) -> list[Judgement]:
    """The verdicts on several candidates, in their order.

    Of many healthy candidates one looks broken by chance; so what calls a candidate worse or better than its reference
    counts by Holm's procedure over all of them. That all pass is not easier for their number: no correction there.
    """
    for windows, _ in gates:
        _check(windows)
    changes = [_estimate(windows, [w.candidate - w.reference for w in windows]) for windows, _ in gates]
    worse = holm([change.beyond(0.0) for change in changes])
    better = holm([1 - change.beyond(-rules.nats) for change, (_, rules) in zip(changes, gates, strict=True)])
    return [
        _judge(windows, rules, changes[i], worse=worse[i], better=better[i]) for i, (windows, rules) in enumerate(gates)
    ]


def of_change(change: Estimate, margin: float, worse: float, better: float) -> tuple[Word, str]:
    """The verdict on a change of log perplexity alone, and why.

    margin: relative. worse: P(such a change or a larger one) if there were none; better: P(such a one or a smaller one)
    if there were one of -margin; both after Holm.
    """
    limit = math.log1p(margin)
    seen = f"perplexity moves by {moved(change)}"
    if worse < 1 - CONFIDENCE and change.mean > limit:
        return "fail", f"{seen}: worse by more than {margin:.2%}"
    if better < 1 - CONFIDENCE:
        return "drift", f"{seen}: too good, a healthy candidate does not gain {margin:.2%}"
    if change.upper < limit:
        return "pass", f"{seen}: no worse than by {margin:.2%}"
    return "inconclusive", f"{seen}: {margin:.2%} is not ruled out"


def moved(change: Estimate) -> str:
    """A change of log perplexity as one of perplexity, with its bounds."""
    return f"{percent(change.mean)}, {percent(change.lower)} to {percent(change.upper)}"


def percent(nats: float) -> str:
    """A change of log perplexity as one of perplexity."""
    return f"{math.expm1(min(nats, 700.0)):+.3%}"


def _check(windows: Sequence[Window]) -> None:
    if not windows or not all(len(window.kl) for window in windows):
        raise Failed("nothing to judge: no token was scored")
    for window in windows:
        for what in ("reference", "candidate", "kl"):
            bad = np.flatnonzero(~np.isfinite(getattr(window, what)))
            if len(bad):
                whose = {"reference": "the reference's likelihood", "candidate": "the candidate's likelihood"}
                raise Failed(
                    f"{whose.get(what, 'the divergence')} is NaN or infinite for {len(bad)} of {len(window.kl)} tokens "
                    f"of the window at token {window.span.start}, first for token {window.span.first + int(bad[0])}"
                )


def _estimate(windows: Sequence[Window], values: Sequence[Column]) -> Estimate:
    sums = np.array([float(value.sum()) for value in values])
    return clustered(sums, np.array([float(len(window.kl)) for window in windows]))


def _judge(windows: Sequence[Window], rules: Rules, change: Estimate, *, worse: float, better: float) -> Judgement:
    divergence = _estimate(windows, [window.kl for window in windows])
    kl, same = (np.concatenate([getattr(window, name) for window in windows]) for name in ("kl", "same"))
    means = [float(window.kl.mean()) for window in windows]
    place = int(np.argmax(means))
    first, why = of_divergence(divergence, float(same.mean()), rules)
    word, reason = of_change(change, rules.margin, worse, better)
    if first == "fail" or (first == "inconclusive" and word == "pass"):
        word, reason = first, why
    elif word == "pass":
        reason = f"{why}; {reason}"
    return Judgement(
        verdict=word,
        reason=reason,
        divergence=divergence,
        bound=float(np.concatenate([window.bound for window in windows]).mean()),
        limit=rules.limit,
        percentiles=(float(np.quantile(kl, 0.99)), float(np.quantile(kl, 0.999))),
        worst=(windows[place].span.start, means[place]),
        same=float(same.mean()),
        change=change,
        margin=rules.margin,
        needed=_needed(change, divergence, rules) if word == "inconclusive" else 0,
    )


def of_divergence(divergence: Estimate, same: float, rules: Rules) -> tuple[Word, str]:
    """The verdict on KL and top words alone, and why; never "drift"."""
    seen = f"mean KL {divergence.mean:.2e}"
    if divergence.lower >= rules.limit:
        return "fail", f"{seen}, at least {divergence.lower:.2e}: more than {rules.limit:.2e}"
    if same < rules.same:
        return (
            "fail",
            f"the most probable word is the reference's for {same:.2%} of the tokens, not {rules.same:.0%}",
        )
    if divergence.upper < rules.limit:
        return "pass", f"{seen}, under {divergence.upper:.2e}"
    return "inconclusive", f"{seen}, {divergence.lower:.2e} to {divergence.upper:.2e}: {rules.limit:.2e} not ruled out"


def _needed(change: Estimate, divergence: Estimate, rules: Rules) -> int:
    """Tokens at which the margin is detectable and both bounds leave what they now straddle, were the means true."""
    z = DETECTABLE / 2
    away = [
        abs(rules.nats - abs(change.mean)) / (z * change.error) if change.error else math.inf,
        abs(rules.limit - divergence.mean) / (z * divergence.error) if divergence.error else math.inf,
        rules.nats / change.detectable if change.error else math.inf,
    ]
    short = min(away)
    if not 0 < short < math.inf:
        return 0
    return math.ceil(change.tokens * max(1.0, 1 / short**2))
