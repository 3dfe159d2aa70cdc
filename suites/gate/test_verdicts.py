"""Verdicts on windows made for them, and how many windows are read before one is given."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from mxharness.gate import sequence, statistics, verdict
from mxharness.gate.verdict import Failed
from mxharness.protocols import Span, select

from .made import RULES, windows


@pytest.mark.parametrize(
    ("change", "spread", "kl", "same", "word", "reason"),
    [
        (0.0, 0.01, 1e-3, 1.0, "pass", "no worse than by 0.50%"),
        (0.02, 0.01, 1e-3, 1.0, "fail", r"perplexity moves by \+2.020%, .*: worse by more than 0.50%"),
        (-0.02, 0.01, 1e-3, 1.0, "drift", r"perplexity moves by -1.980%, .*: too good"),
        (0.0, 0.05, 1e-3, 1.0, "inconclusive", "0.50% is not ruled out"),
        (0.006, 0.05, 1e-3, 1.0, "inconclusive", "0.50% is not ruled out"),
        (-0.006, 0.05, 1e-3, 1.0, "pass", "no worse than"),
        (0.003, 0.001, 1e-3, 1.0, "pass", "no worse than"),
        (0.0, 0.01, 5e-3, 1.0, "fail", "mean KL 5.00e-03, at least 5.00e-03: more than 4.00e-03"),
        (-0.02, 0.01, 5e-3, 1.0, "fail", "mean KL 5.00e-03"),
        (0.0, 0.01, 1e-3, 0.94, "fail", "the reference's for 94.12% of the tokens, not 95%"),
    ],
)
def test_verdicts(change, spread, kl, same, word, reason):
    found = verdict.judge(windows(change, spread, kl=kl, same=same), RULES)
    assert found.verdict == word
    assert found.passed is (word == "pass")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.reason)
    assert (found.needed > 0) is (word == "inconclusive")
    assert found.change.mean == pytest.approx(change, abs=1e-12)
    assert found.detectable == pytest.approx(math.expm1(3.29 * spread / 8), rel=1e-9)


def test_kl_open_is_inconclusive_and_noise_widens_its_limit():
    wide = [replace(window, kl=window.kl * (1 + i % 9)) for i, window in enumerate(windows(0.0, 0.01, kl=8e-4))]
    found = verdict.judge(wide, RULES)
    assert found.divergence.lower < 4e-3 < found.divergence.upper
    assert (found.verdict, found.needed > found.change.tokens) == ("inconclusive", True)
    assert verdict.judge(wide, replace(RULES, noise=2e-3)).verdict == "pass"
    assert verdict.judge(wide, replace(RULES, noise=1e-3)).limit == 4e-3


def test_numbers_beside_a_verdict():
    made = windows(0.0, 0.01)
    made[7] = replace(made[7], kl=np.full(255, 3e-3))
    found = verdict.judge(made, RULES)
    assert found.worst == (7 * 512, pytest.approx(3e-3))
    assert found.percentiles == (pytest.approx(3e-3), pytest.approx(3e-3))
    assert found.divergence.mean == pytest.approx((63e-3 + 3e-3) / 64)


@pytest.mark.parametrize("what", ["reference", "candidate", "kl"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_fail(what, value):
    made = windows(0.0, 0.01)
    spoilt = getattr(made[3], what).copy()
    spoilt[10:12] = value
    made[3] = replace(made[3], **{what: spoilt})
    with pytest.raises(Failed, match=r"NaN or infinite for 2 of 255 tokens of the window at token 1536, first .* 1803"):
        verdict.judge(made, RULES)


def test_nothing_fails():
    with pytest.raises(Failed, match="no token was scored"):
        verdict.judge([], RULES)
    with pytest.raises(Failed, match="the text gives no window"):
        sequence.run((), [(lambda spans: [], RULES)])


def test_one_of_many_gates_needs_more_to_fail():
    """Worse by more than the margin, p = 0.02: fails alone, is left open among five."""
    spread = 0.05
    change = statistics.student_quantile(0.98, 63) * spread / 8
    suspect = windows(change, spread)
    assert verdict.judge(suspect, RULES).verdict == "fail"
    healthy = (windows(0.0, 0.001, seed=1), RULES)
    found = verdict.judge_together([(suspect, RULES), *[healthy] * 4])
    assert [one.verdict for one in found] == ["inconclusive", *["pass"] * 4]


# Sequence


def reader(change, spread, kl=1e-3, count=592):
    made = {window.span: window for window in windows(change, spread, count, kl)}
    read: list[Span] = []

    def measure(spans):
        read.extend(spans)
        return [made[span] for span in spans]

    return tuple(made), measure, read


def test_windows_double_while_the_verdict_is_open():
    assert sequence.stages(592) == (64, 128, 256, 512, 592)
    assert sequence.stages(64) == (64,)
    assert sequence.stages(5) == (5,)
    available, measure, read = reader(0.0, 0.03)
    (found,) = sequence.run(available, [(measure, RULES)])
    assert found.verdict == "pass"
    assert found.change.windows == 128
    assert len(read) == len(set(read)) >= 128
    available, measure, read = reader(0.0, 0.005)
    (found,) = sequence.run(available, [(measure, RULES)])
    assert (found.verdict, found.change.windows) == ("pass", 64)
    assert set(select(available, 64)) <= set(read)


def test_what_stays_open_does_not_pass_and_says_what_it_would_take():
    available, measure, read = reader(0.001, 0.6)
    (found,) = sequence.run(available, [(measure, RULES)])
    assert (found.verdict, found.passed, len(read)) == ("inconclusive", False, 592)
    wanted = (3.29 * found.change.error / math.log1p(0.005)) ** 2 * found.change.tokens
    assert found.needed >= 0.99 * wanted > 592 * 255
    assert f"after all 592 windows, 150,960 tokens; it would take about {found.needed:,} tokens" in found.reason


def test_a_diverging_candidate_fails_on_a_few_windows():
    available, measure, read = reader(0.0, 0.01, kl=0.05)
    (found,) = sequence.run(available, [(measure, RULES)])
    assert (found.verdict, len(read)) == ("fail", sequence.GLANCE)


def test_several_candidates_stop_on_their_own():
    available, first, few = reader(0.0, 0.005)
    _, second, all_of_them = reader(0.001, 0.6)
    found = sequence.run(available, [(first, RULES), (second, RULES)])
    assert [one.verdict for one in found] == ["pass", "inconclusive"]
    assert len(few) < 130
    assert len(all_of_them) == 592
