"""The CUDA device: PyCUDA in torch's primary context. The only module that imports pycuda.

Kernels are compiled by nvcc to a cubin that is cached under a key of source, headers, flags and nvcc version; cubins
carry no dependence on the driver. The device owns one stream, which is torch's current stream while the device is open,
so kernels and torch operations are ordered.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mxharness.device.argument import kernel_argument
from mxharness.device.presence import cuda_lacks
from mxharness.device.resources import Resources, parsed
from mxharness.device.source import Sources, compiled, shipped
from mxharness.device.tensor_map import cuda_map
from mxharness.device.toolchain import nvcc, nvcc_version, takes
from mxharness.errors import Hung, KernelFailure, Unavailable, UserError

_SPIN = 0.01
"""Seconds of waiting without a pause: most launches are done by then."""
_lost: list[str] = []
"""What took the process's context with it."""
_kept: list[dict[str, Any]] = []
"""Modules whose kernel hangs: to unload one is to wait for it."""
SECONDS = 120.0
"""For everything in the stream to end; then it counts as hung."""
_SAID = "ptxas"
"""Folder of the cache that keeps what the assembler said."""
FLAGS = ("-std=c++17", "-O3", "-fmad=false")  # no contraction: an operator is one rounding, as on the host device
QUICK = "--Ofast-compile=max"
"""For texts that are run a few times, as planted faults: compiled in a fifth of the time, the same bits."""


def missing() -> str | None:
    """What this machine lacks for the CUDA device, with what to install; None where nothing."""
    return cuda_lacks(torch.version.cuda, gpu=torch.cuda.is_available())


def hangs() -> bool:
    """Whether a kernel of this process has not ended within SECONDS."""
    return bool(_kept)


def flags(*, optimised: bool) -> tuple[str, ...]:
    """What nvcc is told of how to compile; an nvcc without the quick way optimises always."""
    return FLAGS if optimised or not takes(QUICK.partition("=")[0]) else (*FLAGS, QUICK)


def compile_cubin(sources: Sources, name: str, architecture: str, *, optimised: bool = True) -> Path:
    """Compile kernels/`name` for `architecture` ("sm_90a"); the cached cubin. Works without a GPU.

    Unavailable without nvcc; UserError with the compiler's first error.
    """
    how = flags(optimised=optimised)
    key = _key(sources, name, architecture, how)

    def build(out: Path) -> None:
        said = _nvcc(sources, name, architecture, how, out)
        compiled(_SAID, ".txt", key, lambda path: _keep(path, said))

    return compiled("cubin", ".cubin", key, build)


def resources(sources: Sources, name: str, architecture: str) -> dict[str, Resources]:
    """By kernel of kernels/`name`, registers, spills and shared memory. Needs no GPU; raises as compile_cubin."""
    key = _key(sources, name, architecture, FLAGS)

    def build(out: Path) -> None:  # for a cubin of before the assembler's words were kept
        with tempfile.TemporaryDirectory() as folder:
            _keep(out, _nvcc(sources, name, architecture, FLAGS, Path(folder) / "cubin"))

    return parsed(compiled(_SAID, ".txt", key, build).read_text(encoding="utf-8"))


def all_resources(sources: Sources, architecture: str) -> dict[str, Resources]:
    """By "file kernel", the resources of every kernel there is."""
    return {
        f"{name} {kernel}": found
        for name in sources.names()
        for kernel, found in resources(sources, name, architecture).items()
    }


def _key(sources: Sources, name: str, architecture: str, how: tuple[str, ...]) -> tuple[str, ...]:
    if nvcc() is None:
        raise Unavailable("nvcc is not installed; install the CUDA toolkit and put its bin folder on the PATH")
    return (name, sources.digest(name), *how, architecture, nvcc_version())


