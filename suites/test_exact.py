"""Every contraction: the exact result where no order can change it, the predicted bits on any data."""

from __future__ import annotations

import pytest

from mxharness.judge import checks


@pytest.mark.parametrize(("op", "case", "gate"), checks("exact-arithmetic", "predicted"), ids=str)
def test_exact(op, case, gate, check):
    check(op, case, gate)
