"""The toy model, and its protocol among those that can be named."""

from __future__ import annotations

import pytest
from mxharness.model import toy as toy_model
from mxharness.model.checkpoint import Checkpoint
from mxharness.protocols import PROTOCOLS

from ..toys import TOY


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setitem(PROTOCOLS, "toy", TOY)
    return toy_model.checkpoint()
