"""A small sample of generated mutants: each is seen by some check, or changes no code, or is listed with a reason.

All of them are run by `mxharness mutants`.
"""

from __future__ import annotations

import pytest
from mxharness.device.source import shipped
from mxharness.mutants import generate, sample
from mxharness.mutation import run_mutants

SEED, COUNT = 1, 12
FILES = ("quantize.cu", "dequant.cu", "norm.cu", "ffn.cu", "elementary.cu", "rope.cuh")
"""Whose kernels compile and run in a moment."""


def chosen():
    found = [mutant for file in FILES for mutant in generate(shipped(), file=file)]
    return [mutant for mutant in sample(found, 4 * COUNT, SEED) if mutant.operator != "type"][::3][:COUNT]


@pytest.mark.parametrize("mutant", chosen(), ids=lambda m: f"{m.file}-{m.operator.replace(' ', '-')}-{m.start}")
def test_mutant_is_seen(mutant):
    (result,) = run_mutants([mutant], "host")
    assert result.tried.verdict != "survived", f"{mutant.file}:{result.line}: {result.before} -> {result.after}"
