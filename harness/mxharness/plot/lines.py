"""Numbers over versions, as small multiples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mxharness.plot.common import STAND_IN, inline, settings, svg_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_PANELS, _LONG, _MOST = 6, 24, 28
"""In a row of small multiples; letters of a title that is written smaller, and that a title has at most."""
_LETTERS = 24
"""Of all versions below a panel; of more, the first and the last are written."""


@dataclass(frozen=True)
class Line:
    """One number over versions."""

    title: str
    values: Mapping[str, float]
    """By version; a version that lacks it is left out."""
    breaks: frozenset[str] = frozenset()
    """Versions that cannot be compared with the one before: no line is drawn to them."""


def lines_svg(title: str, versions: Sequence[str], lines: Sequence[Line]) -> str:
    """Small multiples as an <svg> element: a panel a line, the same versions below each.

    Panels of ratios share an axis of at least 0.8 to 1.25, so that what is flat looks flat.
    """
    import matplotlib as mpl

    with mpl.rc_context({**settings(title), "font.size": 7}):
        figure = _lines_figure(versions, lines)
        text = svg_text(figure)
    return inline(text, f"{title}: {len(lines)} panels over {', '.join(versions)}")


def _lines_figure(versions: Sequence[str], lines: Sequence[Line]) -> Figure:
    from matplotlib.figure import Figure

    rows = math.ceil(len(lines) / _PANELS)
    figure = Figure(figsize=(9.5, 0.4 + 1.05 * rows), layout="constrained")
    every = list(figure.subplots(rows, _PANELS, squeeze=False).flat)
    ends = (versions[0], versions[-1]) if sum(map(len, versions)) > _LETTERS else tuple(versions)
    for axes, line in zip(every, lines, strict=False):
        title = line.title if len(line.title) <= _MOST else f"{line.title[: _MOST - 1]}…"
        axes.set_title(title, fontsize=7 if len(title) <= _LONG else 6, loc="left", color=STAND_IN["--ink"])
        places = [place for place, version in enumerate(versions) if version in line.values]
        runs: list[list[int]] = []
        for place in places:
            if not runs or versions[place] in line.breaks:
                runs.append([])
            runs[-1].append(place)
        for run in runs:
            values = [line.values[versions[place]] for place in run]
            axes.plot(run, values, "o-", color=STAND_IN["--series-1"], markersize=3, linewidth=1)
        known = [value for value in line.values.values() if math.isfinite(value)]
        middle = known[0] if known else 1.0
        axes.set_ylim(min(0.8 * middle, *known, middle), max(1.25 * middle, *known, middle))
        axes.set_xlim(-0.3, len(versions) - 0.7)
        axes.set_xticks(range(len(versions)), [version if version in ends else "" for version in versions])
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.locator_params(axis="y", nbins=3)
        axes.grid(visible=True, axis="y", linewidth=0.5)
    for axes in every[len(lines) :]:
        axes.set_axis_off()
    return figure
