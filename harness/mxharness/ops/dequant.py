"""Dequantise: y = code * 2^(scale - 127), rounded once to the output dtype.

Exact in every cell: 16 codes, 256 scale bytes, three dtypes. Cases in another layout go through mxfp4.from_layout
first; their bytes are packed by the independent packer of golden.py, so a layout read wrongly shows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hypothesis import strategies as st

from mxharness import functional, mxfp4, places, regimes
from mxharness import golden as reference
from mxharness.device import Device
from mxharness.op import Case, Expected, Op, Tensors, Tolerance
from mxharness.pattern import Places

DTYPES = ("fp32", "bf16", "fp16")

CASES = (
    *(Case("dequant", (256, 64), regime="cells", dtype=dtype) for dtype in DTYPES),
    *(Case("dequant", (3, K), regime="codes", dtype=dtype) for K in (1, 8, 31, 33, 45, 72, 2880) for dtype in DTYPES),
    *(
        Case("dequant", (4, 96), regime="codes", dtype="fp32", layout=layout)
        for layout in mxfp4.LAYOUTS
        if layout != "linear"
    ),
    Case("dequant", (300, 100), regime="codes"),  # rows that are not 16-byte aligned, more than one thread block
)


def make_inputs(case: Case) -> Tensors:
    """The bytes of (R, Kp) blocks in the case's layout: data, and scales where they lie apart."""
    R, K = case.shape
    codes, scales = regimes.blocks(case, (R, -(-K // 32) * 32))
    data, separate = reference.pack(mxfp4.unpack(codes), scales, case.layout)
    return {"data": data} if separate is None else {"data": data, "scales": separate}


def golden(case: Case, inputs: Tensors) -> Mapping[str, Expected]:
    """Y (R, K): the exact value, rounded once."""
    R, K = case.shape
    codes, scales = regimes.blocks(case, (R, -(-K // 32) * 32))  # what make_inputs packed
    exact = reference.decode(mxfp4.unpack(codes), scales)[:, :K]
    # float64 -> float32 is exact here up to overflow, so the next rounding is the only one.
    return {"y": Expected(exact.to(torch.float32).to(regimes.DTYPES[case.dtype]))}


def launch(device: Device, case: Case, inputs: Tensors) -> Tensors:
    """Linear codes from the case's layout, then the kernel."""
    linear = mxfp4.from_layout(mxfp4.Packed(inputs["data"], inputs.get("scales")), case.layout)
    return {"y": functional.dequantize(linear, regimes.DTYPES[case.dtype], case.shape[1], device=device)}


def where(case: Case, tensors: Tensors) -> Mapping[str, Places]:
    """Row, k, and the code and scale that lie there."""
    R, K = case.shape
    codes, scales = regimes.blocks(case, (R, -(-K // 32) * 32))
    return {"y": places.decoded(tensors["y"], mxfp4.unpack(codes), scales, "row")}


def fuzz() -> st.SearchStrategy[Case]:
    """Any rows and columns, every layout and dtype."""
    return st.builds(
        lambda R, K, dtype, layout, seed: Case(
            "dequant", (R, K), regime="codes", dtype=dtype, layout=layout, seed=seed
        ),
        st.integers(1, 20),
        st.integers(1, 200),
        st.sampled_from(DTYPES),
        st.sampled_from(tuple(mxfp4.LAYOUTS)),
        st.integers(0, 10_000),
    )


OP = Op(
    name="dequant",
    source="dequant.cu",
    axes="R K",
    cases=CASES,
    make_inputs=make_inputs,
    golden=golden,
    launch=launch,
    tolerance=Tolerance(
        why="every decoded value is exact or rounded once", source="OCP MX 1.0, sections 5.3.3 and 5.4.1"
    ),
    fuzz=fuzz,
    places=where,
    row_axis="R",
    row_inputs=("data", "scales"),
)
