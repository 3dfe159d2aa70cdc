"""What every plot shares: colours that the page decides, plain numbers on the axes, an <svg> that stands alone."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mxharness.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# matplotlib wants colours, CSS wants variables: these stand in for them until the SVG is text.
STAND_IN = {
    "--ink": "#010203",
    "--line": "#040506",
    "--fail": "#070809",
    "--series-1": "#0a0b0c",
    "--series-2": "#0d0e0f",
    "--series-3": "#101112",
}


_MOST_TICKS = 5


def settings(title: str) -> dict[Any, Any]:
    """For an SVG whose colours the page decides, the same bytes for the same title and data."""
    return {  # Any: matplotlib's stubs spell out 300 literal keys
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": STAND_IN["--ink"],
        "axes.labelcolor": STAND_IN["--ink"],
        "axes.edgecolor": STAND_IN["--line"],
        "xtick.color": STAND_IN["--ink"],
        "ytick.color": STAND_IN["--ink"],
        "grid.color": STAND_IN["--line"],
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def check_suffix(path: Path) -> None:
    """Raise UserError for what is neither a PNG nor an SVG file."""
    if path.suffix not in {".png", ".svg"}:
        raise UserError(f"a plot is a .png or .svg file, not '{path}'")


def label_axes(axes: Axes, xs: Sequence[float]) -> None:
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


def svg_text(figure: Figure) -> str:
    """The figure as SVG, without a date."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()


def inline(svg: str, label: str) -> str:
    """The <svg> element alone: no prolog, no metadata, no foreign address, no id that nothing refers to."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r'\sid="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    for variable, colour in STAND_IN.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = svg.replace("'DejaVu Sans'", "system-ui, sans-serif")
    svg = re.sub(r"\n\s*", "\n", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1).strip()
