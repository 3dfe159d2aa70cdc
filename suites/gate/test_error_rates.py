"""How often the gate is wrong: simulated, and from a file of differences."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from mxharness.errors import UserError
from mxharness.gate import simulate

from .made import run


def test_simulated_rates_are_those_of_the_design():
    """Windows that vary as bf16 rounding makes them: 21 suffice for a margin of 0.5 % at 95 % either way."""
    pool = np.random.default_rng(1).normal(size=592) * math.log1p(0.005) * math.sqrt(21) / 3.29
    none, margin, twice, gain = simulate.rates(pool + 0.02, (0.0, 0.005, 0.01, -0.01), 0.005, trials=150)
    assert none.ended == {"pass": 1.0}
    assert none.windows == 64
    assert 0 < margin.once["pass"] < 0.15
    assert margin.ended["fail"] > 0.5
    assert margin.windows > 64
    assert margin.once["inconclusive"] > margin.ended.get("inconclusive", 0) + 0.1
    assert twice.ended == {"fail": 1.0}
    assert gain.ended == {"drift": 1.0}
    assert sum(margin.once.values()) == pytest.approx(1) == sum(margin.ended.values())
    with pytest.raises(UserError, match="two windows or more, not of 1"):
        simulate.rates([0.1], (0.0,), 0.005)


def test_the_command_simulates_from_a_file(capsys, tmp_path):
    path = tmp_path / "differences.json"
    path.write_text(
        json.dumps({"api_version": 1, "candidates": {"a": {"margin": 0.005, "differences": [0.001, -0.001]}}})
    )
    code, out = run(capsys, "gate", "simulate", str(path), "--trials", "5", "--json")
    found = json.loads(out)["rates"]
    assert code == 0
    assert [row["change"] for row in found] == [0.0, 0.0025, 0.005, 0.01, -0.01]
    assert found[0]["ended"] == {"pass": 1.0}


@pytest.mark.parametrize(
    "candidates",
    [None, {}, {"a": 3}, {"a": {}}, {"a": {"margin": "x", "differences": [1, 2]}}, {"a": {"margin": 0.005}},
     {"a": {"margin": 0.005, "differences": [1, None]}}, {"a": {"margin": -1, "differences": [1, 2]}},
     {"a": {"margin": 0.005, "differences": [1, math.nan]}}],
)  # fmt: skip
def test_a_file_without_differences_is_one_sentence(tmp_path, candidates):
    path = tmp_path / "differences.json"
    path.write_text(json.dumps({"api_version": 1, "candidates": candidates}))
    with pytest.raises(UserError, match="is no file of differences: candidates, each with a margin and a list"):
        simulate.read(path)
