"""Every contraction: the exact result where no order can change it, the predicted bits on any data."""

from __future__ import annotations

import pytest


@pytest.mark.gates("exact-arithmetic", "predicted")
def test_exact(op, case, gate, check):
    check(op, case, gate)
