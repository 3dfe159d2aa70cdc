"""The report of a run: one HTML file that needs nothing else, and the same as JUnit XML, CSV and Markdown.

Templates, style and script lie in reports/; plots come from plot/ as inline SVG.
"""

from mxharness.report.checks import short, smallest
from mxharness.report.files import write, write_pair
from mxharness.report.page import render

__all__ = ["render", "short", "smallest", "write", "write_pair"]
