"""How many windows a gate reads: few for the divergence, then 64, doubled while the verdict is open, then all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from mxharness.gate.verdict import Failed, Judgement, Rules, Window, judge_together
from mxharness.protocols import DEFAULT_WINDOWS, Span, select

Measure = Callable[[Sequence[Span]], Iterable[Window]]
"""Windows of a text to what they show of a candidate, in their order."""
GLANCE = 8
"""Windows that show a diverging candidate."""


def stages(available: int, first: int = DEFAULT_WINDOWS) -> tuple[int, ...]:
    """How many windows are judged one after the other: `first`, twice as many, .., all."""
    counts = []
    while first < available:
        counts.append(first)
        first *= 2
    return (*counts, available)


def run(
    available: Sequence[Span], gates: Sequence[tuple[Measure, Rules]], first: int = DEFAULT_WINDOWS
) -> list[Judgement]:
    """Judge candidates on evenly spaced windows of `available`, on more while their verdict is open.

    A candidate whose divergence is beyond its limit on GLANCE windows is judged on these. One that stays open after
    all windows is inconclusive, which does not pass, and its reason says how many tokens it would take. No window is
    read twice. Raises Failed.
    """
    if not available:
        raise Failed("nothing to judge: the text gives no window")
    seen: list[dict[Span, Window]] = [{} for _ in gates]
    judged: list[list[Window]] = [[] for _ in gates]
    final: dict[int, Judgement] = {}
    glance = GLANCE if min(first, len(available)) > GLANCE else 0
    for stage in (*([glance] if glance else []), *stages(len(available), first)):
        chosen = select(available, stage)
        for i, (measure, _) in enumerate(gates):
            if i not in final:
                unread = [span for span in chosen if span not in seen[i]]
                seen[i].update(zip(unread, measure(unread), strict=True))
                judged[i] = [seen[i][span] for span in chosen]
        found = judge_together([(windows, rules) for windows, (_, rules) in zip(judged, gates, strict=True)])
        for i, judgement in enumerate(found):
            if i in final:
                continue
            diverges = judgement.divergence.lower >= judgement.limit
            if diverges or (stage != glance and judgement.verdict != "inconclusive"):
                final[i] = judgement
            elif stage == len(available):
                final[i] = _closed(judgement)
    return [final[i] for i in range(len(gates))]


def _closed(judgement: Judgement) -> Judgement:
    """An open verdict with no window left."""
    change = judgement.change
    ask = f"; it would take about {judgement.needed:,} tokens" if judgement.needed else ""
    end = f"{judgement.reason} after all {change.windows} windows, {change.tokens:,} tokens{ask}"
    return replace(judgement, reason=end)
