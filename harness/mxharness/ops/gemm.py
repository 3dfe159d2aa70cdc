"""GEMM: y = x W^T + bias, W (N, K) in MXFP4, x (M, K) bf16 or fp16, float32 accumulation.

The accumulation order is declared (tensor_core.py, kernels/mma.cuh), so the bits are predicted on any data and do not
depend on M: a row of y is the same alone and in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from hypothesis import strategies as st

from mxharness import golden as reference
from mxharness import mxfp4, regimes, tensor_core
from mxharness.device import Device
from mxharness.errors import UserError
from mxharness.op import Case, Expected, Op, Tensors, Tolerance
from mxharness.ops.inputs import check_tensors, check_weights

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
SMALL_M = 8
"""Up to here the kernel for few tokens runs; both have the same bits."""
REGIMES = ("normal", "codes", "integers", "wide", "positive", "outliers", "extreme", "nan", "overflow", "infinite")

CASES = (
    *(
        Case("gemm", shape, regime=regime, dtype=dtype, options=("fp32",))
        for shape in ((3, 33, 64), (8, 64, 288), (33, 70, 160))
        for regime in REGIMES
        for dtype in ("bf16", "fp16")
    ),
    *(
        Case("gemm", shape, regime=regime, dtype=dtype)
        for shape in ((1, 1, 32), (1, 300, 2880), (9, 16, 96), (64, 64, 128), (65, 129, 416), (130, 40, 1056))
        for regime in ("normal", "integers")
        for dtype in ("bf16", "fp16")
    ),
    *(
        Case("gemm", shape, regime=regime, dtype=dtype, options=("bias", *output))
        for shape in ((5, 48, 96), (20, 80, 192))
        for regime in ("normal", "wide")
        for dtype in ("bf16", "fp16")
        for output in ((), ("fp32",))
    ),
)


def make_inputs(case: Case) -> Tensors:
    """X (M, K), codes (N, K/2), scales (N, K/32), and bias (N) float32 where the case has one."""
    M, N, K = case.shape
    codes, scales = regimes.weights(case, (N, K))
    inputs = {"x": regimes.activations(case, (M, K)), "codes": codes, "scales": scales}
    if "bias" in case.options:
        inputs["bias"] = regimes.bias(case, N)
    return inputs


def golden(case: Case, inputs: Tensors) -> Mapping[str, Expected]:
    """Y (M, N): chain of a chunk and the sum of the chunks, one more for the bias."""
    # Through float32: a weight past its range is Inf by the format's policy (docs/format.md).
    weights = reference.decode(mxfp4.unpack(inputs["codes"]), inputs["scales"]).to(torch.float32)
    value, magnitude = reference.contraction(inputs["x"], weights)
    chunk, K = tensor_core.CHUNK[case.dtype], case.shape[2]
    chain = min(chunk, K) + -(-K // chunk)
    if "bias" in inputs:
        bias = inputs["bias"].double()
        value, magnitude, chain = value + bias, magnitude + bias.abs(), chain + 1
    return {"y": Expected(value, magnitude, chain, _out_dtype(case))}


def _out_dtype(case: Case) -> torch.dtype:
    return torch.float32 if "fp32" in case.options else regimes.DTYPES[case.dtype]


def matmul(
    device: Device,
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Run the kernel: x (M, K) bf16 or fp16, codes (N, K/2), scales (N, K/32) uint8, bias (N) float32 -> y (M, N).

    out_dtype is x's dtype (default) or float32. UserError for shapes, dtypes or alignment the kernel does not take.
    """
    check_weights(codes, scales)
    if x.dtype not in DTYPES or out_dtype not in (None, x.dtype, torch.float32):
        raise UserError(f"gemm takes bfloat16 or float16 and gives the same or float32, not {x.dtype} to {out_dtype}")
    N, K = codes.shape[0], codes.shape[1] * 2
    if x.ndim != 2 or x.shape[0] == 0 or x.shape[1] != K:
        raise UserError(
            f"x must be (M, {K}) with at least one row to meet codes {tuple(codes.shape)}, not {tuple(x.shape)}"
        )
    if bias is not None and (bias.dtype != torch.float32 or tuple(bias.shape) != (N,)):
        raise UserError(f"bias must be float32 of shape ({N},), not {bias.dtype} {tuple(bias.shape)}")
    check_tensors(device, x=x, codes=codes, scales=scales, bias=bias)
    M = x.shape[0]
    y = device.empty((M, N), out_dtype or x.dtype)
    arguments = (y, x, codes, scales, bias, M, N, K, int(y.dtype == torch.float32))
    if M <= SMALL_M:
        grid, block, path = (-(-N // 16), -(-M // 8)), (256,), "small"
    else:
        grid, block, path = (-(-N // 64), -(-M // 64)), (128,), "tile"
    device.launch("gemm.cu", f"gemm_{path}_{DTYPES[x.dtype]}", grid, block, *arguments)
    return y


def launch(device: Device, case: Case, inputs: Tensors) -> Tensors:
    """matmul, with float32 output where the case says so."""
    return {"y": matmul(device, inputs["x"], inputs["codes"], inputs["scales"], inputs.get("bias"), _out_dtype(case))}


def predict(case: Case, inputs: Tensors) -> Tensors:
    """The declared order's bits: chunks on the modelled tensor core, their float32 sum, bias, one rounding."""
    codes = reference.decode(mxfp4.unpack(inputs["codes"]), torch.full_like(inputs["scales"], 127))
    scales = np.where(inputs["scales"] == 255, np.nan, np.ldexp(1.0, inputs["scales"].int().numpy() - 127))
    total = torch.from_numpy(tensor_core.gemm(inputs["x"].double().numpy(), codes.numpy(), scales, case.dtype))
    y = total.to(torch.float32)
    if "bias" in inputs:
        y = y + inputs["bias"]
    return {"y": y.to(_out_dtype(case))}


def fuzz() -> st.SearchStrategy[Case]:
    """Any M and N around the tiles' edges, any K, every distribution; half-range outputs where the values fit them."""

    def build(M: int, N: int, blocks: int, regime: str, dtype: str, bias: bool, narrow: bool, seed: int) -> Case:
        options = (*(("bias",) if bias else ()), *(() if narrow and regime in ("normal", "integers") else ("fp32",)))
        return Case("gemm", (M, N, 32 * blocks), regime=regime, dtype=dtype, seed=seed, options=options)

    return st.builds(
        build,
        st.integers(1, 70),
        st.integers(1, 70),
        st.integers(1, 12),
        st.sampled_from(REGIMES),
        st.sampled_from(("bf16", "fp16")),
        st.booleans(),
        st.booleans(),
        st.integers(0, 10_000),
    )


OP = Op(
    name="gemm",
    source="gemm.cu",
    axes="M N K",
    cases=CASES,
    make_inputs=make_inputs,
    golden=golden,
    launch=launch,
    tolerance=Tolerance(
        why="chunks of K products summed on a tensor core, then added in float32",
        unit_roundoff=2.0**-24,
        source="gamma_n with n = chunk + number of chunks (docs/tensor_core.md)",
        ceiling=0.1,
    ),
    fuzz=fuzz,
    predict=predict,
    row_axis="M",
    row_inputs=("x",),
)
