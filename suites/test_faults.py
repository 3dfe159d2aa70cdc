"""Planted bugs of other projects: each is caught, by the check that should see it first."""

from __future__ import annotations

import pytest
from mxharness.faults import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_caught(fault, plant):
    result = plant(fault)
    assert result.caught, f"{fault.name} survived {result.checks} checks: {fault.symptom}"
    assert result.detector == result.expected_detector, result.message
    assert fault.pattern in result.message
