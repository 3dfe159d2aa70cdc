"""The files of a report: the page, and the same as JUnit XML, CSV and Markdown, each written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mxharness.document import write_atomically
from mxharness.drift import Comparison
from mxharness.record import RunRecord
from mxharness.report import formats, page, pair, trend

PAGE, JUNIT, CSV, SUMMARY = "report.html", "junit.xml", "run.csv", "summary.md"
JOB_SUMMARY = "GITHUB_STEP_SUMMARY"
"""The variable in which GitHub Actions names the file that becomes a job's summary; others imitate it."""


def write(
    record: RunRecord,
    folder: Path,
    comparison: Comparison | None = None,
    sensitivity: Mapping[str, Any] | None = None,
) -> Path:
    """Write report.html, junit.xml, run.csv and summary.md into `folder` and return the page's path.

    comparison, sensitivity: as in page.render. The summary is appended to the job's where $GITHUB_STEP_SUMMARY names a
    file. Raises OSError.
    """
    history = trend.of(record.device_class)
    write_atomically(folder / JUNIT, formats.junit(record, comparison))
    write_atomically(folder / CSV, formats.csv_text(record))
    _summarise(folder, formats.markdown(record, comparison))
    write_atomically(folder / PAGE, page.render(record, comparison, history, sensitivity))
    return folder / PAGE


def write_pair(first: RunRecord, second: RunRecord, names: tuple[str, str], folder: Path) -> tuple[Path, pair.Pair]:
    """Write report.html and summary.md of two runs side by side; the page's path, and what was found.

    names: what to call them. Raises OSError.
    """
    found = pair.compare(first, second, names)
    _summarise(folder, formats.pair_markdown(found))
    write_atomically(folder / PAGE, pair.render(found))
    return folder / PAGE, found


def _summarise(folder: Path, text: str) -> None:
    write_atomically(folder / SUMMARY, text)
    if job := os.environ.get(JOB_SUMMARY):
        with Path(job).open("a", encoding="utf-8") as stream:
            stream.write(text)
