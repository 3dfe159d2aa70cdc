"""Which kernel of gemm.cu, gemm_thin.cu and gemm_wide.cu multiplies, by shape and device: the only place that decides it.

All of them follow the canonical order of kernels/mma.cuh, so a choice costs or saves time and changes no bit: results
do not depend on the batch, and a row has the same bits on both sides of every switch. The host device takes the kernels
that an H100 takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mxharness.errors import UserError


@dataclass(frozen=True)
class Cost:
    """Microseconds that a kernel takes on an H100, as measured there, beside LAUNCH."""

    alone: float
    """Over 4,096 columns, however few the blocks: what a block waits for."""
    each: float
    """For each block that a multiprocessor runs."""
    row: float = 0
    """More of the same for each of the block's rows that is there."""
    uneven: float = 1
    """Times as much where K is no multiple of 512."""


@dataclass(frozen=True)
class Plan:
    """A kernel and how it is launched."""

    source: str
    kernel: str
    features: int
    """Of a block."""
    rows: int
    """Of a block."""
    threads: int
    cost: Cost

    @property
    def path(self) -> str:
        """The kernel's name without its weights' and its activations' kinds."""
        return self.kernel.split("_", 1)[1].rpartition("_")[0]


LAUNCH = 2.0
"""Microseconds that every kernel takes."""
MULTIPROCESSORS = 132
"""Of an H100: blocks are shared out among so many. Another number elsewhere costs time alone."""
SPLIT_K = 128
"""Up to so many columns, which are one chunk of K, Hopper's kernel that shares K out has nothing to share."""
FEW_ROWS = 16
"""From one more on the host's float32 mode takes FAST_TILE."""
FAST_TILE = (128, 128)
"""Features and rows in the host's float32 mode: (128, 64) takes half as long again on a core, (64, 32) three times."""
_MOST_TILES = 65_535
"""Of a grid's second and third size, CUDA's limit."""
WGMMA = ("host", "sm_90")
"""Device classes whose kernels for many rows use Hopper's warpgroup instructions."""
LARGE_SHARED = ("host", "sm_80", "sm_90")
"""Device classes with more than 99 KB of shared memory for a block."""

Tiles = tuple[tuple[str, int, int, int, dict[str, Cost]], ...]
_FEW: Tiles = (
    ("gemm_small", 16, 8, 256, {"bf16": Cost(1.7, 2.4, 0.09), "fp16": Cost(1.7, 3.0, 0.13)}),
    ("gemm_deep", 16, 8, 512, {"bf16": Cost(0.4, 2.6, 0.13), "fp16": Cost(0.4, 3.4, 0.14)}),
)
_THIN: Tiles = (
    ("gemm_thin", 64, 8, 128, {"bf16": Cost(3.2, 8.0), "fp16": Cost(2.7, 8.2)}),
    ("gemm_thin", 64, 16, 128, {"bf16": Cost(4.3, 8.4), "fp16": Cost(4.3, 8.4)}),
    ("gemm_thin", 64, 32, 128, {"bf16": Cost(4.8, 10.9), "fp16": Cost(3.9, 12.3)}),
)
_THIN_SPLIT: Tiles = (
    ("gemm_thin", 32, 16, 256, {"bf16": Cost(1.1, 6.5), "fp16": Cost(2.5, 6.5)}),
    ("gemm_thin", 32, 32, 256, {"bf16": Cost(2.0, 7.5), "fp16": Cost(0, 13.6)}),
)
_WIDE: Tiles = (
    ("gemm_wide", 256, 128, 384, {"bf16": Cost(0, 61)}),  # half has more sums to keep
    ("gemm_wide", 128, 128, 384, {"bf16": Cost(0, 36), "fp16": Cost(0, 40)}),
    ("gemm_wide", 128, 64, 384, {"bf16": Cost(0, 27), "fp16": Cost(0, 30)}),
)
_SPLIT: Tiles = (("gemm_split", 64, 32, 640, {"bf16": Cost(0, 11.5, uneven=1.35), "fp16": Cost(0, 22, uneven=1.1)}),)
_DENSE: Tiles = (
    ("dense_small", 16, 8, 256, {"bf16": Cost(4, 5), "fp16": Cost(4, 5)}),
    ("dense_tile", 64, 64, 128, {"bf16": Cost(70, 46), "fp16": Cost(70, 46)}),
)


