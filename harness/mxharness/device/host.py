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
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mxharness.device import presence
from mxharness.device.argument import argument_cells, kernel_argument
from mxharness.device.source import Sources, compiled, shipped
from mxharness.device.tensor_map import host_map
from mxharness.device.toolchain import compiler, compiler_version, headers
from mxharness.errors import Hung, KernelFailure, OutOfBounds, Unavailable, UserError
from mxharness.tensor_core import Unit

FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",  # every operator is one rounding, as with nvcc -fmad=false
    "-U_FORTIFY_SOURCE",  # glibc's checked longjmp, on by default on Ubuntu, takes a switch of fibers for an error
    "-fno-strict-aliasing",  # kernels read packed codes and 16-bit pairs as wider words, as CUDA code does
    "-fstack-clash-protection",  # a frame larger than a page touches the one beyond the stack, not what lies behind it
    "-fvisibility=hidden",  # or the loader would share template statics (__shared__ arrays) between libraries
    "-fPIC",
    "-shared",
    "-w",  # NVIDIA's headers and CUDA's pragmas; nvcc is the compiler whose warnings count
)
QUICK_FLAGS = (*(flag for flag in FLAGS if flag != "-O3"), "-O1", "-ftree-vectorize")
"""For texts that are run a few times, as planted faults: compiled in a third of the time, the same bits."""
CHECKED_FLAGS = (
    *(flag for flag in FLAGS if flag not in ("-O3", "-shared")),
    "-O1",
    "-g1",  # lines, for the places of what is undefined
    "-fsanitize=thread,undefined,float-cast-overflow",  # for the calls that hooks.cpp answers
    "-fno-sanitize=vptr",
    "-c",
)
CHECKS = {"memcheck": 1, "racecheck": 2, "initcheck": 4, "undefined": 8}
"""What a checked library looks for (kernels/host/checker.cpp), by the names of NVIDIA's tools where there are some."""
_RUNTIME = ("runtime.cpp", "launch.cpp", "traps.cpp", "checker.cpp")


@dataclass(frozen=True)
class Settings:
    """How the host device runs its launches."""

    seed: int = 0
    """Of the order of blocks and threads; 0: ascending."""
    seconds: float = 300.0
    """A launch may take; then it is a KernelFailure. 0: for ever."""
    poison: int | None = None
    """The byte that shared memory is filled with before every block. Asynchronous copies are then made as late as they
    may be, with poison in their place until then. None: neither."""
    checks: frozenset[str] = frozenset()
    """Of CHECKS: every memory access of the kernels is checked, by slower libraries and on one thread."""


class Failure(IntEnum):
    """What ended a launch, as kernels/host/runtime.h numbers it."""

    KERNEL = 1
    ACCESS = 2
    """To memory, at an address."""
    TIME = 3


@cache
def _loop_flags() -> tuple[str, ...]:
    """GCC's: without it loops over a thread's few elements are unrolled too early to become vector instructions."""
    return () if "clang" in compiler_version() else ("-fdisable-tree-cunrolli",)


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
def _runtime_path(folder: str) -> Path:
    """The compiled runtime, which every library of kernels names as its own dependency.

    Found in no other way: in the process's global scope its copies of the C++ library's inline functions would stand
    before those of every extension module that is loaded later.
    """
    host = Path(folder) / "host"
    include = ["-I", folder, "-I", str(host), *_include()]
    command = [compiler(), *FLAGS, "-pthread", *include, *(str(host / name) for name in _RUNTIME), "-lrt"]
    text = "\0".join((host / name).read_text() for name in ("context.h", "cuda_on_cpu.h", "runtime.h", *_RUNTIME))
    return compiled(
        "host", ".so", (text, *FLAGS, *_tool_key()), lambda out: _build([*command, "-o", str(out)], "", "runtime.cpp")
    )


@cache
def _runtime(folder: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(_runtime_path(folder)))
    library.cpu_settings.argtypes = (ctypes.c_uint64, ctypes.c_double, ctypes.c_int, ctypes.c_uint)
    library.cpu_settings.restype = None
    library.cpu_error_address.restype = ctypes.c_uint64
    library.cpu_watch.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_bool)
    library.cpu_watch.restype = ctypes.c_bool
    library.cpu_unwatch.argtypes = (ctypes.c_uint64,)
    library.cpu_note_written.argtypes = (ctypes.c_uint64, ctypes.c_ubyte)
    library.cpu_checked_launches.restype = ctypes.c_uint64
    library.cpu_set_threads(len(os.sched_getaffinity(0)))
    return library


