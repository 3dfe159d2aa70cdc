"""What this machine has for each device, found without torch, which takes longer to import than all else together."""

from __future__ import annotations

import ctypes
import runpy
from importlib.util import find_spec
from pathlib import Path

from mxharness.device.toolchain import compiler, headers, nvcc
from mxharness.errors import Unavailable


def host() -> str | None:
    """What this machine lacks for the host device, with what to install; None where nothing."""
    try:
        compiler()
        headers()
    except Unavailable as reason:
        return str(reason)
    return None


def cuda() -> str | None:
    """The same for the CUDA device, as far as it can be known without torch. ModuleNotFoundError where that is missing.

    `device.cuda.missing` asks torch itself.
    """
    build = torch_build()
    return cuda_lacks(build, gpu=build is not None and gpus() > 0)


def cuda_lacks(build: str | None, *, gpu: bool) -> str | None:
    """The sentence for a torch built for CUDA `build` (None: for none), with or without a GPU; None: nothing lacks."""
    if not gpu:
        torch = "this torch is a CPU build" if build is None else "torch finds no GPU or driver"
        return f"no CUDA device: {torch}; a GPU run needs an NVIDIA driver and a CUDA build of torch"
    if find_spec("pycuda") is None:
        return "the CUDA device needs pycuda; pip install 'mxharness[cuda]' on a machine with nvcc"
    if nvcc() is None:
        return "the CUDA device needs nvcc; install the CUDA toolkit and put its bin folder on the PATH"
    return None


def torch_build() -> str | None:
    """The CUDA version that torch was built for, None for a CPU build; ModuleNotFoundError where torch is missing."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    build = runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda")
    return None if build is None else str(build)


def gpus() -> int:
    """How many GPUs the driver shows this process; 0 without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    found = library.cuInit(0) == 0 and library.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if found else 0
