"""Cases nobody thought of: Hypothesis draws them, shrinks a failing one, and prints it ready to paste into CASES."""

from __future__ import annotations

from hypothesis import given
from mxharness.judge import gates


def test_fuzz(op, check):
    @given(op.fuzz())
    def holds(case):
        for gate in gates(op, case):
            check(op, case, gate)

    holds()
