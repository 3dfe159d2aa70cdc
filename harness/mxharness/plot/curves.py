"""Times over sizes, as small multiples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mxharness.plot.common import STAND_IN, check_suffix, inline, label_axes, settings, svg_text

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curve:
    """One name's values over a size."""

    label: str
    points: Sequence[tuple[float, float]]
    role: str = "other"
    """"own", "reference", "limit" (dashed) or "other": how it stands out."""


_ROLES = {"own": ("--series-1", "-", 2.0), "reference": ("--series-2", "-", 1.2), "limit": ("--ink", "--", 1.0)}


_OTHER = ("--series-3", "-", 0.8)


_MARKERS = "so^vDPX*"


_PAPER = {
    "--ink": "#222222",
    "--line": "#999999",
    "--series-1": "#1a5fb4",
    "--series-2": "#c64600",
    "--series-3": "#5e8c31",
}
"""The page's colours by day, for files."""


def curves_svg(title: str, panels: Mapping[str, Sequence[Curve]], x_label: str, y_label: str) -> str:
    """Small multiples as an <svg> element, both axes logarithmic: a panel a name, the same curves' styles in each."""
    import matplotlib as mpl

    with mpl.rc_context({**settings(title), "font.size": 8}):
        figure = _curves_figure(panels, x_label, y_label, STAND_IN)
        text = svg_text(figure)
    return inline(text, f"{title}: {y_label} over {x_label} in {len(panels)} panels")


def curves_file(path: Path, title: str, panels: Mapping[str, Sequence[Curve]], x_label: str, y_label: str) -> None:
    """The same as a PNG or SVG file. Raises UserError for another suffix."""
    import matplotlib as mpl

    check_suffix(path)
    with mpl.rc_context({"font.size": 8, "svg.hashsalt": title}):
        figure = _curves_figure(panels, x_label, y_label, _PAPER)
        figure.suptitle(title, fontsize=10)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {})


def _curves_figure(
    panels: Mapping[str, Sequence[Curve]], x_label: str, y_label: str, colours: Mapping[str, str]
) -> Figure:
    from matplotlib.figure import Figure

    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.4 * columns, 0.5 + 2.5 * rows), layout="constrained")
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    others = dict.fromkeys(curve.label for curves in panels.values() for curve in curves if curve.role == "other")
    markers = {label: _MARKERS[i % len(_MARKERS)] for i, label in enumerate(others)}
    shown: dict[str, Artist] = {}
    for axes, (name, curves) in zip(every, panels.items(), strict=False):
        axes.set_title(name, loc="left", fontsize=8, color=colours["--ink"])
        axes.set(xscale="log", yscale="log", xlabel=x_label)
        for curve in curves:
            colour, style, width = _ROLES.get(curve.role, _OTHER)
            marker = "" if curve.role == "limit" else markers.get(curve.label, ".")
            look = {"marker": marker, "color": colours[colour], "linewidth": width, "markersize": 4}
            drawn = axes.plot(*zip(*curve.points, strict=True), style, **look)
            shown.setdefault(curve.label, drawn[0])
        label_axes(axes, sorted({x for curve in curves for x, _ in curve.points}))
        axes.grid(visible=True, linewidth=0.4, color=colours["--line"])
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    figure.supylabel(y_label, fontsize=8, color=colours["--ink"])
    columns = min(len(shown), 5)
    figure.legend(
        handles=list(shown.values()), labels=list(shown), loc="outside lower center", ncols=columns, frameon=False
    )
    return figure
