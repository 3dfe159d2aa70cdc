"""Plots: the only module that imports matplotlib.

A plot of the report is an inline SVG whose colours are CSS variables (--ink, --line, --fail, --series-1 ..), so that
the page's style decides them, in light, dark and print. Others are files.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxharness.errors import UserError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = {"bf16": ("o", "--series-1"), "fp16": ("^", "--series-2"), "fp32": ("s", "--series-3")}
"""dtype to matplotlib marker and CSS colour variable; any other dtype is drawn as the last one."""

# matplotlib wants colours, CSS wants variables: these stand in for them until the SVG is text.
_STAND_IN = {
    "--ink": "#010203",
    "--line": "#040506",
    "--fail": "#070809",
    "--series-1": "#0a0b0c",
    "--series-2": "#0d0e0f",
    "--series-3": "#101112",
}
_LOWEST, _HIGHEST = 1e-6, 1e4
_MOST_TICKS = 5
_ROWS = 12
"""Marks that differ by less than 1/12 in the logarithm of a number lie on each other."""
_PANELS, _LONG = 6, 24
"""In a row of small multiples; letters of a title that is written smaller."""


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

    with mpl.rc_context(_settings(title)):
        figure = Figure(figsize=(4.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, points)
        axes.set_xlabel(x_label)
        axes.set_ylabel("error / bound")
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    past = sum(not point.passed for point in points)
    return _inline(text.getvalue(), f"{title}: error / bound of {len(points)} cases over {x_label}, {past} failed")


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

    with mpl.rc_context({**_settings(title), "font.size": 7}):
        figure = _lines_figure(versions, lines)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _inline(text.getvalue(), f"{title}: {len(lines)} panels over {', '.join(versions)}")


def _lines_figure(versions: Sequence[str], lines: Sequence[Line]) -> Figure:
    from matplotlib.figure import Figure

    rows = math.ceil(len(lines) / _PANELS)
    figure = Figure(figsize=(9.5, 0.4 + 1.05 * rows), layout="constrained")
    every = list(figure.subplots(rows, _PANELS, squeeze=False).flat)
    for axes, line in zip(every, lines, strict=False):
        axes.set_title(line.title, fontsize=7 if len(line.title) <= _LONG else 6, loc="left", color=_STAND_IN["--ink"])
        places = [place for place, version in enumerate(versions) if version in line.values]
        runs: list[list[int]] = []
        for place in places:
            if not runs or versions[place] in line.breaks:
                runs.append([])
            runs[-1].append(place)
        for run in runs:
            values = [line.values[versions[place]] for place in run]
            axes.plot(run, values, "o-", color=_STAND_IN["--series-1"], markersize=3, linewidth=1)
        known = [value for value in line.values.values() if math.isfinite(value)]
        middle = known[0] if known else 1.0
        axes.set_ylim(min(0.8 * middle, *known, middle), max(1.25 * middle, *known, middle))
        axes.set_xlim(-0.3, len(versions) - 0.7)
        axes.set_xticks(range(len(versions)), versions)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.locator_params(axis="y", nbins=3)
        axes.grid(visible=True, axis="y", linewidth=0.5)
    for axes in every[len(lines) :]:
        axes.set_axis_off()
    return figure


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

    with mpl.rc_context(_settings(title)):
        figure = Figure(figsize=(7.5, 0.7 + 0.24 * len(bars)), layout="constrained")
        axes = figure.add_subplot()
        _draw_bars(axes, bars, _STAND_IN["--series-1"], _STAND_IN["--ink"])
        axes.set_xlabel(x_label)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    said = "; ".join(f"{bar.label} {bar.value:.3g}, {max(bar.low, 0.0):.3g} to {bar.high:.3g}" for bar in bars)
    return _inline(text.getvalue(), f"{title}: {said}")


def bars_file(path: Path, title: str, panels: Mapping[str, Sequence[Bar]], x_label: str) -> None:
    """Panels of such bars, each panel with a scale of its own, as a PNG or SVG file.

    Raises UserError for another suffix.
    """
    from matplotlib.figure import Figure

    _check_suffix(path)
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

    with mpl.rc_context({**_settings(title), "font.size": 8}):
        figure = _curves_figure(panels, x_label, y_label, _STAND_IN)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _inline(text.getvalue(), f"{title}: {y_label} over {x_label} in {len(panels)} panels")


def curves_file(path: Path, title: str, panels: Mapping[str, Sequence[Curve]], x_label: str, y_label: str) -> None:
    """The same as a PNG or SVG file. Raises UserError for another suffix."""
    import matplotlib as mpl

    _check_suffix(path)
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
        _label(axes, sorted({x for curve in curves for x, _ in curve.points}))
        axes.grid(visible=True, linewidth=0.4, color=colours["--line"])
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    figure.supylabel(y_label, fontsize=8, color=colours["--ink"])
    columns = min(len(shown), 5)
    figure.legend(
        handles=list(shown.values()), labels=list(shown), loc="outside lower center", ncols=columns, frameon=False
    )
    return figure


def _settings(title: str) -> dict[Any, Any]:
    """For an SVG whose colours the page decides, the same bytes for the same title and data."""
    return {  # Any: matplotlib's stubs spell out 300 literal keys
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": _STAND_IN["--ink"],
        "axes.labelcolor": _STAND_IN["--ink"],
        "axes.edgecolor": _STAND_IN["--line"],
        "xtick.color": _STAND_IN["--ink"],
        "ytick.color": _STAND_IN["--ink"],
        "grid.color": _STAND_IN["--line"],
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def _check_suffix(path: Path) -> None:
    if path.suffix not in {".png", ".svg"}:
        raise UserError(f"a plot is a .png or .svg file, not '{path}'")


def _draw(axes: Axes, points: Sequence[Point]) -> None:
    finite = [point.ratio for point in points if math.isfinite(point.ratio) and point.ratio > 0]
    low = max(_LOWEST, 10.0 ** math.floor(math.log10(min(finite, default=0.1))))
    low = min(low, 0.1)
    high = min(_HIGHEST, max(10.0, 10.0 ** math.ceil(math.log10(max(finite, default=1.0)))))
    axes.set(xscale="log", yscale="log", ylim=(low, high))
    axes.grid(visible=True, linewidth=0.5)
    axes.axhline(1, color=_STAND_IN["--ink"], linewidth=1, linestyle=(0, (4, 3)))
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
            color=_STAND_IN[colour if passed else "--fail"],
            clip_on=False,
        )
    _label(axes, sorted({point.x for point in points}))


def _apart_enough(points: Sequence[Point], low: float, high: float) -> list[Point]:
    """One of those points that would cover each other: thousands of cases are drawn as fast as hundreds."""
    seen = {}
    for point in points:
        height = round(_ROWS * math.log(_inside(point.ratio, low, high)))
        seen[round(_ROWS * math.log(point.x)), height, point.dtype, point.passed] = point
    return list(seen.values())


def _inside(ratio: float, low: float, high: float) -> float:
    return high if math.isnan(ratio) else min(max(ratio, low), high)


def _label(axes: Axes, xs: Sequence[float]) -> None:
    """Plain numbers on both axes; the sizes themselves where there are few."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axes.xaxis.set_major_locator(FixedLocator(_apart(xs)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"))
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if xs and xs[0] == xs[-1]:
        axes.set_xlim(xs[0] / 2, xs[0] * 2)


def _apart(xs: Sequence[float]) -> list[float]:
    """Those of the sorted `xs` that leave room for their labels on a logarithmic axis, the largest kept."""
    room = math.log(xs[-1] / xs[0]) / _MOST_TICKS if xs else 0.0
    kept: list[float] = []
    for x in reversed(xs):
        if not kept or math.log(kept[-1] / x) >= room:
            kept.append(x)
    return kept


def _inline(svg: str, label: str) -> str:
    """The <svg> element alone: no prolog, no metadata, no foreign address, no id that nothing refers to."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r'\sid="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    for variable, colour in _STAND_IN.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = svg.replace("'DejaVu Sans'", "system-ui, sans-serif")
    svg = re.sub(r"\n\s*", "\n", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1).strip()
