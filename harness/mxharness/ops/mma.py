"""The tensor core: D = C + A B^T, 16 x 8 problems over an unbroken chain of steps of 16.

Not a consumer of weights but what every contraction stands on: its bits are predicted on any data, which is how a
GPU is shown to follow the model that the host device computes with.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hypothesis import strategies as st

from mxharness import golden as reference
from mxharness import places, regimes, tensor_core
from mxharness.bounds import quantum
from mxharness.device import Device
from mxharness.op import ONE_STAGE, Case, Expected, Op, Operand, Tensors, Tolerance
from mxharness.pattern import Places, along

REGIMES = ("normal", "integers", "wide", "positive", "subnormal", "denormal", "specials")

CASES = (
    *(
        Case("mma", (P, K), regime=regime, dtype=dtype)
        for regime in REGIMES
        for dtype in ("bf16", "fp16")
        for P, K in ((64, 16), (16, 128), (2, 2880))
    ),
    *(Case("mma", (64, 16), regime="overflow", dtype=dtype) for dtype in ("bf16", "fp16")),
)


def make_inputs(case: Case) -> Tensors:
    """A (P, 16, K), b (P, 8, K) of the case's dtype, c (P, 16, 8) float32."""
    a, b, c = regimes.operands(case, *case.shape)
    return {"a": a, "b": b, "c": c}


def golden(case: Case, inputs: Tensors) -> Mapping[str, Expected]:
    """D (P, 16, 8): chain K, the magnitude |c| + |a| |b|^T.

    Where operands are subnormal a product's exponent overstates it (it is taken as stored), by up to the operand's own
    leading zeros; such chains are judged with the magnitude that the stored exponents stand for.
    """
    a, b, c = inputs["a"], inputs["b"], inputs["c"].double()
    smallest = 2.0 ** tensor_core.SMALLEST_EXPONENT[case.dtype]
    value, _ = reference.contraction(a, b)
    stored = [torch.where(x == 0, 0.0, x.double().abs().clamp_min(smallest)) for x in (a, b)]
    magnitude = c.abs() + stored[0] @ stored[1].mT
    step = quantum(a).unsqueeze(-1) * quantum(b).unsqueeze(-2)
    step = torch.minimum(step, quantum(c.unsqueeze(-1)))
    return {"d": Expected(value + c, magnitude, chain=case.shape[1] + 1, dtype=torch.float32, quantum=step)}


def launch(device: Device, case: Case, inputs: Tensors) -> Tensors:
    """One warp a problem."""
    a, b, c = inputs["a"], inputs["b"], inputs["c"]
    d = device.empty(tuple(c.shape), torch.float32)
    device.launch("mma.cu", f"mma_{case.dtype}", (a.shape[0],), (32,), d, a, b, c, a.shape[2])
    return {"d": d}


def predict(case: Case, inputs: Tensors) -> Tensors:
    """The model's bits."""
    a, b, c = (inputs[name].double().numpy() for name in ("a", "b", "c"))
    return {"d": torch.from_numpy(tensor_core.mma(c, a, b, case.dtype)).to(torch.float32)}


def where(case: Case, inputs: Tensors) -> Mapping[str, Places]:
    """Problem, row, column, and the lane that holds the element."""
    d = inputs["d"]
    lane = places.lane(torch.arange(8), torch.arange(16).unsqueeze(-1))
    return {"d": {**along(d.shape, "problem", "row", "column"), "lane": lane}}


def fuzz() -> st.SearchStrategy[Case]:
    """Few problems, chains of up to 12 steps."""
    return st.builds(
        lambda P, steps, regime, dtype, seed: Case("mma", (P, 16 * steps), regime=regime, dtype=dtype, seed=seed),
        st.integers(1, 4),
        st.integers(1, 12),
        st.sampled_from(REGIMES),
        st.sampled_from(("bf16", "fp16")),
        st.integers(0, 10_000),
    )


OP = Op(
    name="mma",
    source="mma.cu",
    axes="P K",
    cases=CASES,
    make_inputs=make_inputs,
    golden=golden,
    launch=launch,
    tolerance=Tolerance(
        why="K products added on a tensor core that truncates",
        unit_roundoff=2.0**-24,
        source="a step of 16 loses at most 17 * 2^(E - 25) + 2^-23 |D|, 0.66 of the u a product that gamma_K allows",
        ceiling=0.5,
    ),
    fuzz=fuzz,
    predict=predict,
    without=ONE_STAGE,
    places=where,
    operands=lambda case: {"d": Operand("a")},
    row_axis="P",
    row_inputs=("a", "b", "c"),
)
