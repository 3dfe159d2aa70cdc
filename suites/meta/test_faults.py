"""The fault runner: a fault is caught only by what the healthy kernel passes, and only if it was planted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from mxharness import faults
from mxharness.device.source import shipped
from mxharness.errors import UserError
from mxharness.faults import FAULTS, run_fault, select
from mxharness.planted.fault import KernelChange

FAULT = next(fault for fault in FAULTS if fault.name == "linear-code-table")


def test_a_change_without_effect_survives():
    harmless = replace(FAULT, change=KernelChange("dequant.cu", "// Dequantise MXFP4", "// Decode MXFP4"))
    result = run_fault(harmless, "host")
    assert (result.caught, result.detector) == (False, "")
    assert result.checks > 20


def test_a_broken_healthy_kernel_catches_nothing(monkeypatch):
    broken = shipped().replaced("mxfp4.cuh", "    if (s == 0) return", "    s += 1;\n    if (s == 0) return")
    opened = faults.open_device
    monkeypatch.setattr(faults, "open_device", lambda name, sources=None: opened(name, sources=sources or broken))
    result = run_fault(FAULT, "host")
    assert not result.caught
    assert result.message.startswith("without the fault the same case fails too, which proves nothing: dequant")


def test_a_fault_whose_text_is_gone_is_an_error():
    gone = replace(FAULT, change=KernelChange("dequant.cu", "no such text", ""))
    with pytest.raises(UserError, match=r"occurs 0 times in kernels/dequant\.cu"):
        run_fault(gone, "host")


def test_undefined_behaviour_is_planted_where_it_shows(monkeypatch):
    asked = []
    opened = faults.open_device
    monkeypatch.setattr(faults, "open_device", lambda name, sources=None: asked.append(name) or opened("host"))
    assert run_fault(replace(FAULT, undefined=True), "cuda").device == "host"
    run_fault(FAULT, "cuda")
    assert asked[0] == "host"
    assert set(asked[-1:]) == {"cuda"}


def test_names_are_selected_or_refused():
    assert select(None) == FAULTS
    assert select(["linear-code-table"]) == (FAULT,)
    with pytest.raises(UserError, match="no fault 'nothing'; there are gguf-nibbles-read-as-linear, "):
        select(["nothing"])
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
