"""Which kernel of gemm.cu and gemm_wide.cu multiplies, by shape and device: the only place that decides it.

All of them follow the canonical order of kernels/mma.cuh, so a choice costs or saves time and changes no bit: results
do not depend on the batch, and a row has the same bits on both sides of every switch. The host device takes the kernels
that an H100 takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mxharness.errors import UserError

FEW_ROWS = 16
"""Up to so many rows, or rows a routed problem on average, the kernels for few rows run."""
FEW_FEATURES = 4_096
"""Up to so many features, of all problems together, a block's share of K goes to twice as many warps."""
MANY_FEATURES = 32_768
"""From so many features on there are warps enough for more than 8 rows without sharing K among several."""
SPLIT_ROWS, SPLIT_K = 64, 128
"""Up to so many rows (three quarters of that where they are routed) and past so many columns, which are one chunk of K,
Hopper may run the kernel that shares K out."""
TILES = {"wide": ((256, 128, 384, 18), (128, 128, 384, 10), (128, 64, 384, 8)), "split": ((64, 32, 640, 4),)}
"""Of Hopper's kernels for more rows: a block's features, rows and threads, and how long a wave of blocks takes beside
the others. Measured on an H100, but for "split", which is counted."""
MULTIPROCESSORS = 132
"""Of an H100: how many blocks run at once. Another number elsewhere costs time alone."""
_MOST_TILES = 65_535
"""Of a grid's second and third size, CUDA's limit."""
WGMMA = ("host", "sm_90")
"""Device classes whose kernels for many rows use Hopper's warpgroup instructions."""


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
    cost: int = 0
    """Of a wave of blocks, where several kernels may be chosen from."""


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


def choose(problem: Problem, device_class: str) -> Plan:
    """The kernel for `problem` on a device of this class ("host", "sm_90", ..)."""
    if problem.rows_each <= FEW_ROWS:
        return _few(problem)
    if problem.kind == "dense" or device_class not in WGMMA:
        return Plan("gemm.cu", f"{problem.kind}_tile_{problem.dtype}", 64, 64, 128)
    shared = _full(problem) <= SPLIT_ROWS and problem.K > SPLIT_K
    plans = [plan for plan in hopper_plans(problem.dtype) if shared or "split" not in plan.kernel]
    return min(plans, key=lambda plan: plan.cost * _waves(problem, plan))  # of equals the largest tile


def hopper_plans(dtype: str) -> list[Plan]:
    """The kernels of gemm_wide.cu for MXFP4 weights and activations of `dtype`, largest tile first."""
    return [
        Plan("gemm_wide.cu", f"gemm_{path}_{features}x{rows}_{dtype}", features, rows, threads, cost)
        for path, tiles in TILES.items()
        for features, rows, threads, cost in tiles
        if features <= 128 or dtype == "bf16"  # half has more sums to keep
    ]


def _few(problem: Problem) -> Plan:
    features = problem.N * (min(problem.problems, problem.rows) if problem.routed else problem.problems)
    name, *sizes = ("small", 16, 8, 256)
    if problem.kind == "gemm" and problem.rows_each > 8:
        name, *sizes = ("small16", 16, 16, 256) if features < MANY_FEATURES else ("long16", 128, 16, 128)
    elif problem.kind == "gemm" and features <= FEW_FEATURES:
        name, *sizes = ("deep", 16, 8, 512)
    return Plan("gemm.cu", f"{problem.kind}_{name}_{problem.dtype}", *sizes)


def _full(problem: Problem) -> float:
    """Rows of a problem; routed ones differ, and the larger count."""
    return problem.rows_each * 4 / 3 if problem.routed else problem.rows_each


def _waves(problem: Problem, plan: Plan) -> int:
    """Of blocks that have work."""
    tiles = ceil(_full(problem) / plan.rows) * min(problem.problems, problem.rows)
    return ceil(ceil(problem.N / plan.features) * tiles / MULTIPROCESSORS)


def table(device_class: str) -> list[tuple[str, str, str]]:
    """For people: weights, rows and the kernels that may run, on a device of this class."""
    examples = (("MXFP4", "gemm"), ("16 bit", "dense"))
    steps = ((1, FEW_ROWS), (FEW_ROWS + 1, None))
    return [
        (
            weights,
            f"{first} to {last}" if last else f"{first} and more",
            ", ".join(
                dict.fromkeys(
                    choose(Problem(kind, dtype, N, last or rows), device_class).kernel
                    for dtype in ("bf16", "fp16")
                    for N, rows in ((256, first), (4096, 256), (4096, 512), (4096, 2048))
                )
            ),
        )
        for weights, kind in examples
        for first, last in steps
    ]
