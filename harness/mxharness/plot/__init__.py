"""Plots: the only modules that import matplotlib.

A plot of the report is an inline SVG whose colours are CSS variables (--ink, --line, --fail, --series-1 ..), so that
the page's style decides them, in light, dark and print. Others are files.
"""

from mxharness.plot.bars import Bar, bars_file, bars_svg
from mxharness.plot.curves import Curve, curves_file, curves_svg
from mxharness.plot.lines import Line, lines_svg
from mxharness.plot.ratios import Point, ratio_svg

__all__ = [
    "Bar",
    "Curve",
    "Line",
    "Point",
    "bars_file",
    "bars_svg",
    "curves_file",
    "curves_svg",
    "lines_svg",
    "ratio_svg",
]
