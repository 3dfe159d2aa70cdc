"""Weight formats to compare with MXFP4: what a matrix is worth once it was stored in one of them.

Rows are cut into blocks along K. Where K is no multiple of a format's block the matrix is stored in another one, as
llama.cpp does: Q4_K falls back to Q5_0, a format of 32 to F16. Sources: OCP MX 1.0, section 6.3, for MXFP4; gguf-py for
Q8_0, Q5_0 and Q4_0; ggml's `ggml_quantize_chunk` for Q4_K, whose quantiser gguf-py does not have.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from mxharness import mxfp4
from mxharness.errors import Unavailable


@dataclass(frozen=True)
class Format:
    """A way to store a matrix."""

    name: str
    block: int
    """K must be a multiple of it."""
    bits: float
    """Of an element, scales included."""
    restored: Callable[[torch.Tensor], torch.Tensor]
    """x (R, K) float32 -> what is read back, (R, K) float32 on the same device. Raises Unavailable."""
    fallback: str = ""
    """Name of the format of a matrix whose K is no multiple of the block."""


def _mxfp4(x: torch.Tensor, scale_rule: str) -> torch.Tensor:
    return mxfp4.dequantize(*mxfp4.quantize(x, scale_rule))[..., : x.shape[-1]]


def _gguf_py() -> ModuleType:
    if importlib.util.find_spec("gguf") is None:
        raise Unavailable("needs gguf, which writes llama.cpp's formats: pip install 'mxharness[model]'")
    return importlib.import_module("gguf")


def _gguf(x: torch.Tensor, name: str) -> torch.Tensor:
    gguf = _gguf_py()
    kind = gguf.GGMLQuantizationType[name]
    stored = gguf.quantize(np.ascontiguousarray(x.cpu().numpy()), kind)
    return torch.from_numpy(gguf.dequantize(stored, kind)).to(x.device)


def _ggml(x: torch.Tensor, name: str) -> torch.Tensor:
    """By ggml's C function, without an importance matrix."""
    gguf = _gguf_py()
    kind = gguf.GGMLQuantizationType[name]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rows, K = x.shape
    source = np.ascontiguousarray(x.cpu().numpy(), dtype=np.float32)
    stored = np.empty((rows, K // block * nbytes), np.uint8)
    written = ggml().ggml_quantize_chunk(
        int(kind), source.ctypes.data, stored.ctypes.data, 0, rows, K, None
    )  # fmt: skip
    if written != stored.nbytes:
        raise Unavailable(f"llama-cpp-python's ggml wrote {written} bytes of {name} where gguf-py has {stored.nbytes}")
    return torch.from_numpy(gguf.dequantize(stored, kind)).to(x.device)


@cache
def ggml() -> ctypes.CDLL:
    """The ggml that llama-cpp-python brings, opened without importing it."""
    spec = importlib.util.find_spec("llama_cpp")
    folders = [] if spec is None else [Path(place) / "lib" for place in spec.submodule_search_locations or ()]
    found = [path for folder in folders for path in sorted(folder.glob("*ggml-base*"))]
    if not found:
        raise Unavailable("needs llama-cpp-python, whose ggml quantises to it: pip install llama-cpp-python")
    try:
        library = ctypes.CDLL(str(found[0]))
        function = library.ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise Unavailable(f"needs llama-cpp-python, and its {found[0].name} cannot be used: {error}") from error
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return library


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


FORMATS = {
    each.name: each
    for each in (
        *(Format(f"MXFP4 {rule}", 1, 4.25, partial(_mxfp4, scale_rule=rule)) for rule in mxfp4.SCALE_RULES),
        Format("Q8_0", 32, 8.5, partial(_gguf, name="Q8_0"), "F16"),
        Format("Q5_0", 32, 5.5, partial(_gguf, name="Q5_0"), "F16"),
        Format("Q4_0", 32, 4.5, partial(_gguf, name="Q4_0"), "F16"),
        Format("Q4_K", 256, 4.5, partial(_ggml, name="Q4_K"), "Q5_0"),
        Format("F16", 1, 16, _half),
    )
}
"""By name. MXFP4 has one for every scale rule, ties to even; it pads rows to whole blocks."""
DEFAULT = FORMATS["MXFP4 floor"]


def fitting(form: Format, K: int) -> Format:
    """The format itself, or the one that rows of K elements fall back to."""
    while K % form.block:
        form = FORMATS[form.fallback]
    return form


def restored(form: Format, x: torch.Tensor) -> torch.Tensor:
    """Weights (.., K) float32 as they come back from the format, or from what K falls back to. Raises Unavailable."""
    K = x.shape[-1]
    return fitting(form, K).restored(x.reshape(-1, K)).reshape(x.shape)
