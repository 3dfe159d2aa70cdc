"""How fast `gemm` is, and what share that is of what the device can do at all.

On a GPU one CUDA graph calls the kernel over rotating copies of weight and activations that together exceed its L2
cache, as a model's layers do, so that neither launches nor a warm cache are measured. On the CPU a clock is read around
each call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from statistics import median, quantiles

import torch

from mxharness.device import Device
from mxharness.errors import UserError
from mxharness.functional.common import check_activations, check_pair, check_weight, device_of, integer
from mxharness.functional.gemm import gemm
from mxharness.mxfp4 import Quantized

_WORKING_SET = 160 << 20
"""Bytes that the rotating copies reach together: three times the L2 cache of an H100 (50 MB)."""
_MAX_COPIES = 512
"""Of tensors so small that the copies fit in the cache all the same; a profile says how many there were."""


@dataclass(frozen=True)
class Ceilings:
    """What a device can do at most, and where these numbers come from."""

    bandwidth: float
    """Bytes per second."""
    matrix_rate: float
    """Floating point operations per second of a matrix product."""
    source: str
    """The device, and how each of the two was found."""


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
    if name == "NVIDIA H100 80GB HBM3":
        # Both measured on this GPU: the best read-only kernel (3.35 TB/s by the data sheet), and the best bf16 product
        # of any library and size (989 TFLOP/s by the data sheet).
        return Ceilings(3.05e12, 844e12, f"{name}: 3.05 TB/s read and 844 TFLOP/s in bfloat16, the best seen on one")
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


def elapsed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: between events on the current stream of a GPU, by the wall clock on the CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    event = partial(torch.cuda.Event, enable_timing=True)
    before, after = event(), event()
    before.record()
    function()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def _cpu_times(
    x: torch.Tensor, weight: Quantized, out_dtype: torch.dtype | None, nbytes: int, repeats: int, device: Device
) -> tuple[list[float], str]:
    times = [elapsed(lambda: gemm(x, weight, out_dtype=out_dtype, device=device), x.device) for _ in range(repeats)]
    return times, "wall clock around each call on the CPU"


def _cuda_times(
    x: torch.Tensor, weight: Quantized, out_dtype: torch.dtype | None, nbytes: int, repeats: int, device: Device
) -> tuple[list[float], str]:
    """Seconds of one call, from each replay of a graph that makes one call for every copy."""
    copies = min(max(-(-_WORKING_SET // nbytes), 2), _MAX_COPIES)
    operands = [(x.clone(), Quantized(*(part.clone() for part in weight))) for _ in range(copies)]
    device.synchronize()
    graph = torch.cuda.CUDAGraph()
    # The kernels go to the device's stream, which is torch's current one: it is this stream that must be captured,
    # or the graph would be empty.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        outputs = [gemm(a, w, out_dtype=out_dtype, device=device) for a, w in operands]
    # An empty graph would time nothing: outputs are filled here, so equal ones prove that the kernels were captured.
    wanted = gemm(x, weight, out_dtype=out_dtype, device=device)
    for output in outputs:
        output.fill_(float("nan"))
    graph.replay()
    device.synchronize()
    if not all(torch.equal(_bits(output), _bits(wanted)) for output in outputs):
        raise UserError("the CUDA graph did not capture the kernels: its outputs are not those of gemm")
    times = [elapsed(graph.replay, x.device) / copies for _ in range(repeats)]
    return times, f"CUDA graph of {copies} calls over rotating copies, {copies * nbytes / 2**20:.0f} MiB in all"


def _bits(y: torch.Tensor) -> torch.Tensor:
    return y.view(torch.int32 if y.dtype == torch.float32 else torch.int16)
