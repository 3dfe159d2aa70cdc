"""Baselines over time: what is compared with what, where a level changes, how many small moves are too much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
from mxharness import baseline, drift, history, paths
from mxharness.errors import UserError
from mxharness.record import RunRecord

from .made import CASES, PERPLEXITY, case_of, moved, version, versions


def series(values: Sequence[float], spread: float = 0.1) -> history.Series:
    points = tuple(history.Point(f"v{i}", "2026-01-01T00:00:00Z", value, "", i > 0) for i, value in enumerate(values))
    return history.Series("x", "gemm", "ratio", points, spread, 2.0)


def gemm(*records: RunRecord) -> history.Series:
    return next(one for one in history.operator_series(versions(*records)))


def test_a_step_is_found_where_it_is_and_how_high() -> None:
    (step,) = history.steps(series([1.0, 1.02, 0.99, 1.9, 2.1, 2.0]))
    assert step.version == "v3"
    assert step.before == pytest.approx((1.0 * 1.02 * 0.99) ** (1 / 3))
    assert step.after == pytest.approx((1.9 * 2.1 * 2.0) ** (1 / 3))


def test_two_steps_down_and_up_again() -> None:
    found = history.steps(series([2.0, 2.0, 2.0, 0.5, 0.5, 0.5, 2.0, 2.0, 2.0]))
    assert [step.version for step in found] == ["v3", "v6"]


@pytest.mark.parametrize(("deviations", "found"), [(2.9, 0), (3.1, 1)])
def test_a_step_of_two_versions_is_three_standard_deviations_of_their_difference(deviations: float, found: int) -> None:
    other = math.exp(deviations * 0.1 * math.sqrt(2))
    assert len(history.steps(series([1.0, other]))) == found


def test_chance_alone_makes_few_steps() -> None:
    draw = numpy.random.default_rng(0)
    noisy = [series([math.exp(draw.normal(0, 0.1)) for _ in range(20)]) for _ in range(300)]
    assert sum(bool(history.steps(one)) for one in noisy) < 30


def test_the_fit_is_the_best_of_all() -> None:
    """Against every way to cut nine points."""
    draw = numpy.random.default_rng(1)
    for _ in range(20):
        values = [draw.choice([0.0, 4.0]) + draw.normal(0, 1) for _ in range(9)]

        def cost(starts: tuple[int, ...], values: list[float] = values) -> float:
            bounds = [0, *starts, len(values)]
            parts = [values[a:b] for a, b in pairwise(bounds)]
            return 9 * len(starts) + sum(sum((x - sum(p) / len(p)) ** 2 for x in p) for p in parts)

        every = [tuple(i + 1 for i in range(8) if mask >> i & 1) for mask in range(256)]
        found = history.steps(series([math.exp(value) for value in values], spread=1.0))
        starts = tuple(int(step.version[1:]) for step in found)
        assert cost(starts) == pytest.approx(min(map(cost, every)))


def test_a_break_is_no_step() -> None:
    points = tuple(
        history.Point(f"v{i}", "2026-01-01T00:00:00Z", value, "", i not in (0, 2))
        for i, value in enumerate((1, 1, 9, 9))
    )
    broken = replace(series([1.0]), points=points)
    assert history.steps(broken) == ()
    assert history.growth(broken) == history.Growth("v2", "v3", 1.0, 2.0)


def test_an_operator_chains_what_two_versions_share() -> None:
    """New cases with large errors change nothing, and neither does a case that went."""
    second = version(2, 1.1)
    larger = replace(case_of(99), ratio=0.9, inputs="9" * 16)
    second = replace(second, outcomes=(*second.outcomes[1:], larger))
    third = version(3, 1.21)
    third = replace(third, outcomes=(*third.outcomes[1:], larger))
    found = gemm(version(1), second, third)
    moved = 1.1 ** ((CASES - 1) / CASES)  # one of them, the newcomer, stayed
    assert [point.value for point in found.points] == pytest.approx([1.0, 1.1, 1.1 * moved], rel=1e-3)
    assert [point.comparable for point in found.points] == [False, True, True]


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": "f" * 16},
        {"elements": 98},
    ],
)
def test_other_inputs_are_not_compared(change: dict[str, object]) -> None:
    second = version(2, 3.0)
    second = replace(second, outcomes=tuple(replace(one, **change) for one in second.outcomes))
    assert not any(one.points[1].comparable for one in history.check_series(versions(version(1), second)))
    assert [point.value for point in gemm(version(1), second).points] == [1.0, 1.0]


def test_another_tolerance_and_another_ratio_of_the_same_bits_are_another_ruler() -> None:
    first = version(1, tolerances={"gemm": {"ceiling": "0.1"}})
    wider = version(2, 0.5, tolerances={"gemm": {"ceiling": "0.2"}})
    assert not gemm(first, wider).points[1].comparable
    same_bits = replace(version(2), outcomes=tuple(case_of(seed, 3.0) for seed in range(CASES)))
    assert not gemm(version(1), same_bits).points[1].comparable
    assert gemm(version(1), version(2, 3.0)).points[1].comparable


def test_a_perplexity_of_another_text_starts_anew() -> None:
    second = version(2, perplexity=({**PERPLEXITY, "text_sha256": "beef"},))
    (found,) = history.perplexity_series(versions(version(1), second))
    assert [point.comparable for point in found.points] == [False, False]


def test_many_small_moves_are_one_large_one() -> None:
    """Each of them is 8 %, and no step; together they are past the budget."""
    found = gemm(*(version(1 + i, 1.08**i) for i in range(4)))
    grown = history.growth(found)
    assert grown.exceeded
    assert (grown.since, grown.until, grown.factor) == ("v0", "v3", pytest.approx(1.08**3, rel=1e-3))
    assert not history.growth(gemm(*(version(1 + i, 1.08**i) for i in range(3)))).exceeded
    assert not history.growth(gemm(version(1, 1.5), version(2))).exceeded


def test_few_cases_have_what_chance_may_do_as_budget() -> None:
    few = [replace(one, outcomes=one.outcomes[:2]) for one in (version(1), version(2, 1.5))]
    assert gemm(*few).budget == pytest.approx(math.exp(3 * math.sqrt(2) * history.SPREAD / math.sqrt(2)))
    assert gemm(version(1), version(2, 1.5)).budget == history.OPERATOR_BUDGET


def test_growth_of_perplexity_that_passes_every_time_is_seen() -> None:
    rows = [{**PERPLEXITY, "perplexity": 20 * math.exp(0.0009 * i)} for i in range(5)]
    found = versions(*(version(1 + i, perplexity=(row,)) for i, row in enumerate(rows)))
    (first, *_) = history.perplexity_series(found)
    assert history.growth(first).exceeded
    assert all(not moved(old, new) for old, new in pairwise(found))


def test_a_comparison_fails_on_growth_until_it_is_accepted(tmp_path: Path) -> None:
    for i in range(3):
        baseline.create(f"v{i}", version(1 + i, 1.08**i), root=tmp_path)
    fourth = version(4, 1.08**3)
    assert "gemm growth" in {change.key for change in drift.compare("v2", fourth, root=tmp_path).changes}
    baseline.create("v3", fourth, root=tmp_path)
    again = drift.compare("v3", version(5, 1.08**3, outcomes=fourth.outcomes), root=tmp_path)
    assert not again.passed
    (grown,) = [change for change in again.changes if change.status != "same"]
    assert grown.message.startswith("ratio, relative has grown to 1.26 times what it was at v0, 1.25 allowed")
    baseline.create("v3", fourth, root=tmp_path, replace=True, accepted="a faster sum")
    assert baseline.load("host", "v3", tmp_path).accepted == "a faster sum"
    assert drift.compare("v3", version(5, 1.08**3, outcomes=fourth.outcomes), root=tmp_path).passed


def test_what_came_since_the_baseline_alone_is_told_once(tmp_path: Path) -> None:
    baseline.create("v0", version(1), root=tmp_path)
    found = drift.compare("v0", version(2, 1.5), root=tmp_path)
    assert {change.key for change in found.changes if change.status != "same"} == {
        baseline.key(case_of(seed).case, "bound") for seed in range(CASES)
    }


def test_the_versions_that_came_with_this_one_tell_a_history() -> None:
    found = history.history("sm_90", paths.baselines())
    assert [version.created for version in found] == sorted(version.created for version in found)
    assert len(found) >= 2
    every = history.all_series(found)
    assert {one.op for one in every} >= {"gemm", "perplexity"}
    assert not [one.key for one in every if history.growth(one).exceeded]


def test_a_damaged_version_is_named_and_another_class_is_not_read(tmp_path: Path) -> None:
    baseline.create("v0", version(1), root=tmp_path)
    folder = baseline.create("v0", version(1, device_class="sm_90"), root=tmp_path)
    (Path(folder) / "gemm.json").write_text('{"api_version": 7}')
    assert [version.name for version in history.history("host", tmp_path)] == ["v0"]
    with pytest.raises(UserError, match=r"sm_90/v0/gemm.json has api_version 7 and this mxharness reads up to 1"):
        history.history("sm_90", tmp_path)
