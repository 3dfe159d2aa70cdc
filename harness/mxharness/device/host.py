"""The host device: the kernels of kernels/ compiled for the CPU, with a Hopper tensor core's bits.

Each .cu file becomes a shared library (kernels/host/ holds the CUDA execution model) that ctypes loads. Needs a C++17
compiler (tried: g++ 11, 12 and 13, clang++ 14 and 16) and NVIDIA's header files, from a toolkit or from the wheels
nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import torch

from mxharness.device.argument import kernel_argument
from mxharness.device.source import Sources, compiled, shipped
from mxharness.device.toolchain import compiler, compiler_version, headers
from mxharness.errors import KernelFailure, Unavailable, UserError
from mxharness.tensor_core import Unit

FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",  # every operator is one rounding, as with nvcc -fmad=false
    "-U_FORTIFY_SOURCE",  # glibc's checked longjmp, on by default on Ubuntu, takes a switch of fibers for an error
    "-fno-strict-aliasing",  # kernels read packed codes and 16-bit pairs as wider words, as CUDA code does
    "-fvisibility=hidden",  # or the loader would share template statics (__shared__ arrays) between libraries
    "-fPIC",
    "-shared",
    "-w",  # NVIDIA's headers and CUDA's pragmas; nvcc is the compiler whose warnings count
)


def missing() -> str | None:
    """What this machine lacks for the host device, with what to install; None where nothing."""
    try:
        compiler()
        headers()
    except Unavailable as reason:
        return str(reason)
    return None


def _include() -> tuple[str, ...]:
    return ("-I", str(headers()), "-I", str(headers() / "cccl"))


@cache
def _tool_key() -> tuple[str, ...]:
    header_size = str((headers() / "cuda_fp16.h").stat().st_size)
    return (compiler(), compiler_version(), str(headers()), header_size, _cpu())


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _build(command: list[str], text: str, what: str) -> None:
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        raise UserError(f"{what} does not compile for the host: {errors[0] if errors else 'no message'}")


@cache
def _runtime(folder: str) -> ctypes.CDLL:
    source = Path(folder) / "host" / "runtime.cpp"
    include = ["-I", folder, "-I", str(source.parent), *_include()]
    command = [compiler(), *FLAGS, "-pthread", *include, str(source)]
    text = source.read_text() + (source.parent / "cuda_on_cpu.h").read_text()
    path = compiled(
        "host", ".so", (text, *FLAGS, *_tool_key()), lambda out: _build([*command, "-o", str(out)], "", "runtime.cpp")
    )
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.cpu_set_threads(len(os.sched_getaffinity(0)))
    return library


def _unit_flags(unit: Unit) -> list[str]:
    """Compile kernels/host/tensor_core.h as `unit`, of which it takes the first four fields."""
    rules = {"truncate": 0, "floor": 1, "nearest": 2}
    return [
        f"-DCPU_MMA_STEP={unit.step}",
        f"-DCPU_MMA_FRACTION_BITS={unit.fraction_bits}",
        f"-DCPU_MMA_ALIGNMENT={rules[unit.alignment]}",
        f"-DCPU_MMA_ROUNDING={rules[unit.rounding]}",
    ]


def compile_library(sources: Sources, name: str, *, fast: bool, unit: Unit | None = None) -> Path:
    """Compile kernels/`name` for the CPU; the cached shared library. UserError with the first error otherwise."""
    folder = sources.folder()
    signature = "(const unsigned* grid, const unsigned* block, void* const* arguments)"
    entries = "".join(
        f'extern "C" CPU_SHARED const char* launch_{kernel}{signature} '
        f"{{ return cpu::run(grid, block, cpu::Entry<&{kernel}>::body, arguments); }}\n"
        f'extern "C" CPU_SHARED const unsigned* sizes_{kernel}() {{ return cpu::Entry<&{kernel}>::sizes; }}\n'
        for kernel in sources.kernels(name)
    )
    text = f'#include "host/cuda_on_cpu.h"\n#include "{name}"\n{entries}'
    flags = [*FLAGS, *(["-DCPU_FLOAT32_MMA"] if fast else []), *(_unit_flags(unit) if unit else [])]
    command = [compiler(), *flags, "-x", "c++", "-I", str(folder), *_include(), "-"]
    key = (text, sources.digest(name), *flags, *_tool_key())
    return compiled("host", ".so", key, lambda out: _build([*command, "-o", str(out)], text, f"kernels/{name}"))


class HostDevice:
    """Runs kernels on the CPU. Launches return when the kernel has ended."""

    name = "host"
    device_class = "host"
    torch_device = torch.device("cpu")

    def __init__(self, sources: Sources, *, fast: bool, unit: Unit | None = None) -> None:
        self.sources = sources
        self.unit = unit
        self.fast = fast
        self.arithmetic = "float32" if fast else "tensor-core"
        self._libraries: dict[str, ctypes.CDLL] = {}
        _runtime(str(shipped().folder()))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous CPU tensor."""
        return torch.empty(shape, dtype=dtype)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous CPU copy."""
        return tensor.to("cpu", copy=True).contiguous()

    def launch(
        self, source: str, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], *arguments: object
    ) -> None:
        """Run the kernel to its end.

        UserError for arguments it does not take, KernelFailure for a block that never ends.
        """
        library = self._library(source)
        size_function = getattr(library, f"sizes_{kernel}", None)
        if size_function is None:
            known = ", ".join(self.sources.kernels(source))
            raise UserError(f"kernels/{source} has no kernel '{kernel}'; there are {known}")
        size_function.restype = ctypes.POINTER(ctypes.c_uint)
        _check_sizes(kernel, grid, block)
        values = [np.array(kernel_argument(argument)) for argument in arguments]
        sizes = size_function()
        for i, value in enumerate(values):
            if sizes[i] == 0:
                raise UserError(f"{kernel} takes {i} arguments, {len(values)} were given")
            if sizes[i] != value.nbytes:
                raise UserError(f"{kernel}: argument {i} has {value.nbytes} bytes, the kernel takes {sizes[i]}")
        if sizes[len(values)] != 0:
            raise UserError(f"{kernel} takes more than the {len(values)} arguments given")
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        function = getattr(library, f"launch_{kernel}")
        function.restype = ctypes.c_char_p
        message = function(_three(grid), _three(block), pointers)
        if message is not None:
            raise KernelFailure(f"{kernel}: {message.decode()}")

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def _library(self, source: str) -> ctypes.CDLL:
        if source not in self._libraries:
            library = compile_library(self.sources, source, fast=self.fast, unit=self.unit)
            self._libraries[source] = ctypes.CDLL(str(library))
        return self._libraries[source]


def _check_sizes(kernel: str, grid: tuple[int, ...], block: tuple[int, ...]) -> None:
    """CUDA's own limits, which the CPU would not enforce."""
    limits = zip(grid, (2**31 - 1, 65535, 65535), strict=False)
    threads = math.prod(block)
    if any(not 0 < size <= limit for size, limit in limits) or not 0 < threads <= 1024:
        raise UserError(f"{kernel}: no GPU takes a grid of {grid} blocks of {block} threads")


def _three(sizes: tuple[int, ...]) -> ctypes.Array[ctypes.c_uint]:
    return (ctypes.c_uint * 3)(*sizes, *(1,) * (3 - len(sizes)))


def open_device(sources: Sources | None = None, *, fast: bool = False, unit: Unit | None = None) -> HostDevice:
    """The host device; Unavailable, saying what to install, where it cannot be had.

    unit: another tensor core than Hopper's, for trying `mxharness probe` on it.
    """
    if reason := missing():
        raise Unavailable(reason)
    return HostDevice(sources or shipped(), fast=fast, unit=unit)
