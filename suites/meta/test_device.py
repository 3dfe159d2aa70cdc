"""The two devices: what they say when something is missing, and that memory and barriers are watched."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mxharness import functional, mxfp4
from mxharness.device import cuda, host, open_device, toolchain
from mxharness.device.source import shipped
from mxharness.errors import KernelFailure, Unavailable, UserError
from mxharness.execution import Fenced, execute, scales_aligned
from mxharness.faults.detectors import cheapest_first
from mxharness.judge import digest, judge
from mxharness.op import Case
from mxharness.ops import OPS, find


@pytest.fixture(scope="module")
def cpu():
    return open_device("host")


def test_unknown_device_lists_what_exists():
    with pytest.raises(UserError, match=r"no device 'tpu'; there are host, cuda and auto"):
        open_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: what is said without one was not seen")
def test_cuda_without_a_gpu_fails_and_never_falls_back():
    with pytest.raises(Unavailable, match="no CUDA device"):
        open_device("cuda")


def test_fast_mode_is_the_hosts_alone():
    with pytest.raises(UserError, match="the float32 mode exists on the host device only"):
        open_device("cuda", fast=True)


def test_missing_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    toolchain.compiler.cache_clear()
    try:
        with pytest.raises(Unavailable, match="needs a C\\+\\+ compiler; install g\\+\\+"):
            open_device("host")
    finally:
        toolchain.compiler.cache_clear()


def test_missing_headers_say_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain, "TOOLKIT", Path("/nonexistent"))
    toolchain.headers.cache_clear()
    try:
        with pytest.raises(Unavailable, match="pip install 'nvidia-cuda-runtime"):
            toolchain.headers()
    finally:
        toolchain.headers.cache_clear()


def test_compile_error_is_one_sentence():
    broken = shipped().replaced("mma.cu", "mma_step(", "no_such_function(")
    with pytest.raises(UserError, match=r"^kernels/mma.cu does not compile for the host: .*no_such_function") as caught:
        host.compile_library(broken, "mma.cu", fast=False)
    assert "\n" not in str(caught.value)


def test_replacing_what_is_not_there_once_is_an_error():
    with pytest.raises(UserError, match=r"occurs 0 times in kernels/gemm.cu, it must occur once"):
        shipped().replaced("gemm.cu", "no such text", "")
    with pytest.raises(UserError, match=r"no kernel file 'nothing.cu'; there are .*convert.cuh, dense_wide.cu, "):
        shipped().replaced("nothing.cu", "", "")


def test_wrong_kernel_and_arguments_are_refused(cpu):
    with pytest.raises(UserError, match=r"kernels/mma.cu has no kernel 'nothing'; there are mma_bf16, mma_fp16"):
        cpu.launch("mma.cu", "nothing", (1,), (32,))
    with pytest.raises(UserError, match=r"mma_bf16: argument 4 has 8 bytes, the kernel takes 4"):
        cpu.launch("mma.cu", "mma_bf16", (1,), (32,), None, None, None, None, np.int64(16))
    with pytest.raises(UserError, match=r"mma_bf16 takes more than the 1 arguments given"):
        cpu.launch("mma.cu", "mma_bf16", (1,), (32,), None)
    with pytest.raises(UserError, match=r"mma_bf16 takes 5 arguments, 6 were given"):
        cpu.launch("mma.cu", "mma_bf16", (1,), (32,), None, None, None, None, 16, 16)
    with pytest.raises(
        UserError, match=r"a kernel argument must be a tensor, TensorMap, int, numpy.int64, float or None, not str"
    ):
        cpu.launch("mma.cu", "mma_bf16", (1,), (32,), "text")


def test_divergent_barrier_is_named_not_waited_for():
    text = "        __syncthreads();\n        const int parts"
    early = shipped().replaced("gemm_few.cuh", text, "        if (threadIdx.x == 3) return;\n" + text)
    device = host.open_device(early)
    case = find("gemm").cases[0]
    violations = execute(find("gemm"), case, device, find("gemm").make_inputs(case)).violations
    assert len(violations) == 1
    assert "never ends: 1 of 512 threads returned, 511 wait at __syncthreads" in violations[0]
    with pytest.raises(KernelFailure):  # and the device goes on to say so
        find("gemm").launch(device, case, find("gemm").make_inputs(case))
    sound = execute(find("gemm"), case, open_device("host"), find("gemm").make_inputs(case))
    assert sound.violations == ()


@pytest.mark.parametrize(
    ("offset", "sentence"),
    [
        (0, "wrote 1 bytes past the end of output scales, the nearest 0 bytes away"),
        (256, "wrote byte 257 past the end of scales"),
        (20000, "wrote byte 20001 past the end of scales"),
        (-300, "wrote 1 bytes before the start of output scales"),
    ],
)
def test_write_beside_an_output_is_named(offset, sentence):
    change = ("quantize.cu", "    scales[block] = static_cast<std::uint8_t>(s);\n")
    broken = shipped().replaced(*change, change[1] + f"    if (block == 0) scales[(K / 32) * R + {offset}] = 0;\n")
    op, case = find("quantize"), Case("quantize", (2, 64), dtype="fp32")
    violations = execute(op, case, host.open_device(broken), op.make_inputs(case)).violations
    assert len(violations) == 1
    assert sentence in violations[0]


@pytest.mark.parametrize(("guard", "seen"), [("K % 8 == 1", True), ("K % 8 == 0", False)])
def test_a_vector_at_an_address_that_is_no_multiple_of_its_size_is_named(guard, seen):
    """A GPU faults there; a CPU takes any address."""
    op, case = find("quantize"), Case("quantize", (3, 49), dtype="fp32")
    text = shipped().replaced("quantize.cu", "if (K % 8 == 0 &&", f"if ({guard} &&")
    violations = execute(op, case, host.open_device(text), op.make_inputs(case)).violations
    sentence = "accessed a vector of 16 bytes at an address that is no multiple of 16"
    assert [sentence in violation for violation in violations] == [True] * seen


def test_outputs_and_inputs_have_no_more_alignment_than_promised(cpu):
    fenced = Fenced(cpu, placement="start")
    assert fenced.empty((4, 4), torch.float32).data_ptr() % 32 == 16
    assert fenced.upload(torch.zeros(64)).data_ptr() % 32 == 16
    assert fenced.upload(torch.zeros(64, dtype=torch.uint8), aligned=False).data_ptr() % 2 == 1


def test_an_output_that_no_kernel_made_is_refused(cpu):
    op, case = find("quantize"), Case("quantize", (2, 64), dtype="fp32")
    inputs = op.make_inputs(case)
    right = execute(op, case, cpu, inputs).outputs
    for launch in (
        lambda device, case, inputs: right,
        lambda device, case, inputs: {"codes": device.empty((2, 32), torch.uint8)},
    ):
        with pytest.raises(AssertionError, match="output codes was not made by a kernel on the device's memory"):
            execute(replace(op, launch=launch), case, cpu, inputs)


def test_threads_do_not_leak_stacks(cpu):
    """Forty threads that each ran a block of 256 leave fewer mappings behind than ten of them would."""
    case = find("gemm").cases[0]
    inputs = find("gemm").make_inputs(case)
    before = len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(40):
        thread = threading.Thread(target=lambda: find("gemm").launch(cpu, case, inputs))
        thread.start()
        thread.join()
    assert len(Path("/proc/self/maps").read_text().splitlines()) - before < 10 * 256


def test_the_runtime_stands_before_no_other_library(cpu):
    """In the global scope its inline functions of the C++ library would replace those of later extension modules."""
    assert cpu.runtime.cpu_checked_launches() >= 0
    with pytest.raises(AttributeError, match="undefined symbol"):
        _ = ctypes.CDLL(None).cpu_checked_launches


def test_grids_that_no_gpu_takes_are_refused(cpu):
    for grid, block in (((0,), (32,)), ((1, 65536), (32,)), ((1,), (1025,)), ((1,), (0,))):
        with pytest.raises(UserError, match="mma_bf16: no GPU takes a grid of"):
            cpu.launch("mma.cu", "mma_bf16", grid, block, None, None, None, None, 16)


def test_what_is_compiled_is_the_text_that_names_it(tmp_path, monkeypatch):
    """Not what lies in kernels/ at that moment."""
    monkeypatch.setenv("MXHARNESS_CACHE", str(tmp_path))
    folder = shipped().folder()
    assert folder.is_relative_to(tmp_path)
    assert {path: (folder / path).read_text() for path, _ in shipped().files} == dict(shipped().files)


def test_a_cache_that_cannot_be_written_is_one_sentence(monkeypatch):
    monkeypatch.setenv("MXHARNESS_CACHE", "/proc/nothing")
    with pytest.raises(UserError, match=r"cannot write the cache .*; MXHARNESS_CACHE names another"):
        shipped().folder()


def test_write_into_an_input_is_named():
    change = ("quantize.cu", "    scales[block] = static_cast<std::uint8_t>(s);\n")
    broken = shipped().replaced(*change, change[1] + "    const_cast<T*>(x)[0] = T(1.5f);\n")
    case = Case("quantize", (2, 64), dtype="fp32")
    op = find("quantize")
    assert execute(op, case, host.open_device(broken), op.make_inputs(case)).violations == ("changed its input x",)


def test_fast_mode_has_other_bits_and_stays_within_the_bound():
    op, case = find("gemm"), Case("gemm", (33, 70, 160), regime="wide", options=("fp32",))
    inputs = op.make_inputs(case)
    fast, exact = (execute(op, case, open_device("host", fast=mode), inputs) for mode in (True, False))
    assert digest(fast.outputs) != digest(exact.outputs)
    assert judge(op, case, "bound", "host", inputs, fast).passed


def test_flush_to_zero_on_the_callers_thread_does_not_reach_kernels(cpu):
    op, case = find("dequant"), Case("dequant", (256, 64), regime="cells", dtype="fp32")
    inputs = op.make_inputs(case)
    before = execute(op, case, cpu, inputs).outputs["y"]
    assert torch.set_flush_denormal(True)
    try:
        after = execute(op, case, cpu, inputs).outputs["y"]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(before.view(torch.int32), after.view(torch.int32))


def test_an_edited_text_is_compiled_quickly_to_the_same_bits_and_files_without_it_not_again():
    edited = shipped().replaced("mma.cuh", "#pragma once\n", "#pragma once\nconstexpr int added = 0;\n")
    assert edited.included("gemm.cu") == {
        *("gemm.cu", "gemm.cuh", "gemm_few.cuh", "gemm_narrow.cuh", "gemm_tile.cuh", "async.cuh", "convert.cuh"),
        *("matrix.cuh", "mma.cuh", "mxfp4.cuh", "warp.cuh", "stream.cuh"),
        *("host/async.h", "host/tensor_core.h", "host/vector.h"),
    }
    assert host.compile_library(edited, "norm.cu", fast=False) == host.compile_library(shipped(), "norm.cu", fast=False)
    assert host.compile_library(edited, "gemm.cu", fast=False) != host.compile_library(shipped(), "gemm.cu", fast=False)
    op = find("gemm")
    trying = open_device("host", sources=edited)
    for case in op.cases[::7]:
        inputs = op.make_inputs(case)
        both = (execute(op, case, device, inputs) for device in (open_device("host"), trying))
        assert len({digest(execution.outputs) for execution in both}) == 1, case
    for (source, kernel), library in trying._libraries.items():
        path = host.compile_library(edited, source, fast=False, optimised=False, kernel=kernel)
        assert library._name == str(path)
        assert [name for name in shipped().kernels(source) if hasattr(library, f"launch_{name}")] == [kernel]
    assert "gemm.cu" in {source for source, _ in trying._libraries}


@pytest.mark.parametrize(
    ("source", "architecture"),
    [*((source, "sm_80") for source in shipped().names()), ("attention.cu", "sm_90a"), ("gemm.cu", "sm_90a")],
)
def test_every_kernel_compiles_for_the_gpu(source, architecture):
    """For the oldest architecture all of them: what it takes, later ones take, as the next test shows."""
    if toolchain.nvcc() is None:
        pytest.skip(f"no nvcc: kernels were not compiled for {architecture}")
    assert cuda.compile_cubin(shipped(), source, architecture).stat().st_size > 0


def test_no_kernel_asks_for_an_architecture_and_few_files_hold_its_instructions():
    """PTX without either means the same to every later GPU; attention.cu and gemm.cu use that file's instructions."""
    texts = {path: text for path, text in shipped().files if not path.startswith("host/")}
    with_a_way_out = [path for path, text in texts.items() if "_CUDA_ARCH" in text]
    assert with_a_way_out == ["tensor_map.cuh", "wgmma.cuh"]
    assert [path for path, text in texts.items() if "asm" in text] == [
        "activation.cuh",
        "async.cuh",
        "attention.cuh",
        "gemm_stage.cuh",
        "matrix.cuh",
        "mma.cuh",
        "operand.cuh",
        "stream.cuh",
        "tensor_map.cuh",
        "weights.cuh",
        "wgmma.cuh",
    ]
    for source in ("attention.cu", "gemm.cu"):
        assert "mma.cuh" in shipped().included(source)


