"""Every operator, every case: exact where it must be exact, within its a-priori bound elsewhere."""

from __future__ import annotations

import pytest

from mxharness.judge import checks


@pytest.mark.parametrize(("op", "case", "gate"), checks("exact", "bound"), ids=str)
def test_accuracy(op, case, gate, check):
    check(op, case, gate)
