"""A small sample of generated mutants: each is seen by some check, or changes no code, or is listed with a reason.

All of them are run by `mxharness mutants`.
"""

from __future__ import annotations

import pytest
from mxharness.device.source import shipped
from mxharness.faults.mutants import generate, sample
from mxharness.faults.mutation import run_mutants

SEED, COUNT = 2, 8
FILES = ("quantize.cu", "dequant.cu", "elementary.cu", "rope.cuh")
"""Whose kernels compile and run in a moment."""


@pytest.mark.long
def test_mutants_are_seen():
    found = [mutant for file in FILES for mutant in generate(shipped(), file=file)]
    results = run_mutants(sample(found, COUNT, SEED), "host")
    survived = [f"{r.mutant.file}:{r.line}: {r.before} -> {r.after}" for r in results if r.tried.verdict == "survived"]
    assert survived == []
    assert sum(result.tried.verdict == "killed" for result in results) >= COUNT // 2
