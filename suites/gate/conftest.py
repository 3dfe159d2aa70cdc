"""The toy model's tokens, and the command on it."""

from __future__ import annotations

import pytest
from mxharness import perplexity
from mxharness.model import toy
from mxharness.protocols import PROTOCOLS

from .. import toys
from ..toys import SAMPLE, TOY


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> perplexity.Reading:
    return toys.reading(monkeypatch)


@pytest.fixture
def toy_command(monkeypatch, reading):
    monkeypatch.setattr("mxharness.commands.gate.load", lambda model, source: (toy.checkpoint(), SAMPLE))
    monkeypatch.setitem(PROTOCOLS, "windows-512-half", TOY)
    return ("--device", "host", "--model", "toy")