def bad_calls():
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    codes, scales = torch.zeros(8, 32, dtype=torch.uint8), torch.zeros(8, 2, dtype=torch.uint8)
    w = mxfp4.Quantized(codes, scales)
    yield functional.gemm, (x.float(), w), "x must be bfloat16 or float16, not torch.float32"
    yield functional.gemm, (x[:, :32].contiguous(), w), r"x must be \(M, 64\)"
    yield functional.gemm, (x[:0], w), "with at least one row"
    yield functional.gemm, (x, (codes, scales[:, :1])), r"codes must be \(N, K/2\) and scales \(N, K/32\)"
    yield functional.gemm, (x, (codes.int(), scales)), "codes and scales must be uint8"
    yield functional.gemm, (x, (codes.T.contiguous().T, scales)), "codes must be contiguous, it has strides"
    shifted = torch.zeros(129, dtype=torch.bfloat16)[1:].view(2, 64)
    yield functional.gemm, (shifted, w), "x must be 16-byte aligned, its address is 2 past"
    yield functional.gemm_bias, (x, w, torch.zeros(7)), r"bias must be float32 of shape \(8,\)"
    yield functional.gemm, (x.to("meta"), w), "x is on meta, the kernels run on cpu"
    yield functional.dequantize, (w, torch.float64), "dequantize gives float32, bfloat16 or float16"
    yield functional.dequantize, (w, torch.float32, 32), r"K = 32 does not fit codes of 64 columns; .* 33..64"
    yield functional.quantize, (x[0],), r"quantize takes a matrix .* not shape \(64,\)"
    yield functional.quantize, (x.double(),), "quantize takes float32, bfloat16 or float16, not torch.float64"
    yield functional.quantize, (x, "round"), r"no rule \(round, even\); scale rules are floor, even, rceil, ceil"


@pytest.mark.parametrize(("function", "arguments", "sentence"), list(bad_calls()))
def test_bad_input_is_one_sentence_before_any_launch(function, arguments, sentence, cpu):
    with pytest.raises(UserError, match=sentence):
        function(*arguments, device=cpu)


def test_scales_lie_where_several_are_read_at_once_and_where_they_cannot_be():
    found = {}
    for op in OPS:
        if any("scales" in name for name in op.make_inputs(cheapest_first((op,))[0][1])):
            found[op.name] = {scales_aligned(case) for case in op.cases}
    assert len(found) > 20
    assert set(map(frozenset, found.values())) == {frozenset({False, True})}
