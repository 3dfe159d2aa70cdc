"""Texts that are run a few times are compiled quickly for a GPU, to the same bits; those of kernels/ never."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mxharness import sanitize
from mxharness.device import cuda, toolchain
from mxharness.device.source import shipped
from mxharness.execution import execute
from mxharness.faults import mutation
from mxharness.judge import digest
from mxharness.op import Case
from mxharness.ops import cheapest

HELP = """
--optimize <level>                              (-O)
--Ofast-compile <level>                         (-Ofc)
        Specify fast-compile level for device code; see also --other.
"""
EDITED = shipped().replaced("dequant.cu", "// Dequantise MXFP4", "// Decode MXFP4")


@pytest.mark.parametrize(("text", "quick"), [(HELP, True), (HELP.replace("--Ofast", "--Oslow"), False)])
def test_an_nvcc_is_asked_for_the_quick_way_where_it_has_one(text, quick, tmp_path, monkeypatch):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\ncat << end\n{text}end\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(toolchain, "nvcc", lambda: str(nvcc))
    toolchain.takes.cache_clear()
    try:
        assert cuda.flags(optimised=True) == cuda.FLAGS
        assert cuda.flags(optimised=False) == ((*cuda.FLAGS, cuda.QUICK) if quick else cuda.FLAGS)
        assert not toolchain.takes("--other")
    finally:
        toolchain.takes.cache_clear()


@pytest.mark.parametrize(
    ("sources", "source", "asked", "optimised"),
    [
        (shipped(), "dequant.cu", None, True),
        (EDITED, "dequant.cu", None, False),
        (EDITED, "norm.cu", None, True),  # it includes nothing of what was edited
        (EDITED, "dequant.cu", True, True),
        (shipped(), "dequant.cu", False, False),
    ],
)
def test_a_text_that_is_not_the_one_of_kernels_is_compiled_quickly(sources, source, asked, optimised, monkeypatch):
    how = []

    def compiled(*_: object, optimised: bool) -> Path:
        how.append(optimised)
        return Path(__file__)

    monkeypatch.setattr(cuda, "compile_cubin", compiled)
    device = object.__new__(cuda.CudaDevice)  # without a GPU
    device.sources, device.architecture, device.optimised, device._modules = sources, "sm_90a", asked, {}
    module = SimpleNamespace(get_function=str)
    device._driver = SimpleNamespace(module_from_buffer=lambda _: module, LogicError=KeyError)
    device._load(source, "a_kernel")
    assert how == [optimised]


@pytest.fixture
def opened(monkeypatch):
    """How GPUs were opened that are not there."""
    how: list[bool | None] = []

    def opens(sources: object, *, optimised: bool | None = None) -> object:
        how.append(optimised)
        return SimpleNamespace(name="cuda", sources=sources, architecture="sm_90a")

    monkeypatch.setattr(cuda, "open_device", opens)
    return how


def test_mutants_are_optimised_on_a_gpu_so_that_equal_ones_are_seen(opened, monkeypatch):
    monkeypatch.setattr(mutation, "_healthy", lambda _: SimpleNamespace(name="cuda", architecture="sm_90a"))
    monkeypatch.setattr(mutation, "_compiled", lambda *_: Path(__file__))
    assert mutation.try_edit(EDITED, "dequant.cu", "cuda").verdict == "equivalent"
    assert opened == [True]


@pytest.mark.parametrize("planted", ["", "racecheck"])
def test_what_a_sanitizer_watches_is_optimised_and_so_is_its_planted_error(opened, planted):
    sanitize.visit({"ops": [], "cases": 1, "plant": planted})
    assert opened == [True]


@pytest.mark.skipif(toolchain.nvcc() is None, reason="no nvcc: nothing was compiled quickly")
def test_a_quick_cubin_is_another_file_than_an_optimised_one():
    both = [cuda.compile_cubin(shipped(), "mma.cu", "sm_90a", optimised=optimised) for optimised in (True, False)]
    assert (both[0] != both[1]) == toolchain.takes("--Ofast-compile")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: quickly compiled kernels were not run")
def test_quickly_compiled_kernels_have_the_bits_of_optimised_ones(op):
    """So that what a planted fault changes is the fault's, not the compiler's: every kernel that the operator has."""
    launched: set[tuple[str, str]] = set()
    slow, quick = (cuda.CudaDevice(shipped(), optimised=optimised) for optimised in (True, False))

    def differs(case: Case) -> bool:
        inputs = op.make_inputs(case)
        both = [execute(op, case, device, inputs) for device in (slow, quick)]
        return both[0].violations != both[1].violations or len({digest(one.outputs) for one in both}) > 1

    for case in cheapest(op):
        known = len(launched)
        op.launch(recorder := _Recorder(slow), case, {k: slow.upload(v) for k, v in op.make_inputs(case).items()})
        launched |= recorder.launched
        assert len(launched) == known or not differs(case), case
    assert launched


class _Recorder:
    """A device that notes what is launched."""

    def __init__(self, device: cuda.CudaDevice) -> None:
        self.device, self.launched = device, set()

    def __getattr__(self, name: str) -> object:
        return getattr(self.device, name)

    def launch(self, source: str, kernel: str, *arguments: object) -> None:
        self.launched.add((source, kernel))
        self.device.launch(source, kernel, *arguments)