@dataclass(frozen=True)
class Problem:
    """What is to be multiplied: y (problems, rows, N) = x W^T."""

    kind: str
    """Of the weights: "gemm" (MXFP4) or "dense" (16 bit)."""
    dtype: str
    """Of x: "bf16" or "fp16"."""
    N: int
    rows: int
    """Of the largest problem; where rows are routed to problems, of all together."""
    problems: int = 1
    routed: bool = False
    K: int = 4_096
    """Columns of x."""

    @property
    def rows_each(self) -> float:
        """Rows that a problem has, on average where they are routed."""
        return self.rows / self.problems if self.routed else self.rows

    def blocks(self, plan: Plan) -> tuple[int, int, int]:
        """The grid; a routed problem may end in a tile that is not full. UserError for more than CUDA allows."""
        tiles = self.rows // plan.rows + min(self.problems, self.rows) if self.routed else -(-self.rows // plan.rows)
        grid = (-(-self.N // plan.features), tiles, 1 if self.routed else self.problems)
        if max(grid[1:]) > _MOST_TILES:
            said = f"{_MOST_TILES} tiles of {plan.rows} rows and as many matrices"
            raise UserError(f"a GEMM takes up to {said}, not {self.rows} rows")
        return grid


def choose(problem: Problem, device_class: str, *, fast: bool = False) -> Plan:
    """The kernel for `problem` on a device of this class ("host", "sm_90", ..): of equals the first of `plans`.

    fast: the host device's float32 mode, which imitates no GPU: the tile for which a CPU takes the least time.
    """
    found = plans(problem.kind, problem.dtype, device_class)
    if problem.K <= SPLIT_K:
        found = [plan for plan in found if "split" not in plan.kernel]
    if fast and problem.rows_each > FEW_ROWS and problem.kind == "gemm":
        found = [plan for plan in found if (plan.features, plan.rows) == FAST_TILE]
    return min(found, key=lambda plan: microseconds(problem, plan))


def named(path: str, problem: Problem, device_class: str) -> Plan:
    """The kernel that `path` names, "wide_128x64" of gemm_wide_128x64_bf16. UserError where there is no such one."""
    found = plans(problem.kind, problem.dtype, device_class)
    for plan in found:
        if plan.path == path:
            return plan
    there = ", ".join(plan.path for plan in found)
    raise UserError(f"no path {path!r} for {problem.kind} and {problem.dtype} on {device_class}; there are: {there}")


def plans(kind: str, dtype: str, device_class: str) -> list[Plan]:
    """The kernels that devices of this class have for `kind` of weights and activations of `dtype`, largest tile first."""
    if kind == "dense":
        return _plans("gemm.cu", _DENSE, dtype)
    found = _plans("gemm_wide.cu", _WIDE + _SPLIT, dtype) if device_class in WGMMA else []
    found += _plans("gemm_thin.cu", _THIN + (_THIN_SPLIT if device_class in LARGE_SHARED else ()), dtype)
    return sorted(found + _plans("gemm.cu", _FEW, dtype), key=lambda plan: -plan.features * plan.rows)


def microseconds(problem: Problem, plan: Plan) -> float:
    """What `plan` would take for `problem` on an H100."""
    cost, full = plan.cost, problem.rows_each
    if problem.routed:
        full *= 4 / 3  # problems differ, and the larger count
    tiles = ceil(full / plan.rows) * min(problem.problems, problem.rows)
    blocks = ceil(ceil(problem.N / plan.features) * tiles / MULTIPROCESSORS)
    each = cost.each + cost.row * (min(full, plan.rows) - 1)
    return LAUNCH + problem.K / 4096 * (cost.alone + each * blocks) * (cost.uneven if problem.K % 512 else 1)


def _plans(source: str, tiles: Tiles, dtype: str) -> list[Plan]:
    def named(path: str, features: int, rows: int) -> str:
        return f"{path}_{dtype}" if source == "gemm.cu" else f"{path}_{features}x{rows}_{dtype}"

    return [
        Plan(source, named(path, features, rows), features, rows, threads, costs[dtype])
        for path, features, rows, threads, costs in tiles
        if dtype in costs
    ]


def table(device_class: str) -> list[tuple[str, str, str]]:
    """For people: weights, rows and the kernels that may run, on a device of this class."""
    examples = (("MXFP4", "gemm", ((1, 8), (9, 32), (33, 128), (129, None))), ("16 bit", "dense", ((1, None),)))
    return [
        (
            weights,
            f"{first} to {last}" if last else f"{first} and more",
            ", ".join(
                dict.fromkeys(
                    choose(Problem(kind, dtype, N, rows), device_class).kernel
                    for dtype in ("bf16", "fp16")
                    for N in (576, 4_096, 16_384, 65_536)
                    for rows in (first, last or 512, last or 2_048)
                )
            ),
        )
        for weights, kind, steps in examples
        for first, last in steps
    ]
