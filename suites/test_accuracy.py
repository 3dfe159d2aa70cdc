"""Every operator, every case: exact where it must be exact, within its a-priori bound elsewhere."""

from __future__ import annotations

import pytest


@pytest.mark.gates("exact", "bound", "composed")
def test_accuracy(op, case, gate, check):
    check(op, case, gate)
