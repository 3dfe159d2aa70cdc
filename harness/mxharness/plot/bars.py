"""Ranked values with their intervals, as horizontal bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mxharness.plot.common import STAND_IN, check_suffix, inline, settings, svg_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Bar:
    """One measured value with its interval."""

    label: str
    value: float
    low: float
    high: float


def bars_svg(title: str, bars: Sequence[Bar], x_label: str) -> str:
    """Horizontal bars with their intervals as an <svg> element, the first on top; its label says every number."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(settings(title)):
        figure = Figure(figsize=(7.5, 0.7 + 0.24 * len(bars)), layout="constrained")
        axes = figure.add_subplot()
        _draw_bars(axes, bars, STAND_IN["--series-1"], STAND_IN["--ink"])
        axes.set_xlabel(x_label)
        text = svg_text(figure)
    said = "; ".join(f"{bar.label} {bar.value:.3g}, {max(bar.low, 0.0):.3g} to {bar.high:.3g}" for bar in bars)
    return inline(text, f"{title}: {said}")


def bars_file(path: Path, title: str, panels: Mapping[str, Sequence[Bar]], x_label: str) -> None:
    """Panels of such bars, each panel with a scale of its own, as a PNG or SVG file.

    Raises UserError for another suffix.
    """
    from matplotlib.figure import Figure

    check_suffix(path)
    counts = [len(bars) for bars in panels.values()]
    figure = Figure(figsize=(7.5, 1.0 + 0.22 * sum(counts) + 0.6 * len(counts)), layout="constrained")
    every = figure.subplots(len(counts), 1, squeeze=False, height_ratios=[count + 1 for count in counts])
    for axes, (name, bars) in zip(every[:, 0], panels.items(), strict=True):
        _draw_bars(axes, bars, "#3b6ea5", "#111")
        axes.set_title(name, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    every[-1, 0].set_xlabel(x_label, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {})


def _draw_bars(axes: Axes, bars: Sequence[Bar], colour: str, ink: str) -> None:
    """The first bar on top; an interval is cut off at zero, and not drawn where it is infinite."""
    values = [bar.value for bar in bars]
    axes.barh(range(len(bars)), values, color=colour, height=0.7)
    known = [place for place, bar in enumerate(bars) if math.isfinite(bar.high)]
    ends = [[values[i] - max(bars[i].low, 0.0) for i in known], [bars[i].high - values[i] for i in known]]
    axes.errorbar([values[i] for i in known], known, xerr=ends, fmt="none", ecolor=ink, elinewidth=1, capsize=2)
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=8)
    axes.set(xlim=(0, None), ylim=(len(bars) - 0.4, -0.6))
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(visible=True, axis="x", linewidth=0.5)
    axes.set_axisbelow(True)
