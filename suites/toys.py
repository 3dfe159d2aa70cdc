"""A protocol and a text so small that the toy model is measured on them in a moment."""

from __future__ import annotations

import pytest
from mxharness import perplexity, text
from mxharness.model import toy
from mxharness.protocols import PROTOCOLS, Protocol

TOY = Protocol("toy", 32, 32, 17, 17, False, "windows of 32, second half")


def sample(repeats: int) -> text.Text:
    """A sentence so many times, 44 tokens of the toy's each: digits, a special token, two bytes for one letter."""
    sentence = "In 2004, 1 of 12 bytes <|end|> were naïve.\n"
    return text.Text("sample", "sample (not WikiText-2)", sentence * repeats, "0" * 64)


SAMPLE = sample(40)


def reading(monkeypatch: pytest.MonkeyPatch) -> perplexity.Reading:
    """Of the toy, 1,760 tokens; for the time of a test its protocol is one of those that can be named."""
    monkeypatch.setitem(PROTOCOLS, "toy", TOY)
    return perplexity.read(toy.checkpoint(), SAMPLE, "toy")
