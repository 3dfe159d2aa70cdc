"""Cases nobody thought of: Hypothesis draws them, shrinks a failing one, and prints it ready to paste into CASES."""

from __future__ import annotations

from hypothesis import given, seed, settings


def test_fuzz(op, part, random_check):
    @seed(part.stream(op))
    @settings(max_examples=part.examples)
    @given(op.fuzz())
    def holds(case):
        random_check(op, case)

    holds()
