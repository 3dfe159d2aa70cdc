"""GEMM: y = x W^T + bias, W (N, K) in MXFP4, x (M, K) bf16 or fp16, float32 accumulation.

The accumulation order is declared (tensor_core.py, kernels/mma.cuh), so the bits are predicted on any data and do not
depend on M: a row of y is the same alone and in a batch. gemm_batch multiplies by E matrices in one launch,
gemm_persistent by a weight dequantised beforehand; both have the bits of gemm. dense is the same for an unquantised w.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from hypothesis import strategies as st

from mxharness import functional, mxfp4, places, regimes, tensor_core
from mxharness import golden as reference
from mxharness.bounds import quantum
from mxharness.device import Device
from mxharness.functional import dispatch
from mxharness.op import ONE_STAGE, Case, Expected, Op, Operand, Tensors, Tolerance
from mxharness.pattern import Places

REGIMES = ("normal", "codes", "integers", "wide", "positive", "outliers", "extreme", "nan", "overflow", "infinite")
PERSISTENT_REGIMES = tuple(regime for regime in REGIMES if regime not in ("overflow", "infinite", "extreme"))
"""A half operand without its scale cannot become Inf where the scaled weight is."""
DENSE_REGIMES = ("normal", "integers", "wide", "positive", "outliers")

GEMM = (
    *(
        Case("gemm", shape, regime=regime, dtype=dtype, options=("fp32",))
        for shape in ((8, 64, 288), (3, 33, 64), (33, 70, 160))
        for regime in REGIMES
        for dtype in ("bf16", "fp16")
    ),
    *(
        Case("gemm", shape, regime=regime, dtype=dtype)
        for shape in ((1, 1, 32), (1, 300, 2880), (9, 16, 96), (64, 64, 128), (65, 129, 416), (130, 40, 1056))
        for regime in ("normal", "integers")
        for dtype in ("bf16", "fp16")
    ),
    *(Case("gemm", (2048, 18, 64), regime="wide", dtype=dtype, options=("fp32",)) for dtype in ("bf16", "fp16")),
    *(
        Case("gemm", shape, regime="normal", dtype=dtype)
        # past the 512 k whose scales come at once; a later round of warps that share K; features for whole warps
        for shape in ((33, 70, 1120), (2, 16, 8224), (9, 32768, 32))
        for dtype in ("bf16", "fp16")
    ),
)
PATHS = ("deep", "small", "thin_32x16", "thin_32x32", "thin_64x8", "thin_64x16", "thin_64x32", "thin_64x64")
WIDE_PATHS = ("split_64x32", "wide_64x64", "wide_128x64", "wide_128x128", "wide_256x128")
SHARED_K = ("split_64x32", "wide_64x64", "thin_64x32")
"""Whose warps or warpgroups take the chunks of K in turn."""
_HOPPERS = {dtype: {plan.path for plan in dispatch.plans("gemm", dtype, "sm_90")} for dtype in ("bf16", "fp16")}
GEMM += tuple(  # every kernel, whatever the shape would take
    Case("gemm", shape, regime=regime, dtype=dtype, options=(*output, f"path={path}"))
    for path, shape, chosen, output in (
        ("wide_128x64", (33, 70, 160), REGIMES, ("fp32",)),
        ("wide_128x64", (33, 70, 1120), ("extreme",), ("fp32",)),
        ("wide_64x64", (40, 40, 2208), ("normal",), ("fp32",)),  # more scales than it holds at once
        *((path, (33, 70, 1120), ("normal", "extreme", "nan"), ("fp32",)) for path in SHARED_K),
        *((path, (65, 129, 416), ("normal",), ()) for path in WIDE_PATHS),
        *((path, (33, 40, 1024), ("normal",), ()) for path in (*WIDE_PATHS, "thin_32x32")),  # sixteen scales at once
        *((path, (9, 70, 544), ("normal", "extreme"), ("fp32",)) for path in PATHS),
    )
    for regime in chosen
    for dtype in ("bf16", "fp16")
    if path in _HOPPERS[dtype]
)
SHORT = tuple(  # fewer chunks than warpgroups that share them; a row's scales end with a pair that is not wanted
    Case("gemm", shape, dtype=dtype, options=("fp32", f"path={path}"))
    for path, shape in (
        ("split_64x32", (30, 40, 160)),
        ("wide_64x64", (33, 40, 96)),
        ("thin_64x32", (33, 40, 576)),
    )
    for dtype in ("bf16", "fp16")
    if path in _HOPPERS[dtype]
)
NOT_FULL = tuple(
    Case("gemm", (rows, 70, 544), dtype=dtype, options=("fp32", f"path={path}"))
    for path, counts in (
        ("thin_64x16", (21,)),
        ("thin_64x32", (37, 45, 53)),
        ("thin_64x64", (69, 77, 85, 93, 101, 115)),
        ("wide_128x128", (133,)),
        ("wide_256x128", (133,)),
    )
    for rows in counts
    for dtype in ("bf16", "fp16")
    if path in _HOPPERS[dtype]
)
"""A full tile and one that takes fewer columns, each of the numbers that there are."""
GEMM += SHORT + NOT_FULL
GEMM_BIAS = tuple(
    Case("gemm_bias", shape, regime=regime, dtype=dtype, options=output)
    for shape in ((5, 48, 96), (20, 80, 192))
    for regime in ("normal", "wide", "integers")
    for dtype in ("bf16", "fp16")
    for output in ((), ("fp32",))
)
GEMM_BATCH = (
    *(
        Case("gemm_batch", shape, regime=regime, dtype=dtype, options=options)
        for shape, options in (((3, 5, 33, 64), ("fp32",)), ((2, 20, 70, 160), ("bias", "fp32")), ((9, 1, 16, 288), ()))
        for regime in ("normal", "integers", "wide")
        for dtype in ("bf16", "fp16")
    ),
)
GEMM_PERSISTENT = (
    *(
        Case("gemm_persistent", (7, 40, 288), regime=regime, dtype=dtype, options=("bias", "fp32"))
        for regime in PERSISTENT_REGIMES
        for dtype in ("bf16", "fp16")
    ),
    *(
        Case("gemm_persistent", (70, 65, 160), regime=regime, dtype=dtype, options=options)
        for options in ((), ("path=tile",))
        for regime in ("normal", "integers")
        for dtype in ("bf16", "fp16")
    ),
)
GEMM_PERSISTENT += tuple(  # more chunks than are brought at once, a cluster's two blocks, two pieces of 128 features
    Case(
        "gemm_persistent",
        (140, 150, 672),
        regime=regime,
        dtype=dtype,
        options=("bias", "fp32", f"path={plan.path}"),
    )
    for dtype in ("bf16", "fp16")
    for plan in dispatch.plans("dense", dtype, "sm_90")
    if plan.maps_weights
    for regime in ("normal", "nan")
)
DENSE = tuple(
    Case("dense", shape, regime=regime, dtype=dtype, options=options)
    for shape, options in (((3, 33, 64), ("fp32",)), ((66, 40, 160), ("bias",)), ((2, 128, 288), ("bias", "fp32")))
    for regime in ("normal", "integers", "wide")
    for dtype in ("bf16", "fp16")
)


def sizes(case: Case) -> tuple[int, int, int, int]:
    """E, M, N, K; E is 1 but for gemm_batch."""
    E, M, N, K = case.shape if len(case.shape) == 4 else (1, *case.shape)
    return E, M, N, K


def make_inputs(case: Case) -> Tensors:
    """X (M, K), codes (N, K/2), scales (N, K/32), bias (N) float32 if the case has one; (E, ..) in a batch."""
    E, M, N, K = sizes(case)
    if case.op == "dense":
        bias = {"bias": regimes.bias(case, N)} if "bias" in case.options else {}
        return {"x": regimes.activations(case, (M, K)), "w": regimes.activations(case, (N, K), "w"), **bias}
    codes, scales = regimes.weights(case, (E * N, K))
    inputs = {"x": regimes.activations(case, (E * M, K)), "codes": codes, "scales": scales}
    if case.op == "gemm_bias" or "bias" in case.options:
        inputs["bias"] = regimes.bias(case, E * N)
    if case.op != "gemm_batch":
        return inputs
    return {name: tensor.reshape(E, -1, *tensor.shape[1:]) for name, tensor in inputs.items()}


def linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> Expected:
    """Y (.., M, N) = x W^T + bias for W in MXFP4."""
    # Through float32: a weight past its range is Inf by the format's policy (docs/format.md).
    weights = reference.decode(mxfp4.unpack(codes), scales).to(torch.float32)
    return linear_dense(x, weights, bias, dtype, weight_quantum(scales))


def weight_quantum(scales: torch.Tensor) -> torch.Tensor:
    """(.., N) float64: every weight of a row is an integer multiple of half its smallest scale."""
    return torch.exp2(scales.amin(-1).double() - 128)


def linear_dense(
    x: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    of_weights: torch.Tensor | None = None,
) -> Expected:
    """Y (.., M, N) = x w^T + bias: chain of a chunk and the sum of the chunks, one more for the bias.

    of_weights: the quantum of each row of weights, where it is known.
    """
    value, magnitude = reference.contraction(x, weights)
    step = quantum(x).unsqueeze(-1) * (quantum(weights) if of_weights is None else of_weights).unsqueeze(-2)
    chunk, K = tensor_core.CHUNK[functional.ACTIVATIONS[x.dtype]], x.shape[-1]
    chain = min(chunk, K) + -(-K // chunk)
    if bias is not None:
        wide = bias.double().unsqueeze(-2)
        value, magnitude, chain = value + wide, magnitude + wide.abs(), chain + 1
        step = torch.minimum(step, quantum(bias.unsqueeze(-1)).unsqueeze(-2))
    return Expected(value, magnitude, chain, dtype, quantum=step)


def linear_bits(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The declared order's bits: chunks on the modelled tensor core, their float32 sum, bias, one rounding."""
    values = reference.decode(mxfp4.unpack(codes), torch.full_like(scales, 127))
    powers = np.where(scales == 255, np.nan, np.ldexp(1.0, scales.int().numpy() - 127))
    total = tensor_core.gemm(x.double().numpy(), values.numpy(), powers, functional.ACTIVATIONS[x.dtype])
    y = torch.from_numpy(total).to(torch.float32)
    return (y if bias is None else y + bias).to(dtype)


