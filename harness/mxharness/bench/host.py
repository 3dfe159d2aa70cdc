"""The CPU: quantise and dequantise against ggml, gguf-py and torchao, products in the exact and the fast mode.

Each number of threads is a process of its own, on so many cores: every library starts its threads once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int64, c_void_p
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from mxharness import functional, mxfp4
from mxharness.bench import measure, result
from mxharness.bench.entries import Entry
from mxharness.bench.result import Bench, Row
from mxharness.bench.work import DTYPES, Rival, Work, activations, corner, decoded, exact, packed_bytes, weights
from mxharness.device import Device, open_device
from mxharness.errors import KernelFailure, Unavailable
from mxharness.mxfp4 import Packed, Quantized
from mxharness.roundtrip import ggml
from mxharness.timing import copies_for
from mxharness.wording import counted

THREADS = (1, 2)
GGML, GGUF, TORCHAO, TORCH = "ggml", "gguf-py", "torchao", "torch float32"
_MXFP4 = 39
"""GGML_TYPE_MXFP4."""
_BLOCK_BYTES = 17
_BUDGET = 0.25
_SOME = 64


def bench(
    device: Device, entries: Sequence[Entry], *, filters: tuple[str, ...], progress: Callable[[Row], None]
) -> Bench:
    """Measure entries of ENTRIES on one thread and on two, where there are two cores.

    progress is told each row. Raises KernelFailure, with its words, where a process does not end well.
    """
    started = time.monotonic()
    found: list[Bench] = []
    for threads in [count for count in THREADS if count <= len(os.sched_getaffinity(0))]:
        command = [sys.executable, "-W", "ignore", "-m", "mxharness.bench.host", str(threads)]
        command += [str(ENTRIES.index(entry)) for entry in entries]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["without a word"]
            raise KernelFailure(f"the bench on {counted(threads, 'thread')} ended: {said[-1]}")
        found.append(result.parsed(done.stdout[done.stdout.index("{") :], "the bench's own process"))
        for row in found[-1].rows.values():
            progress(row)
    last = found[-1]
    rows = {key: row for one in found for key, row in one.rows.items()}
    failed = {key: why for one in found for key, why in one.failed.items()}
    return replace(last, rows=rows, failed=failed, filters=filters, seconds=time.monotonic() - started)


def _child(threads: int, chosen: Sequence[int]) -> None:
    """Measure on so many threads and print the record."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    found = measure.bench(open_device("host"), [ENTRIES[i] for i in chosen], budget=_BUDGET)
    rows = [replace(row, variant=f"{row.variant}, {counted(threads, 'thread')}") for row in found.rows.values()]
    sys.stdout.write(result.text(replace(found, rows={row.key: row for row in rows})))


