"""The files of a report: the page, and the same as JUnit XML, CSV and Markdown, each written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from mxharness.document import write_atomically
from mxharness.drift import Comparison
from mxharness.record import RunRecord
from mxharness.report import formats, page, pair, sensitivity, speed, trend
from mxharness.report.sensitivity import Section

PAGE, JUNIT, CSV, SUMMARY = "report.html", "junit.xml", "run.csv", "summary.md"
JOB_SUMMARY = "GITHUB_STEP_SUMMARY"
"""The variable in which GitHub Actions names the file that becomes a job's summary; others imitate it."""


def write(
    record: RunRecord,
    folder: Path,
    comparison: Comparison | None = None,
    measured: Section | None = None,
) -> Path:
    """Write report.html, junit.xml, run.csv and summary.md into `folder` and return the page's path.

    comparison: as in page.render. measured: the parts of the model, by default what lies in `folder`. Times that
    `mxharness bench` left in `folder`, or that the baseline holds, are shown, too.

    The summary is appended to the job's where $GITHUB_STEP_SUMMARY names a
    file. Raises OSError.
    """
    history, measured = trend.of(record.device_class), measured or sensitivity.beside(folder)
    write_atomically(folder / JUNIT, formats.junit(record, comparison))
    write_atomically(folder / CSV, formats.csv_text(record))
    _summarise(folder, formats.markdown(record, comparison))
    times = speed.of_run(folder, comparison.baseline if comparison else "")
    write_atomically(folder / PAGE, page.render(record, comparison, history, measured, times))
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