def linear_dense_bits(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The same for an unquantised w (N, K)."""
    ones = np.ones((w.shape[0], w.shape[1] // mxfp4.BLOCK))
    total = tensor_core.gemm(x.double().numpy(), w.double().numpy(), ones, functional.ACTIVATIONS[x.dtype])
    y = torch.from_numpy(total).to(torch.float32)
    return (y if bias is None else y + bias).to(dtype)


def golden(case: Case, tensors: Tensors) -> Mapping[str, Expected]:
    """Y (M, N), or (E, M, N)."""
    bias = tensors.get("bias")
    if case.op == "dense":
        return {"y": linear_dense(tensors["x"], tensors["w"], bias, _out_dtype(case))}
    return {"y": linear(tensors["x"], tensors["codes"], tensors["scales"], bias, _out_dtype(case))}


def predict(case: Case, tensors: Tensors) -> Tensors:
    """As golden, in bits."""
    x, bias, dtype = tensors["x"], tensors.get("bias"), _out_dtype(case)
    if case.op == "dense":
        return {"y": linear_dense_bits(x, tensors["w"], bias, dtype)}
    codes, scales = tensors["codes"], tensors["scales"]
    if case.op != "gemm_batch":
        return {"y": linear_bits(x, codes, scales, bias, dtype)}
    each = [
        linear_bits(x[e], codes[e], scales[e], None if bias is None else bias[e], dtype) for e in range(case.shape[0])
    ]
    return {"y": torch.stack(each)}


def _path(device: Device, case: Case, kind: str) -> str:
    """The kernel that the case names, where the device has it."""
    path = case.option("path") or ""
    return path if path in (plan.path for plan in dispatch.plans(kind, case.dtype, device.device_class)) else ""


def _out_dtype(case: Case) -> torch.dtype:
    return torch.float32 if "fp32" in case.options else regimes.DTYPES[case.dtype]


def launch(device: Device, case: Case, inputs: Tensors) -> Tensors:
    """The function of the case's name, with float32 output where the case says so."""
    x, bias, dtype = inputs["x"], inputs.get("bias"), _out_dtype(case)
    if case.op == "dense":
        return {"y": functional.dense(x, inputs["w"], bias, out_dtype=dtype, device=device)}
    weight = mxfp4.Quantized(inputs["codes"], inputs["scales"])
    match case.op:
        case "gemm":
            return {"y": functional.gemm(x, weight, out_dtype=dtype, path=_path(device, case, "gemm"), device=device)}
        case "gemm_bias":
            return {"y": functional.gemm_bias(x, weight, inputs["bias"], out_dtype=dtype, device=device)}
        case "gemm_batch":
            return {"y": functional.gemm_batch(x, weight, bias, out_dtype=dtype, device=device)}
    held = functional.persistent(weight, x.dtype, device=device)
    path = _path(device, case, "dense")
    return {"y": functional.gemm_persistent(x, held, bias, out_dtype=dtype, path=path, device=device)}


def where(case: Case, tensors: Tensors) -> Mapping[str, Places]:
    """Matrix, row, feature."""
    y = tensors["y"]
    return {"y": places.product(y, *(("matrix", "row") if y.ndim == 3 else ("row",)))}


def fuzz(name: str) -> st.SearchStrategy[Case]:
    """Any M and N around the tiles' edges, any K, every distribution; half-range outputs where the values fit them."""

    def build(M: int, N: int, blocks: int, regime: str, dtype: str, bias: bool, narrow: bool, seed: int) -> Case:
        shape = (1 + seed % 4, 1 + M // 4, N, 32 * blocks) if name == "gemm_batch" else (M, N, 32 * blocks)
        with_bias = ("bias",) if bias and name in ("gemm_batch", "gemm_persistent", "dense") else ()
        named = [path for path in (*WIDE_PATHS, *PATHS) if path in _HOPPERS[dtype]]
        path = (f"path={named[seed // 2 % len(named)]}",) if name == "gemm" and seed % 2 else ()
        options = (*with_bias, *(() if narrow and regime in ("normal", "integers") else ("fp32",)), *path)
        return Case(name, shape, regime=regime, dtype=dtype, seed=seed, options=options)

    return st.builds(
        build,
        st.integers(1, 70),
        st.integers(1, 70),
        st.integers(1, 12),
        st.sampled_from({"gemm_persistent": PERSISTENT_REGIMES, "dense": DENSE_REGIMES}.get(name, REGIMES)),
        st.sampled_from(("bf16", "fp16")),
        st.booleans(),
        st.booleans(),
        st.integers(0, 10_000),
    )


TOLERANCE = Tolerance(
    why="chunks of K products summed on a tensor core, then added in float32",
    unit_roundoff=2.0**-24,
    source="gamma_n with n = chunk + number of chunks (docs/tensor_core.md)",
    ceiling=0.1,
)


def _op(name: str, cases: tuple[Case, ...], axes: str = "M N K") -> Op:
    batch = name == "gemm_batch"
    draw: Callable[[], st.SearchStrategy[Case]] = partial(fuzz, name)
    return Op(
        name=name,
        source="gemm.cu",
        axes=axes,
        cases=cases,
        make_inputs=make_inputs,
        golden=golden,
        launch=launch,
        tolerance=TOLERANCE,
        fuzz=draw,
        predict=predict,
        without=ONE_STAGE,
        places=where,
        operands=lambda case: {"y": Operand("x")},
        row_axis="E" if batch else "M",
        row_inputs=("x", "codes", "scales", "bias") if batch else ("x",),
    )


OPS = (
    _op("gemm", GEMM),
    _op("gemm_bias", GEMM_BIAS),
    _op("gemm_batch", GEMM_BATCH, axes="E M N K"),
    _op("gemm_persistent", GEMM_PERSISTENT),
    _op("dense", DENSE),
)
