"""Planted bugs of other projects: each is caught, by the check that should see it first."""

from __future__ import annotations

import pytest
from mxharness.faults import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_caught(fault, plant):
    result = plant(fault)
    assert result.caught, f"{fault.name} survived {result.checks} checks: {fault.symptom}"
    if result.detector != "memory":  # an access outside is seen before any number is judged; by guard pages also a read
        assert result.detector == result.expected_detector
        assert fault.pattern in result.message
