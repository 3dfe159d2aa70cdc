"""Where modules and their inputs lie, and the seed of their random weights."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def where(device):
    """The torch device on which modules and inputs lie."""
    return device.torch_device


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