@cache
def _local_poison() -> tuple[str, ...]:
    """The flag that fills locals with a pattern, where the compiler has it (g++ 12, clang 8)."""
    flag = "-ftrivial-auto-var-init=pattern"
    command = [compiler(), flag, "-x", "c++", "-fsyntax-only", "-"]
    return (
        (flag,)
        if subprocess.run(command, input="", capture_output=True, text=True, check=False).returncode == 0
        else ()
    )


def _system_headers(folder: Path, flags: list[str]) -> list[str]:
    """Have what cuda_on_cpu.h includes of the system read precompiled, half of a quick compilation; by GCC alone.

    GCC reads the header itself wherever it finds the precompiled one to be of no use.
    """
    if "clang" in compiler_version():
        return []
    lines = (folder / "host" / "cuda_on_cpu.h").read_text().splitlines(keepends=True)
    text = "".join(line for line in lines if line.startswith(("#include <", "#ifdef __AVX__", "#endif  // __AVX__")))
    key = (text, *flags, *_tool_key())
    header = compiled("host", ".h", key, lambda out: out.write_text(text))
    command = [compiler(), *(flag for flag in flags if flag != "-shared"), *_include(), "-x", "c++-header", str(header)]
    compiled("host", ".h.gch", key, lambda out: _build([*command, "-o", str(out)], "", "cuda_on_cpu.h"))
    return ["-include", str(header)]


def _unit_flags(unit: Unit) -> list[str]:
    """Compile kernels/host/tensor_core.h as `unit`, of which it takes the first four fields."""
    rules = {"truncate": 0, "floor": 1, "nearest": 2}
    return [
        f"-DCPU_MMA_STEP={unit.step}",
        f"-DCPU_MMA_FRACTION_BITS={unit.fraction_bits}",
        f"-DCPU_MMA_ALIGNMENT={rules[unit.alignment]}",
        f"-DCPU_MMA_ROUNDING={rules[unit.rounding]}",
    ]


def _texts(name: str) -> tuple[str, ...]:
    return (name, "host/cuda_on_cpu.h", "host/hooks.cpp")


def compile_library(
    sources: Sources,
    name: str,
    *,
    fast: bool,
    unit: Unit | None = None,
    checked: bool = False,
    optimised: bool = True,
    kernel: str | None = None,
) -> Path:
    """Compile kernels/`name` for the CPU; the cached shared library. UserError with the first error otherwise.

    checked: with a call before every memory access, and locals filled with a pattern.
    optimised: all the way.
    kernel: the only one that the library has; None: all of the file's.
    """
    folder = sources.folder()
    signature = "(const unsigned* grid, const unsigned* block, void* const* arguments)"
    entries = "".join(
        f'extern "C" CPU_SHARED const char* launch_{kernel}{signature} '
        f"{{ return cpu::run(grid, block, cpu::Entry<&{kernel}>::body, arguments); }}\n"
        f'extern "C" CPU_SHARED const unsigned* sizes_{kernel}() {{ return cpu::Entry<&{kernel}>::sizes; }}\n'
        for kernel in ([kernel] if kernel else sources.kernels(name))
    )
    # GCC leaves inline functions out that nothing uses.
    others = "#undef __global__\n#define __global__ inline\n" if kernel else ""
    text = f'#include "host/cuda_on_cpu.h"\n{others}#include "{name}"\n{entries}'
    mode = [*(["-DCPU_FLOAT32_MMA"] if fast else []), *(_unit_flags(unit) if unit else [])]
    digest = sources.digest(*_texts(name))
    flags = [*FLAGS, *_loop_flags()] if optimised else list(QUICK_FLAGS)
    if checked:
        flags = [*CHECKED_FLAGS, *_local_poison()]

    runtime = str(_runtime_path(str(shipped().folder())))

    def build(out: Path) -> None:
        # A few optimised libraries are not worth the 30 MB of a precompiled header.
        precompiled = _system_headers(folder, flags) if checked or not optimised else []
        include = [*precompiled, "-I", str(folder), *_include()]
        command = [compiler(), *flags, *mode, "-x", "c++", *include, "-"]
        if not checked:
            return _build([*command, "-x", "none", runtime, "-o", str(out)], text, f"kernels/{name}")
        kernels = out.with_suffix(".o")
        try:
            _build([*command, "-o", str(kernels)], text, f"kernels/{name}")
            hooks = [compiler(), *FLAGS, str(folder / "host" / "hooks.cpp"), str(kernels), runtime, "-o", str(out)]
            _build(hooks, "", "hooks.cpp")
        finally:
            kernels.unlink(missing_ok=True)

    return compiled("host", ".so", (text, digest, *flags, *mode, runtime, *_tool_key()), build)


