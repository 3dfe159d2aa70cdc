"""Every kernel that may multiply gives the same bits, on both sides of every switch between them."""

from __future__ import annotations

import csv
from dataclasses import replace
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from mxharness import functional, paths
from mxharness.device.source import shipped
from mxharness.errors import UserError
from mxharness.functional import dispatch
from mxharness.functional.dispatch import Problem, choose, microseconds
from mxharness.mxfp4 import Quantized
from mxharness.ops import find

gemms = import_module("mxharness.functional.gemm")  # the package's own name `gemm` is the function
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def plans(dtype, device):
    """All kernels for MXFP4 weights that this device has."""
    found = dispatch.plans("gemm", dtype, device.device_class)
    there = {k for file in ("gemm.cu", *dispatch.GATED) for k in device.sources.kernels(file)}
    there = {kernel for kernel in there if kernel.startswith("gemm_") and dtype in kernel}
    assert {plan.kernel for plan in found} == there or device.device_class not in dispatch.WGMMA
    return found


def data(M, N, K, dtype, scales=(0, 256), seed=0):
    """Tokens (M, K) and weights (N, K) whose features have scale bytes about one of the given range each."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=draw).to(TYPES[dtype])
    codes = torch.randint(0, 256, (N, K // 2), generator=draw, dtype=torch.uint8)
    about = torch.randint(*scales, (N, 1), generator=draw) + torch.randint(-2, 3, (N, K // 32), generator=draw)
    return x, Quantized(codes, about.clamp(0, 255).to(torch.uint8))


def by(plan, monkeypatch, device, call):
    with monkeypatch.context() as patch:
        patch.setattr(gemms, "choose", lambda *_, **__: plan)
        return bits(call(), device)


def bits(y, device):
    device.synchronize()
    y = y.cpu().contiguous()
    y[y.isnan()] = float("nan")  # on a CPU the sign of a NaN tells which operand it came from
    return y.view(torch.int16 if y.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("block", [24, 47, 48, 52, 56, 71])  # 48 and 52: decoded a stage before
def test_kernels_see_extreme_scales_wherever_they_begin(device, dtype, block):
    """Of 72 blocks, in four features; those who load look at 16 at a time, long before they are wanted."""
    x, weight = data(20, 40, 2_304, dtype, (110, 120))
    weight[1][:4, block] = 150
    x, weight = device.upload(x), Quantized(*map(device.upload, weight))
    seen = [bits(functional.gemm(x, weight, path=plan.path, device=device), device) for plan in plans(dtype, device)]
    assert all(torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("M", "N", "K", "scales", "out"),
    [
        (70, 65, 160, (110, 128), None),  # one piece of a feature tile, a K that is no multiple of 128
        (130, 264, 96, (100, 140), torch.float32),  # past every tile, less than a stage
        (33, 40, 608, (0, 256), None),  # five stages: the scales of a second 512 k; every scale byte
        (17, 16, 32, (0, 20), torch.float32),
        (65, 129, 1056, (240, 256), torch.float32),  # Inf and NaN; rows of scales of an odd length
        (20, 40, 1216, (110, 128), None),  # of an even one: two scales are read at once
        (40, 24, 1024, (0, 256), None),  # sixteen
    ],
)
def test_all_kernels_have_the_same_bits(device, monkeypatch, dtype, M, N, K, scales, out):
    x, weight = data(M, N, K, dtype, scales)
    x[0, 1], x[-1, -1] = float("inf"), float("nan")
    x, weight = device.upload(x), Quantized(*map(device.upload, weight))
    bias = device.upload(torch.linspace(-1, 1, N))
    seen = [
        by(plan, monkeypatch, device, lambda: functional.gemm_bias(x, weight, bias, out_dtype=out, device=device))
        for plan in plans(dtype, device)
    ]
    assert len(seen) >= 2
    assert len(torch.unique(seen[0])) > M
    assert all(torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("dtype", TYPES)
def test_every_number_of_columns_that_a_kernel_takes_is_judged(dtype):
    """A tile of few rows takes a copy of its kernel for fewer columns: gemm_thin.cuh by 8, gemm_wide.cuh by 32."""
    steps = {
        "gemm_thin.cuh": "SPLIT > 1 ? 0 : TOKENS == 64 ? 40 : TOKENS - 8;",
        "gemm_wide.cuh": "constexpr int FEWER = TOKENS - 32;",
    }
    assert all(shipped().text(file).count(words) == 1 for file, words in steps.items())
    judged, there = set(), set()
    for plan in dispatch.plans("gemm", dtype, "sm_90"):
        copies = [plan.rows]
        if plan.path.startswith("thin_64"):
            copies = [*range(8, min(plan.rows, 41), 8), plan.rows]
        elif plan.path.startswith("wide"):
            copies = [*range(32, plan.rows + 1, 32)]
        there |= {(plan.path, columns) for columns in copies}
        for case in find("gemm").cases:
            if case.dtype == dtype and case.option("path") == plan.path:
                whole, left = divmod(case.shape[0], plan.rows)
                rows = [plan.rows] * (whole > 0) + [left] * (left > 0)
                judged |= {(plan.path, min(columns for columns in copies if columns >= count)) for count in rows}
    assert there - judged == set()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("gated", [None, (1.702, 7.0)])
def test_rows_of_experts_have_the_same_bits(device, monkeypatch, dtype, gated):
    """Counts 0, 1, a full tile, one more and those between; an entry reads row e / fan of x and writes row e of y."""
    counts, N, K, fan = (0, 1, 64, 65, 20, 100, 33, 12, 31), 72, 160, 2
    x, weight = data(sum(counts) // fan, N * len(counts), K, dtype)
    codes, scales = (part.view(len(counts), N, -1) for part in weight)
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).int()
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    x, codes, scales, order, offsets = map(device.upload, (x, codes, scales, order, offsets))

    def call(gated):
        kind = torch.float32 if gated is None else TYPES[dtype]
        y = device.upload(torch.zeros(sum(counts), N // 2 if gated else N, dtype=kind))
        gemms.multiply(
            device, y, x, (codes, scales), None, problems=len(counts), M=0, x_step=0, rows=sum(counts),
            offsets=offsets, entries=order, fan=fan, gated=gated,
        )  # fmt: skip
        return y

    able = [plan for plan in plans(dtype, device) if gated is None or plan.source in dispatch.GATED]
    seen = [by(plan, monkeypatch, device, lambda: call(gated)) for plan in able]
    assert all(torch.equal(seen[0], other) for other in seen[1:])
    if gated:
        products = by(able[0], monkeypatch, device, lambda: call(None)).view(torch.float32)
        alone = functional.swiglu(
            device.upload(products.to(TYPES[dtype])), alpha=gated[0], limit=gated[1], device=device
        )
        assert torch.equal(seen[0], bits(alone, device))
        return
    alone = functional.gemm(
        x[order[-1] // fan][None], Quantized(codes[-1], scales[-1]), out_dtype=torch.float32, device=device
    )
    assert torch.equal(seen[0][order[-1].item()], bits(alone[0], device))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(70, 33, 160), (1, 5, 32), (33, 72, 608), (140, 300, 1056)])
def test_all_kernels_of_16_bit_weights_have_the_same_bits(device, dtype, M, N, K):
    draw = torch.Generator().manual_seed(M)
    x, w = (device.upload(torch.randn(rows, K, generator=draw).to(TYPES[dtype])) for rows in (M, N))
    bias = device.upload(torch.randn(N, generator=draw))
    scales = torch.randint(0, 253, (N, K // 32), generator=draw, dtype=torch.uint8)
    for given in (None, device.upload(scales)) if dtype == "fp16" else (None,):
        seen = [
            bits(gemms.dense(x, w, bias, scales=given, out_dtype=torch.float32, path=plan.path, device=device), device)
            for plan in dispatch.plans("dense", dtype, device.device_class)
        ]
        assert len(seen) == 3 + (device.device_class in dispatch.WGMMA) * {"bf16": 3, "fp16": 2}[dtype]
        assert all(torch.equal(seen[0], other) for other in seen[1:])


def test_a_product_past_float32_is_rounded_before_it_is_added(device, monkeypatch):
    """Fused, -2^127 + 2^128 would be 2^127; the order of sums says -2^127 + Inf."""
    K, ones = 64, torch.full((32,), 2.0)
    x = device.upload(torch.cat([-ones, 4 * ones]).half().expand(20, K).contiguous())
    codes = torch.full((16, K // 2), 0x44, dtype=torch.uint8)  # 2.0
    # 32 products of -4 times 2^120, of 16 times 2^119.
    weight = Quantized(device.upload(codes), device.upload(torch.tensor([[247, 246]] * 16, dtype=torch.uint8)))
    for plan in plans("fp16", device):
        y = by(plan, monkeypatch, device, lambda: functional.gemm(x, weight, out_dtype=torch.float32, device=device))
        assert y.view(torch.float32).eq(float("inf")).all(), plan


@pytest.mark.parametrize("N", [2_880, 4_096, 16_384])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_has_its_bits_on_both_sides_of_every_switch(device, dtype, N):
    """Where N features of 4,096 columns take another kernel from one number of rows to the next; of fewer features."""
    most, features, K = 700, 136, 160
    x, weight = data(most + 1, features, K, dtype, (100, 140))
    x, weight = device.upload(x), Quantized(*map(device.upload, weight))
    taken = [choose(Problem("gemm", dtype, N, rows), "sm_90").path for rows in range(1, most + 2)]
    switches = [rows for rows, (path, other) in enumerate(pairwise(taken), 1) if path != other]
    assert len(switches) >= 4
    there = device.device_class in dispatch.WGMMA
    for rows in switches:
        fewer, more = (
            functional.gemm(x[:each].contiguous(), weight, path=taken[each - 1] if there else "", device=device)
            for each in (rows, rows + 1)
        )
        assert torch.equal(fewer.view(torch.int16), more[:rows].view(torch.int16)), (rows, taken[rows - 1 : rows + 1])


@pytest.mark.parametrize(
    ("N", "K", "rows", "dtype", "path"),
    [  # the fastest of all on an H100, or within 3 % of it
        (2880, 2880, 1, "bf16", "deep"),
        (4096, 4096, 4, "bf16", "deep"),
        (5760, 2880, 1, "bf16", "small"),
        (16384, 4096, 1, "bf16", "thin_64x8"),
        (16384, 4096, 8, "fp16", "thin_64x8"),
        (4096, 4096, 12, "bf16", "thin_32x16"),
        (16384, 4096, 16, "fp16", "thin_64x16"),
        (4096, 4096, 32, "bf16", "thin_32x32"),
        (50272, 4096, 32, "bf16", "thin_64x32"),
        (4096, 4096, 64, "bf16", "split_64x32"),
        (8192, 4096, 32, "bf16", "split_64x32"),
        (4096, 4096, 64, "fp16", "thin_64x32"),
        (8192, 4096, 64, "bf16", "wide_64x64"),
        (4096, 4096, 128, "bf16", "wide_64x64"),
        (16384, 4096, 64, "bf16", "wide_128x64"),
        (4096, 4096, 256, "bf16", "wide_128x64"),
        (4096, 4096, 512, "bf16", "wide_128x128"),
        (4096, 4096, 2048, "bf16", "wide_256x128"),
        (4096, 4096, 2048, "fp16", "wide_128x128"),
    ],
)
def test_a_shape_takes_the_kernel_that_was_fastest(N, K, rows, dtype, path):
    assert choose(Problem("gemm", dtype, N, rows, K=K), "sm_90").path == path


def test_choices_know_problems_columns_devices_and_modes():
    assert choose(Problem("gemm", "bf16", 5760, 2, problems=32, K=2880), "sm_90").path == "thin_64x8"
    routed = Problem("gemm", "bf16", 5760, 32 * 32, problems=32, routed=True, K=2880)
    assert choose(routed, "sm_90").path == "thin_64x64"
    assert routed.blocks(choose(routed, "sm_90")) == (90, 16 + 32, 1)
    assert choose(Problem("gemm", "bf16", 5760, 4, problems=32, routed=True, K=2880), "sm_90").path == "thin_64x8"
    assert "split" not in choose(Problem("gemm", "bf16", 4096, 64, K=128), "sm_90").path  # one chunk
    assert "32x" not in choose(Problem("gemm", "bf16", 4096, 12), "sm_86").path  # they want more shared memory
    assert choose(Problem("gemm", "bf16", 4096, 2048), "sm_80").path == "thin_64x32"
    assert choose(Problem("gemm", "fp16", 576, 512), "host").path == "wide_128x128"
    assert choose(Problem("gemm", "bf16", 576, 17), "host").path == "wide_128x128"
    assert choose(Problem("gemm", "bf16", 4096, 16), "host").path == "thin_32x16"
    assert choose(Problem("dense", "bf16", 4096, 2048), "sm_90").path == "wide_256x128"
    assert choose(Problem("dense", "bf16", 4096, 512), "sm_90").path == "wide_128x128"
    assert choose(Problem("dense", "fp16", 4096, 2048), "sm_90").path == "wide_128x128"
    assert choose(Problem("dense", "bf16", 16384, 64), "sm_90").path == "wide_128x64"
    assert "wide" not in choose(Problem("dense", "bf16", 4096, 2048, problems=8, routed=True), "sm_90").path
    assert choose(Problem("dense", "bf16", 4096, 2048), "sm_80").path == "narrow"
    assert choose(Problem("dense", "bf16", 4096, 2048), "host").path == "tile"
    assert choose(Problem("dense", "bf16", 32, 256, K=2880), "sm_90").path == "small"


def test_a_path_that_is_not_there_is_refused(device):
    x, weight = data(2, 16, 32, "fp16", (120, 130))
    x, weight = device.upload(x), Quantized(*map(device.upload, weight))
    with pytest.raises(UserError, match=r"no path 'wide_256x128' for gemm and fp16 on .*; there are: .*small"):
        functional.gemm(x, weight, path="wide_256x128", device=device)


def test_more_tiles_than_a_grid_has_are_refused():
    problem = Problem("gemm", "bf16", 16, 65_535 * 128 + 1)
    assert choose(replace(problem, rows=65_535 * 64 + 1), "sm_90").rows == 128  # what is faster has too many
    with pytest.raises(UserError, match="up to 65535 tiles of 128 rows and as many matrices, not 8388481 rows"):
        problem.blocks(choose(problem, "sm_90"))


def test_what_is_chosen_is_nearly_the_fastest_that_was_measured():
    """On an H100, every kernel that might be, at 159 shapes."""
    measured = {}
    with (paths.baselines() / "bench" / "gemm_paths_sm_90.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            sizes = (int(row[name]) for name in ("N", "rows", "problems"))
            problem = Problem(row["weights"], row["dtype"], *sizes, K=int(row["K"]))
            measured.setdefault(problem, {})[row["path"]] = float(row["us"])
    lost = {}
    for problem, us in measured.items():
        chosen = choose(problem, "sm_90")
        lost[problem] = us[chosen.path] / min(us.values())
        assert 0.7 < microseconds(problem, chosen) / us[chosen.path] < 1.35
    assert len(lost) == 159
    assert sum(lost.values()) / len(lost) < 1.02
    assert max(lost.values()) < 1.3