def _quantize(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """(R, K) float32 to MXFP4: scale rule floor, ties to even; ggml and gguf-py have ties of their own."""
    R, K = shape
    nbytes = packed_bytes(R, K) + 4 * R * K
    xs = activations(device, copies_for(nbytes), (R, K), DTYPES[dtype])
    wanted = mxfp4.quantize(xs[0][:_SOME])
    return Work(
        call=lambda i: functional.quantize(xs[i % len(xs)], device=device).codes,
        copies=len(xs),
        nbytes=nbytes,
        flops=0,
        golden=exact(wanted),
        part=lambda y: exact(Quantized(y[:_SOME], wanted.scales)),
        row=lambda y: y[:1],
        alone=lambda: functional.quantize(xs[0][:1], device=device).codes,
        rivals={name: _quantising(library, xs) for name, library in _libraries().items()},
        absent=_absent(),
        reference=GGML,
    )


def _dequantize(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """MXFP4 to (R, K) float32."""
    R, K = shape
    nbytes = packed_bytes(R, K) + 4 * R * K
    stored = weights(device, (R, K), copies_for(nbytes))
    return Work(
        call=lambda i: functional.dequantize(stored[i % len(stored)], device=device),
        copies=len(stored),
        nbytes=nbytes,
        flops=0,
        golden=exact(Quantized(*(part[:16] for part in stored[0])))[:, :512],
        part=corner,
        row=lambda y: y[:1],
        alone=lambda: functional.dequantize(Quantized(*(part[:1] for part in stored[0])), device=device),
        rivals={name: _dequantising(library, stored) for name, library in _libraries().items()},
        absent=_absent(),
        reference=GGML,
    )


def _quantising(library: _Library, xs: list[torch.Tensor]) -> Rival:
    return Rival(lambda i: library.quantise(xs[i % len(xs)]), len(xs), part=library.read)


def _dequantising(library: _Library, stored: tuple[Quantized, ...]) -> Rival:
    given = [library.prepare(weight) for weight in stored]
    return Rival(lambda i: library.dequantise(given[i % len(given)]), len(given))


def _gemm(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """Y (M, N) = x W^T, bit for bit as a tensor core, or in float32."""
    (N, K), (name, mode) = shape, dtype.split()
    opened = open_device("host", fast=True) if mode == "fast" else device
    count = copies_for(packed_bytes(N, K))
    stored, dense = weights(device, (N, K), count), decoded(device, (N, K), count, torch.float32)
    xs = activations(device, count, (rows, K), DTYPES[name])
    wide = [x.float() for x in xs[: len(dense)]]

    def torch_call(i: int) -> torch.Tensor:
        return torch.nn.functional.linear(wide[i % len(wide)], dense[i % len(wide)])

    return Work(
        call=lambda i: functional.gemm(xs[i % count], stored[i % count], device=opened),
        copies=count,
        nbytes=packed_bytes(N, K) + 2 * rows * (N + K),
        flops=2 * rows * N * K,
        golden=(xs[0].double() @ exact(stored[0]).T)[:16, :512],
        part=corner,
        row=lambda y: y[:1],
        alone=lambda: functional.gemm(xs[0][:1], stored[0], device=opened),
        rivals={TORCH: Rival(torch_call, len(wide))},
        reference=TORCH,
    )


@dataclass(frozen=True)
class _Library:
    """How one library converts."""

    quantise: Callable[[torch.Tensor], Any]
    """(R, K) float32 to whatever it stores."""
    read: Callable[[Any], torch.Tensor]
    """The first rows of that in float64."""
    prepare: Callable[[Quantized], Any]
    """A weight as it stores one."""
    dequantise: Callable[[Any], torch.Tensor]
    """That to float32 (R, K)."""


@cache
def _libraries() -> dict[str, _Library]:
    """Those that can be used."""
    made = {}
    if _has(GGML):
        made[GGML] = _Library(_ggml_quantize, _from_gguf, _to_gguf, _ggml_dequantize)
    if _has(GGUF):
        import gguf

        kind = gguf.GGMLQuantizationType.MXFP4
        made[GGUF] = _Library(
            lambda x: gguf.quants.quantize(x.numpy(), kind),
            lambda stored: _from_gguf(torch.from_numpy(stored)),
            lambda weight: _to_gguf(weight).numpy(),
            lambda stored: torch.from_numpy(gguf.quants.dequantize(stored, kind)),
        )
    if _has(TORCHAO):
        from torchao.prototype.mx_formats import mx_tensor

        floor = mx_tensor.ScaleCalculationMode.FLOOR
        made[TORCHAO] = _Library(
            lambda x: mx_tensor.to_mx(x, torch.float4_e2m1fn_x2, mxfp4.BLOCK, floor),
            lambda pair: exact(Quantized(*(part.view(torch.uint8)[:_SOME] for part in pair[::-1]))),
            lambda weight: (weight.codes, weight.scales.view(torch.float8_e8m0fnu)),
            lambda pair: mx_tensor.to_dtype(*pair, torch.float4_e2m1fn_x2, mxfp4.BLOCK, torch.float32),
        )
    return made


@cache
def _has(name: str) -> bool:
    """Whether a library can be used."""
    if name == GGML:
        try:
            return hasattr(ggml(), "dequantize_row_mxfp4")
        except Unavailable:
            return False
    return find_spec({GGUF: "gguf", TORCHAO: "torchao"}[name]) is not None


def _absent() -> dict[str, str]:
    packages = {GGML: "llama-cpp-python", GGUF: "gguf", TORCHAO: "torchao"}
    return {name: f"{package} is not installed" for name, package in packages.items() if name not in _libraries()}


def _to_gguf(weight: Quantized) -> torch.Tensor:
    """(R, K/32 * 17) bytes as ggml stores them."""
    return mxfp4.to_layout(weight, "gguf").data


def _from_gguf(stored: torch.Tensor) -> torch.Tensor:
    """The first rows of ggml's bytes, decoded."""
    return exact(mxfp4.from_layout(Packed(stored[:_SOME], None), "gguf"))


def _ggml_quantize(x: torch.Tensor) -> torch.Tensor:
    R, K = x.shape
    stored = torch.empty(R, K // mxfp4.BLOCK * _BLOCK_BYTES, dtype=torch.uint8)

    def part(first: int, count: int) -> None:
        ggml().ggml_quantize_chunk(_MXFP4, x.data_ptr(), stored.data_ptr(), first * K, count, K, None)

    _shared(part, R)
    return stored


def _ggml_dequantize(stored: torch.Tensor) -> torch.Tensor:
    K = stored.shape[1] // _BLOCK_BYTES * mxfp4.BLOCK
    y = torch.empty(len(stored), K)
    function = ggml().dequantize_row_mxfp4

    def part(first: int, count: int) -> None:
        function(c_void_p(stored[first].data_ptr()), c_void_p(y[first].data_ptr()), c_int64(count * K))

    _shared(part, len(stored))
    return y


def _shared(part: Callable[[int, int], None], rows: int) -> None:
    """Rows shared among this process's threads: ggml's functions are for one thread, and let others run meanwhile."""
    threads = torch.get_num_threads()
    if threads == 1:
        part(0, rows)
        return
    edges = np.linspace(0, rows, threads + 1).astype(int).tolist()
    list(_pool(threads).map(lambda i: part(edges[i], edges[i + 1] - edges[i]), range(threads)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


_SIZES = (((256, 4096), True), ((1024, 4096), False))
ENTRIES = (
    *(Entry("quantize", "N K", shape, 0, "fp32", _quantize, quick) for shape, quick in _SIZES),
    *(Entry("dequantize", "N K", shape, 0, "fp32", _dequantize, quick) for shape, quick in _SIZES),
    *(
        Entry("gemm", "N K", (1024, 1024), rows, f"bf16 {mode}", _gemm, rows == 32)
        for mode in ("exact", "fast")
        for rows in (1, 32, 256)
    ),
)
"""What is measured on the host device."""

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _child(int(sys.argv[1]), [int(i) for i in sys.argv[2:]])
