"""What every store shares: names, texts, and the sentence for a name that is taken."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mxharness.errors import UserError

Texts = Mapping[str, str]
"""File stem to the text of its JSON document."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DEVICE_CLASS = re.compile(r"host|sm_[0-9]{2,3}[a-z]?")


def exists(device_class: str, name: str) -> UserError:
    """What to raise for a name that is taken."""
    return UserError(f"baseline {device_class}/{name} exists; --replace blesses this run in its place")
