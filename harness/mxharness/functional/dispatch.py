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
"""Up to so many features, of all problems together, a block's share of K goes to twice as many warps for up to 8 rows;
from so many on Hopper's kernel that shares K among warpgroups may take 9 to 16."""
MANY_FEATURES = 32_768
"""From so many features on there are warps enough for more than 8 rows without sharing K among several."""
SPLIT_ROWS, SPLIT_K = 64, 128
"""Up to so many rows (three quarters of that where they are routed) and past so many columns, which are one chunk of K,
Hopper may run the kernel that shares K out."""
TILES = (
    ("wide", 256, 128, 384, {"bf16": 63}),  # half has more sums to keep
    ("wide", 128, 128, 384, {"bf16": 38, "fp16": 42}),
    ("wide", 128, 64, 384, {"bf16": 29, "fp16": 32}),
    ("split", 64, 32, 640, {"bf16": 13.5, "fp16": 24}),
)
"""Of Hopper's kernels for more rows: a block's features, rows and threads, and the microseconds that a wave of blocks,
one a multiprocessor, takes over 4,096 columns, as measured on an H100."""
SHARED_FEW = {"bf16": 14.3, "fp16": 18.6}
"""The same of the kernel for 9 to 16 rows that shares K out, of whose blocks FEW_AT_ONCE run on a multiprocessor."""
FEW_AT_ONCE = 3
FAST_TILE = (128, 128)
"""Features and rows in the host's float32 mode: (128, 64) takes half as long again on a core, (64, 32) three times."""
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
    cost: float = 0
    """Of a wave of blocks in microseconds, where several kernels may be chosen from."""
    at_once: int = 1
    """Blocks of a wave on a multiprocessor."""


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
    """The kernel for `problem` on a device of this class ("host", "sm_90", ..).

    fast: the host device's float32 mode, which imitates no GPU: the tile for which a CPU takes the least time.
    """
    hopper = problem.kind == "gemm" and device_class in WGMMA
    shared = _full(problem) <= SPLIT_ROWS and problem.K > SPLIT_K
    if problem.rows_each <= FEW_ROWS:
        plans = [_few(problem)]
        if hopper and shared and plans[0].cost and _features(problem) >= FEW_FEATURES:
            plans += [plan for plan in hopper_plans(problem.dtype) if "split" in plan.kernel]
    elif hopper:
        plans = [plan for plan in hopper_plans(problem.dtype) if shared or "split" not in plan.kernel]
        if fast:
            plans = [plan for plan in plans if (plan.features, plan.rows) == FAST_TILE]
    else:
        plans = [Plan("gemm.cu", f"{problem.kind}_tile_{problem.dtype}", 64, 64, 128)]
    return min(plans, key=lambda plan: plan.cost * _waves(problem, plan))  # of equals the first, the largest tile


def hopper_plans(dtype: str) -> list[Plan]:
    """The kernels of gemm_wide.cu for MXFP4 weights and activations of `dtype`, largest tile first."""
    return [
        Plan("gemm_wide.cu", f"gemm_{path}_{features}x{rows}_{dtype}", features, rows, threads, costs[dtype])
        for path, features, rows, threads, costs in TILES
        if dtype in costs
    ]


def _few(problem: Problem) -> Plan:
    features, dtype = _features(problem), problem.dtype
    if problem.kind == "dense" or (problem.rows_each <= 8 and features > FEW_FEATURES):
        return Plan("gemm.cu", f"{problem.kind}_small_{dtype}", 16, 8, 256)
    if problem.rows_each <= 8:
        return Plan("gemm.cu", f"gemm_deep_{dtype}", 16, 8, 512)
    if features < MANY_FEATURES:
        return Plan("gemm.cu", f"gemm_small16_{dtype}", 16, 16, 256, SHARED_FEW[dtype], FEW_AT_ONCE)
    return Plan("gemm.cu", f"gemm_long16_{dtype}", 128, 16, 128)


def _features(problem: Problem) -> int:
    """Of all problems together."""
    return problem.N * (min(problem.problems, problem.rows) if problem.routed else problem.problems)


def _full(problem: Problem) -> float:
    """Rows of a problem; routed ones differ, and the larger count."""
    return problem.rows_each * 4 / 3 if problem.routed else problem.rows_each


def _waves(problem: Problem, plan: Plan) -> int:
    """Of blocks that have work."""
    tiles = ceil(_full(problem) / plan.rows) * min(problem.problems, problem.rows)
    return ceil(ceil(problem.N / plan.features) * tiles / (MULTIPROCESSORS * plan.at_once))


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
