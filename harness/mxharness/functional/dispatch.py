"""Which kernel of gemm.cu, gemm_thin_*.cu and *_wide*.cu multiplies, by shape and device: decided here alone.

All of them follow the canonical order of kernels/mma.cuh, so a choice costs or saves time and changes no bit: results
do not depend on the batch, and a row has the same bits on both sides of every switch. The host device takes what an
H100 takes for few rows, and one tile for more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING

from mxharness.device.argument import TensorMap
from mxharness.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Cost:
    """Microseconds that a kernel takes on an H100, fitted to what it took there."""

    launch: float
    """However few the columns."""
    alone: float
    """Over 4,096 columns, whatever the number of blocks: what a block waits for, less what blocks save together."""
    each: float
    """Over 4,096 columns, for each block that a multiprocessor runs."""
    row: float = 0
    """More of the same for each row of the block but the first."""
    uneven: float = 1
    """Times as much over columns that are no multiple of 512."""
    least: float = 0
    """Over 4,096 columns, whatever the number of blocks: no less."""


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

    def cost_of(self, *, routed: bool) -> Cost:
        """Its cost for rows of one problem after the other, or for routed ones."""
        return _ROUTED.get(self.path, {}).get(self.kernel.rpartition("_")[2], self.cost) if routed else self.cost

    @property
    def mapped(self) -> bool:
        """Whether the kernel's parameters tell the copy engine of x."""
        return self.path.startswith("wide")

    @property
    def maps_weights(self) -> bool:
        """Whether they tell it of w, too, which is of 16 bits."""
        return self.source == DENSE_WIDE

    @property
    def cluster(self) -> int:
        """Blocks, of neighbouring rows, that share what they bring of w."""
        return 2 if self.maps_weights and self.rows > 64 else 1

    def maps(self, x: torch.Tensor, w: torch.Tensor, rows: int) -> tuple[TensorMap, ...]:
        """What its parameters tell of x, `rows` a problem: boxes of as many rows as its tiles take; and of w."""
        if not self.mapped:
            return ()
        if self.maps_weights:
            return _map(x, self.rows), _map(w, PIECE // self.cluster)
        return (_map(x, min(self.rows, -(-rows // COLUMNS) * COLUMNS)),)

    @property
    def least(self) -> float:
        """Of a full tile's time, what one with few rows takes, about, by kernels that leave out columns."""
        return 0.8 if self.path.startswith(("wide", "thin_64")) else 1


BANDWIDTH, BYTES = 3.05e6, {"gemm": 17 / 32, "dense": 2}
"""Of an H100's memory, bytes a microsecond; of a weight by its kind."""
MULTIPROCESSORS = 132
"""Of an H100: blocks are shared out among so many. Another number elsewhere costs time alone."""
SPLIT_K = 128
"""Up to so many columns, which are one chunk of K, Hopper's kernel that shares K out has nothing to share."""
FEW_ROWS = 16
"""From one more on the host device takes HOST_TILE."""
HOST_TILE = {"gemm": (128, 128), "dense": (64, 64)}
"""Features and rows: (128, 64) takes half as long again on a core, (64, 32) three times."""
COLUMNS = 32
"""Hopper's kernels for many rows take as many of these as all rows want, up to their tile's."""
DENSE_WIDE, PIECE = "dense_wide.cu", 128
"""The file of kernels for many rows of 16-bit weights, and the features that they bring at a time."""
_MOST_TILES = 65_535
"""Of a grid's second and third size, CUDA's limit."""
WGMMA = ("host", "sm_90")
"""Device classes whose kernels for many rows use Hopper's warpgroup instructions."""
LARGE_SHARED = ("host", "sm_80", "sm_90")
"""Device classes with more than 99 KB of shared memory for a block."""

GATED = tuple(f"gemm_{path}_{dtype}.cu" for path in ("thin", "wide") for dtype in ("bf16", "fp16"))
"""Files of kernels that can take the SwiGLU of their results before they write them."""

Tiles = tuple[tuple[str, int, int, int, dict[str, Cost]], ...]
_FEW: Tiles = (
    ("gemm_small", 16, 8, 256, {"bf16": Cost(3.1, 1.4, 2.4, 0.09), "fp16": Cost(3.1, 1.75, 2.95, 0.12)}),
    ("gemm_deep", 16, 8, 512, {"bf16": Cost(3.1, -0.4, 3.1, 0.08), "fp16": Cost(3.1, -0.8, 3.9, 0.13)}),
)
_THIN: Tiles = (
    ("gemm_thin", 64, 8, 128, {"bf16": Cost(3.1, 3.5, 6.5), "fp16": Cost(3.1, 3.25, 6.6)}),
    ("gemm_thin", 64, 16, 128, {"bf16": Cost(3.1, 3.3, 7.7), "fp16": Cost(3.1, 2.9, 8.1)}),
    ("gemm_thin", 64, 32, 128, {"bf16": Cost(3.1, 3.5, 6.9, 0.12), "fp16": Cost(3.1, 3.8, 6.45, 0.16)}),
)
_THIN_SPLIT: Tiles = (
    ("gemm_thin", 32, 16, 256, {"bf16": Cost(3.1, 1.1, 6.9), "fp16": Cost(3.1, 2.0, 7.3)}),
    ("gemm_thin", 32, 32, 256, {"bf16": Cost(3.1, 1.7, 8.3), "fp16": Cost(3.1, -1.3, 15.1)}),
)
_THIN_TOGETHER: Tiles = (("gemm_thin", 64, 64, 128, {"bf16": Cost(3.1, 4.2, 6.7, 0.22, uneven=1.3)}),)
_WIDE: Tiles = (
    ("gemm_wide", 256, 128, 384, {"bf16": Cost(8.0, -15.6, 40.7, 0.21)}),  # half has more sums to keep
    ("gemm_wide", 128, 128, 384, {"bf16": Cost(6.0, -8.2, 21.1, 0.11), "fp16": Cost(5.2, -6.3, 21.6, 0.16)}),
    ("gemm_wide", 128, 64, 384, {"bf16": Cost(5.9, -8.0, 21.7, 0.095), "fp16": Cost(5.1, -5.9, 20.4, 0.18)}),
    ("gemm_wide", 64, 64, 384, {"bf16": Cost(5.0, -4.0, 15.5, 0.05, uneven=1.15)}),  # half leaves four times the sums
)
_SPLIT: Tiles = (
    ("gemm_split", 64, 32, 640, {"bf16": Cost(4.0, -2.9, 13, uneven=1.4), "fp16": Cost(4.0, -2.4, 22.5, uneven=1.2)}),
)
_DENSE: Tiles = (
    ("dense_small", 16, 8, 256, {"bf16": Cost(3.1, -1.5, 6.0), "fp16": Cost(3.6, -0.1, 7.1)}),
    ("dense_narrow", 32, 32, 128, {"bf16": Cost(3.0, 0, 6.6, least=11.2), "fp16": Cost(3.0, 0, 10.9, least=25)}),
    ("dense_tile", 64, 64, 128, {"bf16": Cost(3.0, 72, 31), "fp16": Cost(3.0, 72, 31)}),
)
_DENSE_WIDE: Tiles = (
    ("dense_wide", 256, 128, 384, {"bf16": Cost(3.0, -8, 58.5)}),  # half has more sums to keep
    ("dense_wide", 128, 128, 384, {"bf16": Cost(3.0, -4, 31.5), "fp16": Cost(3.0, -6, 45, uneven=1.17)}),
    ("dense_wide", 128, 64, 384, {"bf16": Cost(3.0, -2, 24), "fp16": Cost(3.0, -1, 30.5, uneven=1.17)}),
)
"""A kernel's path, a block's features, rows and threads, and what it costs. Fitted to 2880 to 50272 features of one
matrix, and of 4 and 32, all with usual scales: errors of 3 to 8 % on average, a third at most."""
_ROUTED = {
    "wide_256x128": {"bf16": Cost(7.4, -6, 63)},
    "wide_128x128": {"bf16": Cost(7.4, -10, 38), "fp16": Cost(9.1, -11, 43)},
    "wide_128x64": {"bf16": Cost(6.3, -9, 31), "fp16": Cost(6.1, -8.6, 34)},
    "wide_64x64": {"bf16": Cost(5.4, -4.5, 21)},  # not measured: in about the proportion of wide_128x64's
    "thin_64x64": {"bf16": Cost(3.1, 9.6, 13.0)},
    "thin_64x32": {"bf16": Cost(3.1, 4.4, 10.9), "fp16": Cost(3.1, 3.7, 11.7)},
    "thin_64x16": {"bf16": Cost(3.1, 4.5, 7.8), "fp16": Cost(3.1, 4.4, 7.9)},
    "thin_64x8": {"bf16": Cost(3.1, 4.2, 7.0), "fp16": Cost(3.1, 3.2, 7.4)},
}
"""By path and dtype, of full tiles of routed rows: threads bring the tokens of the wide ones, and tiles differ."""


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

    @property
    def floor(self) -> float:
        """Microseconds to read the weights; 0 where some of them may meet no rows."""
        size = self.problems * self.N * self.K * BYTES[self.kind]
        return 0 if self.routed else size / BANDWIDTH

    def grid(self, plan: Plan) -> tuple[int, int, int]:
        """How many blocks; a routed problem may end in a tile that is not full."""
        tiles = self.rows // plan.rows + min(self.problems, self.rows) if self.routed else -(-self.rows // plan.rows)
        tiles = -(-tiles // plan.cluster) * plan.cluster
        return -(-self.N // plan.features), tiles, 1 if self.routed else self.problems

    def blocks(self, plan: Plan) -> tuple[int, int, int]:
        """The grid. UserError for more than CUDA allows."""
        grid = self.grid(plan)
        if max(grid[1:]) > _MOST_TILES:
            said = f"{_MOST_TILES} tiles of {plan.rows} rows and as many matrices"
            raise UserError(f"a GEMM takes up to {said}, not {self.rows} rows")
        return grid


@lru_cache(maxsize=4096)
def choose(problem: Problem, device_class: str) -> Plan:
    """The kernel for `problem` on a device of this class ("host", "sm_90", ..): of equals the first of `plans`."""
    found = plans(problem.kind, problem.dtype, device_class)
    if problem.routed:
        found = [plan for plan in found if not plan.maps_weights]  # their rows follow one another
    if problem.K <= SPLIT_K:
        found = [plan for plan in found if "split" not in plan.kernel]
    if device_class == "host" and problem.rows_each > FEW_ROWS:
        found = [plan for plan in found if (plan.features, plan.rows) == HOST_TILE[problem.kind]]
    possible = [plan for plan in found if max(problem.grid(plan)[1:]) <= _MOST_TILES]
    return min(possible or found[:1], key=lambda plan: microseconds(problem, plan))


def named(path: str, problem: Problem, device_class: str) -> Plan:
    """The kernel that `path` names, "wide_128x64" of gemm_wide_128x64_bf16. UserError where there is no such one."""
    found = plans(problem.kind, problem.dtype, device_class)
    for plan in found:
        if plan.path == path:
            return plan
    there = ", ".join(plan.path for plan in found)
    raise UserError(f"no path {path!r} for {problem.kind} and {problem.dtype} on {device_class}; there are: {there}")


def plans(kind: str, dtype: str, device_class: str) -> list[Plan]:
    """The kernels that such a device has for weights of `kind` and activations of `dtype`, largest tile first."""
    if kind == "dense":
        return (_plans(DENSE_WIDE, _DENSE_WIDE, dtype) if device_class in WGMMA else []) + _plans(
            "gemm.cu", _DENSE, dtype
        )
    found = _plans(f"gemm_wide_{dtype}.cu", _WIDE + _SPLIT, dtype) if device_class in WGMMA else []
    thin = (
        _THIN
        + (_THIN_TOGETHER if device_class in WGMMA else ())
        + (_THIN_SPLIT if device_class in LARGE_SHARED else ())
    )
    found += _plans(f"gemm_thin_{dtype}.cu", thin, dtype) + _plans("gemm.cu", _FEW, dtype)
    return sorted(found, key=lambda plan: -plan.features * plan.rows)


def microseconds(problem: Problem, plan: Plan) -> float:
    """What `plan` would take for `problem` on an H100."""
    cost, full, problems = plan.cost_of(routed=problem.routed), problem.rows_each, problem.problems
    tiles: float = ceil(full / plan.rows / plan.cluster) * plan.cluster
    if problem.routed:  # problems differ, and the larger count
        full, problems = full * 4 / 3, min(problems, problem.rows)
        whole, left = divmod(full, plan.rows)
        tiles = whole + (plan.least + (1 - plan.least) * left / plan.rows if left else 0)
    blocks = ceil(ceil(problem.N / plan.features) * tiles * problems / MULTIPROCESSORS)
    columns = ceil(full / COLUMNS) * COLUMNS if plan.mapped else full
    each = cost.each + cost.row * (min(columns, plan.rows) - 1)
    k = problem.K / 4096 * (cost.uneven if problem.K % 512 else 1)
    return cost.launch + max(k * max(cost.least, cost.alone + each * blocks), problem.floor)


def _map(tensor: torch.Tensor, box: int) -> TensorMap:
    return TensorMap(tensor.reshape(-1, tensor.shape[-1]), box)


def _plans(source: str, tiles: Tiles, dtype: str) -> list[Plan]:
    def named(path: str, features: int, rows: int) -> str:
        return f"{path}_{dtype}" if source == "gemm.cu" else f"{path}_{features}x{rows}_{dtype}"

    return [
        Plan(source, named(path, features, rows), features, rows, threads, costs[dtype])
        for path, features, rows, threads, costs in tiles
        if dtype in costs
    ]


def table(device_class: str) -> list[tuple[str, str, str]]:
    """For people: weights and activations, features, and from how many rows on which kernel runs on such a device."""
    steps = (power + odd for power in (8, 16, 32, 64, 128, 256, 512, 1024, 2048) for odd in (0, 1))
    counts, shown = (1, *steps), []
    for weights, kind in (("MXFP4", "gemm"), ("16 bit", "dense")):
        for dtype in ("bf16", "fp16"):
            for N in (4_096, 16_384):
                paths: dict[int, str] = {}
                for rows in counts:
                    path = choose(Problem(kind, dtype, N, rows), device_class).path
                    if path not in list(paths.values())[-1:]:
                        paths[rows] = path
                said = ", ".join(f"{rows}: {path}" for rows, path in paths.items())
                shown.append((f"{weights}, {dtype}", f"{N:,}", said))
    return shown
