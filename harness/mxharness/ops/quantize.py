"""Quantise: codes, scales = Q(x), blocks of 32 along K, every scale and tie rule of the format.

Exact: the kernel's bytes are the reference's bytes. A block that holds NaN or Inf becomes scale byte 255, codes 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hypothesis import strategies as st

from mxharness import functional, mxfp4, regimes
from mxharness import golden as reference
from mxharness.device import Device
from mxharness.op import Case, Expected, Op, Tensors, Tolerance
from mxharness.pattern import Places, along

REGIMES = ("normal", "ties", "edges", "tiny", "specials", "wide")

CASES = (
    *(
        Case("quantize", (5, 2880), regime=regime, dtype=dtype)
        for regime in REGIMES
        for dtype in ("fp32", "bf16", "fp16")
    ),
    *(Case("quantize", (3, K), dtype="fp32", regime="ties") for K in (1, 31, 32, 33, 49, 72)),
    *(
        Case("quantize", (4, 320), regime=regime, dtype="fp32", options=(f"scale={scale}", f"tie={tie}"))
        for regime in ("ties", "edges")
        for scale in mxfp4.SCALE_RULES
        for tie in mxfp4.TIE_RULES
        if (scale, tie) != ("floor", "even")
    ),
    *(Case("quantize", (3, 100), dtype=dtype, regime="ties") for dtype in ("bf16", "fp16")),  # rows not 16-byte aligned
    *(
        Case("quantize", (4, 320), regime="specials", dtype="fp32", options=(f"scale={scale}", "tie=even"))
        for scale in ("even", "rceil", "ceil")
    ),
    Case("quantize", (300, 96), dtype="bf16"),  # more threads than one block
)


def rules(case: Case) -> tuple[str, str]:
    """The scale and tie rule a case asks for; the standard's are the default."""
    return case.option("scale") or "floor", case.option("tie") or "even"


def make_inputs(case: Case) -> Tensors:
    """X (R, K)."""
    return {"x": regimes.tensor(case, case.shape)}


def golden(case: Case, inputs: Tensors) -> Mapping[str, Expected]:
    """Codes (R, Kp/2) and scales (R, Kp/32), uint8."""
    x = inputs["x"].double()
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).reshape(x.shape[0], -1, 32)
    broken = ~blocks.isfinite().all(-1)
    codes, scales = reference.quantize(torch.where(broken.unsqueeze(-1), 0.0, blocks).flatten(1), *rules(case))
    codes[broken.repeat_interleave(32, 1)] = 0
    scales[broken] = mxfp4.SCALE_NAN
    return {"codes": Expected(reference.pack(codes, scales, "linear")[0]), "scales": Expected(scales)}


def launch(device: Device, case: Case, inputs: Tensors) -> Tensors:
    """The kernel under the case's rules."""
    codes, scales = functional.quantize(inputs["x"], *rules(case), device=device)
    return {"codes": codes, "scales": scales}


def where(case: Case, tensors: Tensors) -> Mapping[str, Places]:
    """Row, and the byte or the scale along it."""
    codes, scales = tensors["codes"], tensors["scales"]
    block = {"scale index": torch.arange(codes.shape[1]).unsqueeze(0) // 16}
    return {
        "codes": {**along(codes.shape, "row", "byte"), **block},
        "scales": along(scales.shape, "row", "scale index"),
    }


def fuzz() -> st.SearchStrategy[Case]:
    """Any rows, columns, rules and distributions."""
    options = st.tuples(st.sampled_from(mxfp4.SCALE_RULES), st.sampled_from(mxfp4.TIE_RULES))
    return st.builds(
        lambda R, K, regime, dtype, rule, seed: Case(
            "quantize", (R, K), regime=regime, dtype=dtype, seed=seed, options=(f"scale={rule[0]}", f"tie={rule[1]}")
        ),
        st.integers(1, 9),
        st.integers(1, 200),
        st.sampled_from(REGIMES),
        st.sampled_from(("fp32", "bf16", "fp16")),
        options,
        st.integers(0, 10_000),
    )


OP = Op(
    name="quantize",
    source="quantize.cu",
    axes="R K",
    cases=CASES,
    make_inputs=make_inputs,
    golden=golden,
    launch=launch,
    tolerance=Tolerance(why="codes and scale bytes are decided, not rounded", source="OCP MX 1.0, section 6.3"),
    fuzz=fuzz,
    places=where,
    row_axis="R",
    row_inputs=("x",),
)
