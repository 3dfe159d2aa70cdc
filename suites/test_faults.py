"""Planted bugs of other projects: each is caught, by the check that should see it first."""

from __future__ import annotations

import pytest
from mxharness.faults import FAULTS
from mxharness.faults.detectors import CHECKED


def slow(fault):
    """Only checked libraries show it, after everything else."""
    return [pytest.mark.long] if fault.detector in CHECKED else []


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name, marks=slow(fault)) for fault in FAULTS])
def test_fault_is_caught(fault, plant):
    result = plant(fault)
    assert result.caught, f"{fault.name} survived {result.checks} checks: {fault.symptom}"
    assert result.detector == result.expected_detector, result.message
    assert fault.pattern in result.message
