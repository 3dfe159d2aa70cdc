"""Windows made for a verdict, and the command: what tests of the gate share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mxharness import cli
from mxharness.gate.verdict import Rules, Window
from mxharness.protocols import Span

RULES = Rules(0.005)
CPU = torch.device("cpu")


def windows(change, spread, count=64, kl=1e-3, same=1.0, seed=0):
    """Windows of 255 tokens whose mean NLL moves by exactly `change` on average, by `spread` between windows."""
    generator = np.random.default_rng(seed)
    moves = generator.normal(size=count)
    moves = change + spread * (moves - moves.mean()) / moves.std(ddof=1)
    made = []
    for i, move in enumerate(moves):
        base = generator.exponential(3.0, 255)
        agree = (np.arange(255) < round(255 * same)).astype(float)
        span = Span(512 * i, 512 * i + 512, 512 * i + 257)
        made.append(Window(span, base, base + move, np.full(255, kl), np.full(255, kl), agree))
    return made


def run(capsys, *arguments):
    """Exit code and output of a command line, in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code, capsys.readouterr().out
