"""How fast `gemm` is, and what share that is of what the device can do at all.

On a GPU one CUDA graph calls the kernel over rotating copies of weight and activations that together exceed its L2
cache, as a model's layers do, so that neither launches nor a warm cache are measured. On the CPU a clock is read around
each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import median, quantiles

import torch

from mxharness.device import Device
from mxharness.errors import UserError
from mxharness.figures import Ceilings
from mxharness.functional.common import check_activations, check_pair, check_weight, device_of, integer
from mxharness.functional.gemm import gemm
from mxharness.mxfp4 import Quantized
from mxharness.timing import capture, check_captured, check_written, copies_for, elapsed, unwritten

_KNOWN = {
    "NVIDIA H100 80GB HBM3": (3.05e12, 844e12, "3.05 TB/s read and 844 TFLOP/s in bfloat16, the best seen on one"),
}
"""By GPU, bandwidth (3.35 TB/s by the data sheet) and matrix rate (989 TFLOP/s): of the best read-only kernel and the
best bf16 product of any library and size measured there."""


@dataclass(frozen=True)
class Profile:
    """Time of one call, and what it is a share of."""

    shape: tuple[int, int, int]
    """(M, N, K)."""
    seconds: float
    """Of one call: the median of the repeats."""
    fastest: float
    slowest: float
    """First and last decile of the repeats."""
    repeats: int
    nbytes: int
    """Bytes that one call must move: NK 17/32 of weight, 2MK of activations, and the output."""
    flops: int
    """2MNK."""
    method: str
    """How it was timed."""
    ceilings: Ceilings

    @property
    def bandwidth_share(self) -> float:
        """Bytes by time, as a share of the ceiling."""
        return self.nbytes / self.seconds / self.ceilings.bandwidth

    @property
    def matrix_share(self) -> float:
        """Operations by time, as a share of the ceiling."""
        return self.flops / self.seconds / self.ceilings.matrix_rate

    @property
    def floor(self) -> float:
        """Seconds below which no kernel can be: the larger of both ceilings' times."""
        return max(self.nbytes / self.ceilings.bandwidth, self.flops / self.ceilings.matrix_rate)

    def __str__(self) -> str:
        M, N, K = self.shape
        return (
            f"gemm {M}x{N}x{K}: {1e6 * self.seconds:,.1f} us a call ({1e6 * self.fastest:,.1f} to "
            f"{1e6 * self.slowest:,.1f} in {self.repeats} repeats; {self.method}); {self.nbytes:,} bytes, "
            f"{self.bandwidth_share:.1%} of the bandwidth; {self.flops:,} flops, {self.matrix_share:.1%} of the matrix "
            f"rate; at best {1e6 * self.floor:,.1f} us ({self.ceilings.source})"
        )


def gemm_profile(
    x: torch.Tensor,
    weight: Quantized,
    *,
    out_dtype: torch.dtype | None = None,
    repeats: int = 20,
    device: Device | None = None,
) -> Profile:
    """Time, bytes, operations and achieved shares of `gemm(x, weight)`, with the ceilings that they are shares of.

    A repeat is one replay of the graph on a GPU, and one call on the CPU. Raises UserError as `gemm`, and for fewer
    than 2 repeats.
    """
    device = device_of(x, device, "x")
    weight = check_pair(weight)
    N, K = check_weight(device, weight)
    check_activations(device, x, K)
    repeats = integer(repeats, "repeats")
    if repeats < 2:
        raise UserError(f"a median and a spread need at least 2 repeats, not {repeats}")
    y = gemm(x, weight, out_dtype=out_dtype, device=device)  # compiles and loads the kernel
    nbytes = weight.codes.nbytes + weight.scales.nbytes + x.nbytes + y.nbytes
    timed = _cuda_times if device.torch_device.type == "cuda" else _cpu_times
    times, method = timed(x, weight, out_dtype, nbytes, repeats, device)
    deciles = quantiles(times, n=10, method="inclusive")
    M = x.shape[0]
    return Profile(
        shape=(M, N, K),
        seconds=median(times),
        fastest=deciles[0],
        slowest=deciles[-1],
        repeats=repeats,
        nbytes=nbytes,
        flops=2 * M * N * K,
        method=method,
        ceilings=ceilings(device.torch_device),
    )


def ceilings(device: torch.device) -> Ceilings:
    """Bandwidth and matrix rate of a device: known ones for the H100 (SXM), else measured, once in a process."""
    if device.type != "cuda":
        return _measured_on_cpu()
    name = torch.cuda.get_device_name(device)
    if name in _KNOWN:
        bandwidth, rate, source = _KNOWN[name]
        return Ceilings(bandwidth, rate, f"{name}: {source}")
    return _measured_on_cuda(device)


@cache
def _measured_on_cpu() -> Ceilings:
    cpu = torch.device("cpu")
    data = torch.ones(1 << 28, dtype=torch.uint8)  # past any cache
    copy = torch.empty_like(data)
    bandwidth = 2 * data.nbytes / min(elapsed(lambda: copy.copy_(data), cpu) for _ in range(5))
    a = torch.ones(1024, 1024)
    rate = 2 * 1024**3 / min(elapsed(lambda: a @ a, cpu) for _ in range(5))
    source = f"this CPU, measured: torch copies {bandwidth / 1e9:.3g} GB/s (read and written)"
    return Ceilings(bandwidth, rate, f"{source} and multiplies {rate / 1e9:.3g} GFLOP/s in float32")


@cache
def _measured_on_cuda(device: torch.device) -> Ceilings:
    data = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    copy = torch.empty_like(data)
    bandwidth = 2 * data.nbytes / min(elapsed(lambda: copy.copy_(data), device) for _ in range(8))
    a = torch.ones(8192, 8192, dtype=torch.bfloat16, device=device)
    rate = 2 * 8192**3 / min(elapsed(lambda: a @ a, device) for _ in range(8))
    source = f"{torch.cuda.get_device_name(device)}, measured: torch copies {bandwidth / 1e9:.4g} GB/s"
    return Ceilings(
        bandwidth, rate, f"{source} (read and written) and multiplies {rate / 1e12:.3g} TFLOP/s in bfloat16"
    )


def _cpu_times(
    x: torch.Tensor, weight: Quantized, out_dtype: torch.dtype | None, nbytes: int, repeats: int, device: Device
) -> tuple[list[float], str]:
    times = [elapsed(lambda: gemm(x, weight, out_dtype=out_dtype, device=device), x.device) for _ in range(repeats)]
    return times, "wall clock around each call on the CPU"


def _cuda_times(
    x: torch.Tensor, weight: Quantized, out_dtype: torch.dtype | None, nbytes: int, repeats: int, device: Device
) -> tuple[list[float], str]:
    """Seconds of one call, from each replay of a graph that makes one call for every copy."""
    copies = copies_for(nbytes)
    operands = [(x.clone(), Quantized(*(part.clone() for part in weight))) for _ in range(copies)]
    device.synchronize()
    captured = capture(lambda i: gemm(*operands[i], out_dtype=out_dtype, device=device), copies)
    check_captured(captured.nodes, copies, copies)
    for output in captured.outputs:
        output.copy_(unwritten(output))
    captured.graph.replay()
    device.synchronize()
    check_written(captured.outputs, [gemm(x, weight, out_dtype=out_dtype, device=device)], exact=True)
    times = [elapsed(captured.graph.replay, x.device) / copies for _ in range(repeats)]
    return times, f"CUDA graph of {copies} calls over rotating copies, {copies * nbytes / 2**20:.0f} MiB in all"
