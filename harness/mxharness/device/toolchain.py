"""The compilers and headers that kernels are built with, found by one rule for the devices and for the record of a run.

Free of torch, so that a run's environment can be told where torch is missing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from mxharness.errors import Unavailable

TOOLKIT = Path("/usr/local/cuda")
"""Where NVIDIA's installers put the toolkit."""
_SECONDS = 20


@cache
def compiler() -> str:
    """Path of the C++ compiler: $CXX, g++, c++ or clang++. Unavailable where there is none."""
    wanted = os.environ.get("CXX")
    if wanted and not shutil.which(wanted):
        raise Unavailable(
            f"CXX names '{wanted}', which is no program on the PATH; set it to a C++ compiler or unset it"
        )
    for name in (wanted, "g++", "c++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise Unavailable("the host device needs a C++ compiler; install g++ (apt-get install g++) or set CXX")


@cache
def headers() -> Path:
    """The folder of cuda_fp16.h: $CUDA_HOME, the wheel nvidia-cuda-runtime, or a toolkit. Unavailable without."""
    candidates = []
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(Path(home) / "include")
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        candidates += [Path(place) / "cu13" / "include", Path(place) / "cuda_runtime" / "include"]
    if nvcc_on_path := shutil.which("nvcc"):
        candidates.append(Path(nvcc_on_path).resolve().parent.parent / "include")
    candidates.append(TOOLKIT / "include")
    for folder in candidates:
        if (folder / "cuda_fp16.h").exists() and (folder / "cuda_bf16.h").exists():
            return folder
    raise Unavailable(
        "the host device needs NVIDIA's headers (cuda_fp16.h); pip install 'nvidia-cuda-runtime>=13,<14' "
        "'nvidia-cuda-crt>=13,<14' 'nvidia-cuda-cccl>=13,<14', or set CUDA_HOME"
    )


def nvcc() -> str | None:
    """Path of nvcc: of the toolkit that $CUDA_HOME names, on the PATH, or in /usr/local/cuda; None where it is not."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    of_home = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    return of_home or shutil.which("nvcc") or shutil.which("nvcc", path=str(TOOLKIT / "bin"))


def compiler_version() -> str:
    """The C++ compiler's own first line; "" without one."""
    try:
        return _first_line(compiler())
    except Unavailable:
        return ""


def nvcc_version() -> str:
    """Nvcc's own line with its release; "" without nvcc."""
    tool = nvcc()
    return _line(tool, "release") if tool else ""


@cache
def takes(option: str) -> bool:
    """Whether nvcc knows an option; False without nvcc."""
    tool = nvcc()
    return bool(tool) and any(option in line.split() for line in _output(str(tool), "--help"))


@cache
def _first_line(tool: str) -> str:
    return next(iter(_output(tool)), "")


@cache
def _line(tool: str, word: str) -> str:
    return next((line.strip() for line in _output(tool) if word in line), "")


def _output(tool: str, option: str = "--version") -> list[str]:
    """What `tool --version` prints; nothing where it fails or hangs."""
    try:
        done = subprocess.run([tool, option], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []
