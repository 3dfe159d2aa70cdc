"""How the baselines of a device class moved over the versions, as plots and as the few series worth a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from mxharness import baseline, history, plot
from mxharness.baseline import Damaged, Root

_FEWEST = 2
_MOST_NOTES = 40


@dataclass(frozen=True)
class Note:
    """A series that moved."""

    key: str
    quantity: str
    what: str
    """In words: a step, slow growth, other bits."""


@dataclass(frozen=True)
class History:
    """The versions of one device class."""

    device_class: str
    versions: tuple[tuple[str, str, str], ...]
    """Name, when it was blessed, commit; oldest first."""
    drawing: str
    """An <svg>: one panel an operator and a perplexity."""
    notes: tuple[Note, ...]
    """Steps and growth past its budget, then checks whose bits changed."""
    notes_left: int
    """How many more there are."""
    series: int
    """How many series were searched."""
    damaged: tuple[Damaged, ...] = ()
    """Versions that cannot be read, and so are not in the plots."""


def of(device_class: str, root: Root = None, until: str = "") -> History | None:
    """What the baselines of `device_class` say; None where there are fewer than two, which show no movement.

    until: leave out what was blessed after this time.
    """
    there = baseline.survey(device_class, root)
    versions = history.in_order(one for one in there.versions if not until or one.created <= until)
    if len(versions) < _FEWEST:
        return None
    operators, checks = history.operator_series(versions), history.check_series(versions)
    models = history.perplexity_series(versions)
    every = (*operators, *models, *checks)
    notes = [note for series in every for note in _movements(series)]
    notes += [Note(series.key, "bits", what) for series in checks if (what := _other_bits(series))]
    names = [version.name for version in versions]
    return History(
        device_class=device_class,
        versions=tuple((one.name, one.created, str(one.environment.get("commit", "-"))[:12]) for one in versions),
        drawing=plot.lines_svg(
            f"Baselines of {device_class} over versions",
            names,
            [*(_line(series) for series in operators), *(_line(series) for series in models)],
        ),
        notes=tuple(notes[:_MOST_NOTES]),
        notes_left=max(0, len(notes) - _MOST_NOTES),
        series=len(every),
        damaged=there.damaged,
    )


def _line(series: history.Series) -> plot.Line:
    points = {point.version: point for point in series.points}
    breaks = frozenset(point.version for point in series.points[1:] if not point.comparable)
    title = series.key if series.op != "perplexity" else f"perplexity: {series.key.partition(' | ')[0]}"
    return plot.Line(title, {name: point.value for name, point in points.items()}, breaks)


def _movements(series: history.Series) -> list[Note]:
    found = [
        Note(series.key, series.quantity, f"step at {step.version}: {step.before:.4g} to {step.after:.4g}")
        for step in history.steps(series)
    ]
    growth = history.growth(series)
    if growth.exceeded:
        what = f"grew {growth.factor:.3g}-fold from {growth.since} to {growth.until}, {growth.budget:.3g} allowed"
        found.append(Note(series.key, series.quantity, what))
    return found


def _other_bits(series: history.Series) -> str:
    """Also where the ruler moved at the same time: a changed tolerance must not hide that the bits changed with it."""
    changed = [after.version for before, after in pairwise(series.points) if before.digest != after.digest]
    return f"other bits at {', '.join(changed)}" if changed else ""