def _nvcc(sources: Sources, name: str, architecture: str, how: tuple[str, ...], out: Path) -> str:
    """Compile kernels/`name` to the cubin `out`; what the assembler said."""
    folder = sources.folder()
    command = [
        str(nvcc()),
        "--cubin",
        "-arch",
        architecture,
        *how,
        "-Xptxas",
        "-v",
        "-I",
        str(folder),
        "-o",
        str(out),
        str(folder / name),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        raise UserError(f"kernels/{name} does not compile for {architecture}: {errors[0] if errors else 'no message'}")
    return result.stdout + result.stderr


def _keep(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


@cache
def _stream() -> Any:  # noqa: ANN401  pycuda has no type stubs
    """The harness's stream, one for the process: torch keeps using it when a device is gone."""
    torch.cuda.init()  # type: ignore[no-untyped-call]  # torch leaves its CUDA module without types
    import pycuda.autoprimaryctx  # joins torch's primary context
    import pycuda.driver

    stream = pycuda.driver.Stream()
    torch.cuda.set_stream(torch.cuda.ExternalStream(stream.handle))  # type: ignore[no-untyped-call]  # as above
    return stream


class CudaDevice:
    """Runs kernels on torch's current GPU. Launches are asynchronous on the device's own stream."""

    name = "cuda"
    arithmetic = "tensor-core"

    def __init__(self, sources: Sources, *, optimised: bool | None = None) -> None:
        """optimised: whether its cubins are; None: those of a file that is, with its headers, as in kernels/."""
        self._stream = _stream()
        import pycuda.driver

        self._driver: Any = pycuda.driver
        self.sources = sources
        self.optimised = optimised
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        major, minor = torch.cuda.get_device_capability()
        self.device_class = f"sm_{major}{minor}"
        self.architecture = "sm_90a" if (major, minor) == (9, 0) else self.device_class
        self._modules: dict[str, Any] = {}
        self._functions: dict[tuple[str, str], tuple[Any, int]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor on the GPU."""
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy on the GPU."""
        return tensor.to(self.torch_device, copy=True).contiguous()

    @property
    def dead(self) -> bool:
        """Whether a kernel has taken the process's context with it: nothing runs here any more."""
        return bool(_lost)

    def failed(self, error: Exception) -> KernelFailure:
        """What to raise for an error of the driver or of torch, and a note if the context went with it."""
        try:
            self._driver.Context.synchronize()
        except self._driver.Error:
            _lost.append(str(error))
        return KernelFailure(f"a kernel failed on the GPU: {error}")

    def launch(
        self, source: str, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], *arguments: object
    ) -> None:
        """Enqueue the kernel. UserError for a kernel or an argument type that does not exist."""
        function, shared = self._found(source, kernel)
        values = [kernel_argument(argument, cuda_map) for argument in arguments]
        whole_grid, whole_block = (*grid, *(1,) * (3 - len(grid))), (*block, *(1,) * (3 - len(block)))
        try:
            function(*values, grid=whole_grid, block=whole_block, stream=self._stream, shared=shared)
        except self._driver.Error as error:
            raise self.failed(error) from error

    def synchronize(self) -> None:
        """Wait for the stream; a kernel that failed, or does not end within SECONDS, raises KernelFailure here."""
        started = time.monotonic()
        try:
            while not self._stream.is_done():
                waited = time.monotonic() - started
                if waited > SECONDS:
                    _lost.append("a kernel hangs")
                    _kept.append(self._modules)
                    raise Hung(f"a kernel on the GPU did not end within {SECONDS:g} s")
                time.sleep(0 if waited < _SPIN else 1e-4)
        except self._driver.Error as error:
            raise self.failed(error) from error

    def function(self, source: str, kernel: str) -> Any:  # noqa: ANN401  pycuda has no type stubs
        """PyCUDA's function object: num_regs, local_size_bytes, shared_size_bytes are readable on it."""
        return self._found(source, kernel)[0]

    def _found(self, source: str, kernel: str) -> tuple[Any, int]:
        """The function and the bytes of shared memory a launch must bring: what its file's <kernel>_shared says."""
        if (source, kernel) not in self._functions:
            try:
                function = self._load(source, kernel)
                self._functions[source, kernel] = function, self._brought(source, kernel, function)
            except self._driver.Error as error:  # also a broken kernel's, launched before
                raise self.failed(error) from error
        return self._functions[source, kernel]

    def _brought(self, source: str, kernel: str, function: Any) -> int:  # noqa: ANN401  pycuda has no type stubs
        if f"{kernel}_shared" not in self.sources.text(source):
            return 0
        address, size = self._modules[source].get_global(f"{kernel}_shared")
        value = bytearray(size)
        self._driver.memcpy_dtoh(value, address)
        shared = int.from_bytes(value, "little")
        function.set_attribute(self._driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        return shared

    def _load(self, source: str, kernel: str) -> Any:  # noqa: ANN401  pycuda has no type stubs
        if source not in self._modules:
            optimised = self.optimised
            if optimised is None:
                optimised = self.sources.digest(source) == shipped().digest(source)
            cubin = compile_cubin(self.sources, source, self.architecture, optimised=optimised)
            self._modules[source] = self._driver.module_from_buffer(cubin.read_bytes())
        try:
            return self._modules[source].get_function(kernel)
        except self._driver.LogicError as error:
            known = ", ".join(self.sources.kernels(source))
            raise UserError(f"kernels/{source} has no kernel '{kernel}'; there are {known}") from error


def open_device(sources: Sources | None = None, *, optimised: bool | None = None) -> CudaDevice:
    """The CUDA device; Unavailable, saying what to install, where it cannot be had.

    optimised: as CudaDevice takes it.
    """
    if reason := missing():
        raise Unavailable(reason)
    return CudaDevice(sources or shipped(), optimised=optimised)
