"""Where a number comes from: machine, driver, compilers, packages, commit, and a hash per kernel file.

Every value is a short string; what the machine does not have is "absent". Nothing here opens a device.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from mxharness import __version__, paths
from mxharness.device import Device, toolchain

ABSENT = "absent"

_PACKAGES = ("torch", "numpy", "pycuda", "datasets", "transformers", "nvidia-cuda-runtime")
_KERNEL_SUFFIXES = {".cu", ".cuh", ".h", ".hpp", ".cpp"}
_INCLUDE = ("-I", "-isystem", "/")
_SECONDS = 20


def describe(device: Device | None = None, sources: Path | None = None, flags: Sequence[str] = ()) -> dict[str, str]:
    """The environment of a run, in reading order.

    device: where kernels run; None leaves its class and arithmetic absent.
    sources: the folder of the kernels that were compiled, kernels/ by default; every file in it is hashed.
    flags: the compiler's arguments, as used; include folders ("-Ifolder") are left out, they differ by machine.

    Raises UserError nowhere: a tool or a package that is missing reads "absent".
    """
    facts = {
        "device": device.name if device else ABSENT,
        "device class": device.device_class if device else ABSENT,
        "arithmetic": device.arithmetic if device else ABSENT,
        **_gpu(),
        "cuda driver api": _cuda_driver_version(),
        "nvcc": toolchain.nvcc_version() or ABSENT,
        "c++": toolchain.compiler_version() or ABSENT,
        "compile flags": " ".join(flag for flag in flags if not flag.startswith(_INCLUDE)) or ABSENT,
        "mxharness": __version__,
        "commit": commit(paths.checkout()),
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu cores": str(len(os.sched_getaffinity(0))),
    }
    return facts | source_hashes(sources or paths.kernels())


def source_hashes(folder: Path) -> dict[str, str]:
    """sha256 (first 16 hex digits) of every kernel source below `folder`, keyed "kernels/<path>", sorted."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in _KERNEL_SUFFIXES)
    return {
        f"kernels/{path.relative_to(folder).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in files
    }


def commit(folder: Path | None) -> str:
    """The git commit of `folder`, with "+dirty" where tracked files differ from it.

    What MXHARNESS_COMMIT says goes before, for a copy of a checkout on another machine; absent where nothing is known.
    """
    if said := os.environ.get("MXHARNESS_COMMIT"):
        return said
    head = _output("git", "-C", str(folder), "rev-parse", "HEAD") if folder else ""
    if not head:
        return ABSENT
    changed = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return head + ("+dirty" if changed else "")


def unit(device: Device) -> str:
    """What does a device's arithmetic: the model name of the GPU, or of the processor."""
    return _cpu() if device.name == "host" else _gpu()["gpu"]


def _gpu() -> dict[str, str]:
    """Name and driver of the first GPU that CUDA sees, as nvidia-smi tells them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    which = ("-i", visible) if visible else ()
    line = _output("nvidia-smi", *which, "--query-gpu=name,driver_version", "--format=csv,noheader").partition("\n")[0]
    name, _, driver = line.rpartition(", ")
    return {"gpu": name or ABSENT, "driver": driver if name else ABSENT}


def _cuda_driver_version() -> str:
    """The CUDA version the driver supports, from libcuda's cuDriverGetVersion: 1000 * major + 10 * minor."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ABSENT
    number = ctypes.c_int(0)
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return ABSENT
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _output(name: str, *arguments: str) -> str:
    """What a program prints, "" where it is missing, fails or hangs."""
    program = shutil.which(name)
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ABSENT


def _cpu() -> str:
    """The processor's model name, from /proc/cpuinfo on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or ABSENT
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or ABSENT
