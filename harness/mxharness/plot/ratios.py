"""Error / bound of one operator's cases over their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mxharness.plot.common import STAND_IN, inline, label_axes, settings, svg_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


SERIES = {"bf16": ("o", "--series-1"), "fp16": ("^", "--series-2"), "fp32": ("s", "--series-3")}
"""dtype to matplotlib marker and CSS colour variable; any other dtype is drawn as the last one."""


_LOWEST, _HIGHEST = 1e-6, 1e4


_ROWS = 12
"""Marks that differ by less than 1/12 in the logarithm of a number lie on each other."""


@dataclass(frozen=True)
class Point:
    """One judged case."""

    x: float
    """Contraction length or number of elements; positive."""
    ratio: float
    """Largest error / bound; may be 0, infinite or NaN."""
    dtype: str
    passed: bool


def ratio_svg(title: str, points: Sequence[Point], x_label: str) -> str:
    """Error / bound over `x_label` for one operator, both axes logarithmic, a line at 1, as an <svg> element.

    Zero sits on the lower edge; infinity and NaN sit on the upper edge, as crosses.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(settings(title)):
        figure = Figure(figsize=(4.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, points)
        axes.set_xlabel(x_label)
        axes.set_ylabel("error / bound")
        text = svg_text(figure)
    past = sum(not point.passed for point in points)
    return inline(text, f"{title}: error / bound of {len(points)} cases over {x_label}, {past} failed")


def _draw(axes: Axes, points: Sequence[Point]) -> None:
    finite = [point.ratio for point in points if math.isfinite(point.ratio) and point.ratio > 0]
    low = max(_LOWEST, 10.0 ** math.floor(math.log10(min(finite, default=0.1))))
    low = min(low, 0.1)
    high = min(_HIGHEST, max(10.0, 10.0 ** math.ceil(math.log10(max(finite, default=1.0)))))
    axes.set(xscale="log", yscale="log", ylim=(low, high))
    axes.grid(visible=True, linewidth=0.5)
    axes.axhline(1, color=STAND_IN["--ink"], linewidth=1, linestyle=(0, (4, 3)))
    groups: dict[tuple[str, str, bool], list[Point]] = {}
    for point in _apart_enough(points, low, high):
        groups.setdefault((*SERIES.get(point.dtype, ("s", "--series-3")), point.passed), []).append(point)
    for (marker, colour, passed), group in sorted(groups.items(), key=lambda item: not item[0][2]):
        axes.plot(
            [point.x for point in group],
            [_inside(point.ratio, low, high) for point in group],
            linestyle="none",
            marker=marker if passed else "X",
            markersize=5 if passed else 8,
            markeredgewidth=0,
            alpha=0.75 if passed else 1,
            color=STAND_IN[colour if passed else "--fail"],
            clip_on=False,
        )
    label_axes(axes, sorted({point.x for point in points}))


def _apart_enough(points: Sequence[Point], low: float, high: float) -> list[Point]:
    """One of those points that would cover each other: thousands of cases are drawn as fast as hundreds."""
    seen = {}
    for point in points:
        height = round(_ROWS * math.log(_inside(point.ratio, low, high)))
        seen[round(_ROWS * math.log(point.x)), height, point.dtype, point.passed] = point
    return list(seen.values())


def _inside(ratio: float, low: float, high: float) -> float:
    return high if math.isnan(ratio) else min(max(ratio, low), high)
