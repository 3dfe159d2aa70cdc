"""The host device with a meter, and few copies of what is timed on it."""

from __future__ import annotations

import pytest
from mxharness import timing
from mxharness.bench import work
from mxharness.device import open_device
from mxharness.device.meter import Meter


@pytest.fixture
def few_copies(monkeypatch):
    """Up to five copies, fewer of what is larger: a cache of 8 kB is left cold."""
    monkeypatch.setattr(timing, "WORKING_SET", 8192)
    monkeypatch.setattr(timing, "MOST_COPIES", 5)
    yield
    work.released()


@pytest.fixture
def meter():
    return Meter(open_device("host"))