class HostDevice:
    """Runs kernels on the CPU. Launches return when the kernel has ended."""

    name = "host"
    device_class = "host"
    torch_device = torch.device("cpu")

    def __init__(
        self,
        sources: Sources,
        *,
        fast: bool,
        unit: Unit | None = None,
        settings: Settings | None = None,
        optimised: bool | None = None,
    ) -> None:
        """optimised: whether its libraries are; None: those of a file that is, with its headers, as in kernels/."""
        self.sources = sources
        self.settings = settings or Settings()
        self.unit = unit
        self.fast = fast
        self.optimised = optimised
        self.arithmetic = "float32" if fast else "tensor-core"
        self._libraries: dict[tuple[str, str], ctypes.CDLL] = {}
        self.runtime = _runtime(str(shipped().folder()))

    def configured(self, **changes: Any) -> HostDevice:  # noqa: ANN401  dataclasses.replace's own signature
        """The same kernels under other settings."""
        settings = replace(self.settings, **changes)
        other = HostDevice(self.sources, fast=self.fast, unit=self.unit, settings=settings, optimised=self.optimised)
        if bool(other.settings.checks) == bool(self.settings.checks):
            other._libraries = self._libraries
        return other

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

        UserError for arguments it does not take, KernelFailure for a block that never ends, OutOfBounds for an access
        that the memory did not allow.
        """
        library = self._library(source, kernel)
        size_function = getattr(library, f"sizes_{kernel}")
        size_function.restype = ctypes.POINTER(ctypes.c_uint)
        _check_sizes(kernel, grid, block)
        values = [kernel_argument(argument, host_map) for argument in arguments]
        sizes = size_function()
        for i, value in enumerate(values):
            if sizes[i] == 0:
                raise UserError(f"{kernel} takes {i} arguments, {len(values)} were given")
            if sizes[i] != value.nbytes:
                raise UserError(f"{kernel}: argument {i} has {value.nbytes} bytes, the kernel takes {sizes[i]}")
        if sizes[len(values)] != 0:
            raise UserError(f"{kernel} takes more than the {len(values)} arguments given")
        cells = argument_cells(values)
        function = getattr(library, f"launch_{kernel}")
        function.restype = ctypes.c_char_p
        settings = self.settings
        checks = sum(CHECKS[name] for name in settings.checks)
        poison = -1 if settings.poison is None else settings.poison
        self.runtime.cpu_settings(settings.seed, settings.seconds, poison, checks)
        message = function(_three(grid), _three(block), cells)
        if message is not None:
            text = f"{kernel}: {message.decode()}"
            match self.runtime.cpu_error_kind():
                case Failure.ACCESS:
                    raise OutOfBounds(text, self.runtime.cpu_error_address())
                case Failure.TIME:
                    raise Hung(text)
                case _:
                    raise KernelFailure(text)

    def watch(self, tensor: torch.Tensor, *, written: bool) -> None:
        """Let checked kernels touch a tensor's bytes, all of which count as written or none."""
        if not self.runtime.cpu_watch(tensor.data_ptr(), tensor.numel() * tensor.element_size(), written):
            raise Unavailable(f"the system has no memory to check {tensor.numel() * tensor.element_size():,} bytes")

    def unwatch(self, tensor: torch.Tensor) -> None:
        """Let them no more."""
        self.runtime.cpu_unwatch(tensor.data_ptr())

    def note_written(self, tensor: torch.Tensor, poison: int) -> None:
        """Count as written the bytes that are no longer poison: somebody else than a kernel has written them."""
        self.runtime.cpu_note_written(tensor.data_ptr(), poison)

    @property
    def checked_launches(self) -> int:
        """Launches of which the checker saw an access, since the process began."""
        return int(self.runtime.cpu_checked_launches())

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def _library(self, source: str, kernel: str) -> ctypes.CDLL:
        """With all kernels of a file; with one where most are not wanted: of texts to be tried, and checked."""
        if (source, kernel) not in self._libraries:
            if kernel not in (known := self.sources.kernels(source)):
                raise UserError(f"kernels/{source} has no kernel '{kernel}'; there are {', '.join(known)}")
            checked, optimised = bool(self.settings.checks), self.optimised
            if optimised is None:
                optimised = self.sources.digest(*_texts(source)) == shipped().digest(*_texts(source))
            path = compile_library(
                self.sources,
                source,
                fast=self.fast,
                unit=self.unit,
                checked=checked,
                optimised=optimised,
                kernel=None if optimised and not checked else kernel,
            )
            self._libraries[source, kernel] = ctypes.CDLL(str(path))
        return self._libraries[source, kernel]


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
    if reason := presence.host():
        raise Unavailable(reason)
    return HostDevice(sources or shipped(), fast=fast, unit=unit)
