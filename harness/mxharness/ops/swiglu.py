"""The activation of gpt-oss: y = g / (1 + e^(-alpha g)) * (u + 1), g = min(gate, limit), u = up within +-limit.

Gate and up alternate along a row, or are its halves. A kernel of ffn.cu; the MoE layer has it between its projections.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from hypothesis import strategies as st

from mxharness import functional, regimes
from mxharness.device import Device
from mxharness.op import ONE_STAGE, Case, Expected, Op, Tensors, Tolerance
from mxharness.ops import activation_bits, activations
from mxharness.pattern import Places, along

REGIMES = ("normal", "limits", "wide", "specials")
DTYPES = ("fp32", "bf16", "fp16")
SETTINGS = {"default": (1.702, 7.0), "other": (1.0, 0.75), "unlimited": (1.702, np.inf)}
"""alpha and limit by option."""

CASES = (
    *(
        Case("swiglu", shape, regime, dtype, options=options)
        for (shape, options) in (((3, 33), ("default",)), ((7, 40), ("default", "halves")))
        for regime in REGIMES
        for dtype in DTYPES
    ),
    *(Case("swiglu", (2, 65), "limits", dtype, options=("halves", "other")) for dtype in DTYPES),
    *(Case("swiglu", (5, 9), "limits", dtype, options=("unlimited",)) for dtype in DTYPES),
    *(Case("swiglu", (1, 1), dtype=dtype, options=("default",)) for dtype in DTYPES),
    Case("swiglu", (2048, 5), "limits", options=("default",)),
)


def make_inputs(case: Case) -> Tensors:
    """X (M, 2 I); "limits": around both limits, on both sides of zero, and at them."""
    M, I = case.shape  # noqa: E741  the intermediate size
    if case.regime != "limits":
        return {"x": regimes.tensor(case, (M, 2 * I))}
    rng = regimes.generator(case, "x")
    x = rng.uniform(-12, 12, (M, 2 * I))
    x = np.where(rng.random(x.shape) < 0.2, rng.choice([-7.0, 7.0, -1.0, 0.0], x.shape), x)
    return {"x": torch.from_numpy(x).to(torch.float32).to(regimes.DTYPES[case.dtype])}


def _setting(case: Case) -> tuple[float, float]:
    return next(setting for name, setting in SETTINGS.items() if name in case.options)


def golden(case: Case, inputs: Tensors) -> Mapping[str, Expected]:
    """Y (M, I)."""
    x, (alpha, limit) = inputs["x"], _setting(case)
    gate, up = x.chunk(2, 1) if "halves" in case.options else (x[:, 0::2], x[:, 1::2])
    function = partial(activations.swiglu_limited, alpha=alpha, limit=limit)
    return {"y": activations.expected(function, x.dtype, gate, up)}


def predict(case: Case, inputs: Tensors) -> Tensors:
    """As golden, in bits."""
    x, (alpha, limit) = inputs["x"], _setting(case)
    gate, up = x.chunk(2, 1) if "halves" in case.options else (x[:, 0::2], x[:, 1::2])
    function = partial(activation_bits.swiglu_limited, alpha=alpha, limit=limit)
    return {"y": activation_bits.activated(function, x.dtype, gate, up)}


def where(case: Case, tensors: Tensors) -> Mapping[str, Places]:
    """Row, feature, and on which side of the limits gate and up lie."""
    x, (_, limit) = tensors["x"], _setting(case)
    gate, up = x.chunk(2, 1) if "halves" in case.options else (x[:, 0::2], x[:, 1::2])
    sides = {
        "where the gate is above the limit": gate > limit,
        "where the gate is below -limit": gate < -limit,
        "where up is above the limit": up > limit,
        "where up is below -limit": up < -limit,
        "where gate or up is NaN": gate.isnan() | up.isnan(),
    }
    return {"y": {**along(tensors["y"].shape, "row", "feature"), **{name: at.long() for name, at in sides.items()}}}


def launch(device: Device, case: Case, inputs: Tensors) -> Tensors:
    """One thread an element."""
    alpha, limit = _setting(case)
    interleaved = "halves" not in case.options
    y = functional.swiglu(inputs["x"], alpha=alpha, limit=limit, interleaved=interleaved, device=device)
    return {"y": y}


def fuzz() -> st.SearchStrategy[Case]:
    """Any sizes, every dtype, setting and arrangement.

    Half has no room for wide data: an infinite up would meet a gate that vanishes in float32 and not in float64.
    """
    kinds = [(regime, dtype) for regime in REGIMES for dtype in DTYPES if (regime, dtype) != ("wide", "fp16")]
    return st.builds(
        lambda M, width, kind, setting, halves, seed: Case(
            "swiglu", (M, width), regime=kind[0], dtype=kind[1], seed=seed, options=tuple(sorted((setting, *halves)))
        ),
        st.integers(1, 20),
        st.integers(8, 100),
        st.sampled_from(kinds),
        st.sampled_from(tuple(SETTINGS)),
        st.sampled_from(((), ("halves",))),
        st.integers(0, 10_000),
    )


OP = Op(
    name="swiglu",
    source="ffn.cu",
    axes="M I",
    cases=CASES,
    make_inputs=make_inputs,
    golden=golden,
    launch=launch,
    tolerance=Tolerance(
        why="a sigmoid, three products and a sum in float32, then one rounding",
        unit_roundoff=2.0**-24,
        source="the first-order effect of roundings (ops/activations.py)",
        ceiling=0.02,
    ),
    fuzz=fuzz,
    predict=predict,
    without={**ONE_STAGE, "exact-arithmetic": "no sum but u + 1: a sigmoid rounds"},
    places=where,
    row_axis="M",
    row_inputs=("x",),
)
