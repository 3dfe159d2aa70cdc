"""The format and matrix products: how each row's work is made."""

from __future__ import annotations

import torch

from mxharness import functional, mxfp4
from mxharness.bench.peers import product_rivals
from mxharness.bench.work import (
    DTYPES,
    SOME_COLUMNS,
    SOME_ROWS,
    Rival,
    Work,
    activations,
    corner,
    decoded,
    exact,
    first_row,
    packed_bytes,
    weights,
)
from mxharness.device import Device
from mxharness.mxfp4 import Quantized
from mxharness.timing import copies_for

CUBLAS = "cuBLAS"
"""torch's product on decoded weights, of the activations' dtype; on a CPU what torch has there."""
COPY = "torch copy"
"""Of as many bytes, read and written together."""


def dequantize(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """(N, K) to bf16 or fp16."""
    N, K = shape
    kind = DTYPES[dtype]
    stored = weights(device, (N, K), copies_for(packed_bytes(N, K)))
    nbytes = packed_bytes(N, K) + kind.itemsize * N * K
    copies = min(len(stored), copies_for(nbytes))
    return Work(
        call=lambda i: functional.dequantize(stored[i % copies], kind, device=device),
        copies=copies,
        nbytes=nbytes,
        flops=0,
        golden=exact(Quantized(*(part[:SOME_ROWS] for part in stored[0])))[:, :SOME_COLUMNS],
        part=corner,
        row=first_row,
        alone=lambda: functional.dequantize(Quantized(*(part[:1] for part in stored[0])), kind, device=device),
        rivals={COPY: copying(device, nbytes)},
        reference=COPY,
    )


def quantize(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """(N, K) bf16 or fp16 to MXFP4, scale rule floor; the error is that of the format, decoded against x."""
    N, K = shape
    nbytes = packed_bytes(N, K) + DTYPES[dtype].itemsize * N * K
    xs = activations(device, copies_for(nbytes), (N, K), DTYPES[dtype])
    codes = mxfp4.quantize(xs[0][:SOME_ROWS]).codes
    return Work(
        call=lambda i: functional.quantize(xs[i % len(xs)], device=device).codes,
        copies=len(xs),
        nbytes=nbytes,
        flops=0,
        golden=mxfp4.unpack(codes).double(),
        part=lambda y: mxfp4.unpack(y[:SOME_ROWS]),
        row=first_row,
        alone=lambda: functional.quantize(xs[0][:1], device=device).codes,
        rivals={COPY: copying(device, nbytes)},
        reference=COPY,
    )


def gemm(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """Y (M, N) = x W^T."""
    return _product(device, shape, rows, dtype, biased=False)


def gemm_bias(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """Y (M, N) = x W^T + bias."""
    return _product(device, shape, rows, dtype, biased=True)


def _product(device: Device, shape: tuple[int, ...], rows: int, dtype: str, *, biased: bool) -> Work:
    (N, K), kind = shape, DTYPES[dtype]
    count = copies_for(packed_bytes(N, K))
    stored, dense = weights(device, (N, K), count), decoded(device, (N, K), count, kind)
    copies = min(copies_for(packed_bytes(N, K) + 2 * rows * K), count)
    xs = activations(device, max(copies, len(dense)), (rows, K), kind)
    bias = activations(device, 1, (N,), torch.float32)[0] if biased else None
    narrow = None if bias is None else bias.to(kind)
    golden = xs[0][:SOME_ROWS].double() @ exact(Quantized(*(part[:SOME_COLUMNS] for part in stored[0]))).T

    def call(i: int, taken: int | None = None) -> torch.Tensor:
        x, weight = xs[i % copies][:taken], stored[i % copies]
        if bias is None:
            return functional.gemm(x, weight, device=device)
        return functional.gemm_bias(x, weight, bias, device=device)

    def torch_call(i: int) -> torch.Tensor:
        return torch.nn.functional.linear(xs[i % len(dense)], dense[i % len(dense)], narrow)

    rivals = {CUBLAS: Rival(torch_call, len(dense))}
    others, absent = ({}, {}) if biased else product_rivals(xs, stored, copies)
    return Work(
        call=call,
        copies=copies,
        nbytes=packed_bytes(N, K) + 2 * rows * (N + K) + (4 * N if biased else 0),
        flops=2 * rows * N * K,
        golden=golden if bias is None else golden + bias[:SOME_COLUMNS].double(),
        part=corner,
        row=first_row,
        alone=lambda: call(0, 1),
        rivals=rivals | others,
        absent=absent,
        reference=CUBLAS,
    )


def gemm_batch(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """E products (M, K) (N, K)^T in one launch."""
    (E, N, K), kind = shape, DTYPES[dtype]
    count = copies_for(packed_bytes(E, N, K))
    stored, dense = weights(device, (E, N, K), count), decoded(device, (E, N, K), count, kind)
    copies = min(copies_for(packed_bytes(E, N, K) + 2 * E * rows * K), count)
    xs = activations(device, max(copies, len(dense)), (E, rows, K), kind)
    some = exact(Quantized(*(part[:, :SOME_COLUMNS] for part in stored[0])))
    return Work(
        call=lambda i: functional.gemm_batch(xs[i % copies], stored[i % copies], device=device),
        copies=copies,
        nbytes=packed_bytes(E, N, K) + 2 * E * rows * (N + K),
        flops=2 * E * rows * N * K,
        golden=xs[0][:, :SOME_ROWS].double() @ some.mT,
        part=corner,
        row=lambda y: y[:, :1],
        alone=lambda: functional.gemm_batch(xs[0][:, :1].contiguous(), stored[0], device=device),
        rivals={CUBLAS: Rival(lambda i: xs[i % len(dense)] @ dense[i % len(dense)].mT, len(dense))},
        reference=CUBLAS,
    )


def gemm_persistent(device: Device, shape: tuple[int, ...], rows: int, dtype: str) -> Work:
    """Y (M, N) = x W^T from a weight that was dequantised beforehand."""
    (N, K), kind = shape, DTYPES[dtype]
    count = copies_for(packed_bytes(N, K))
    dense = decoded(device, (N, K), count, kind)
    stored = weights(device, (N, K), count)
    held = [functional.persistent(stored[i], kind, device=device) for i in range(len(dense))]
    xs = activations(device, len(dense), (rows, K), kind)
    nbytes = 2 * N * K + (N * K // 32 if kind == torch.float16 else 0) + 2 * rows * (N + K)
    return Work(
        call=lambda i: functional.gemm_persistent(xs[i % len(held)], held[i % len(held)], device=device),
        copies=len(held),
        nbytes=nbytes,
        flops=2 * rows * N * K,
        golden=xs[0][:SOME_ROWS].double() @ exact(Quantized(*(part[:SOME_COLUMNS] for part in stored[0]))).T,
        part=corner,
        row=first_row,
        alone=lambda: functional.gemm_persistent(xs[0][:1], held[0], device=device),
        rivals={CUBLAS: Rival(lambda i: torch.nn.functional.linear(xs[i % len(xs)], dense[i % len(xs)]), len(xs))},
        reference=CUBLAS,
    )


def copying(device: Device, nbytes: int) -> Rival:
    """A copy within the device that reads and writes `nbytes` together."""
    size = max(nbytes // 2, 1)
    copies = copies_for(nbytes)
    # None of the numbers that tell memory which nobody wrote (timing.unwritten).
    pairs = [torch.full((2, size), i % 128, dtype=torch.uint8, device=device.torch_device) for i in range(copies)]

    def call(i: int) -> torch.Tensor:
        pair = pairs[i % copies]
        return pair[1].copy_(pair[0])

    return Rival(call, copies, judged=False)
