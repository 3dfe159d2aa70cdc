"""The elementary functions that kernels share: y = f(x) in float32, each within its measured error.

Not a consumer of weights but what every non-linear one stands on (kernels/math.cuh). ULP holds the largest error over
all 2^32 inputs, in units in the last place of the exact value; the bound is that and nothing more. Every operation is
rounded once, so that the bits are predicted too (ops/elementary_bits.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from hypothesis import strategies as st

from mxharness import regimes
from mxharness.device import Device
from mxharness.op import ONE_STAGE, Case, Expected, Op, Tensors, Tolerance
from mxharness.ops import elementary_bits

FUNCTIONS = {
    "exp": torch.exp,
    "exp2": torch.exp2,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.special.erf,
    "rsqrt": torch.rsqrt,
}
ULP = {"exp": 0.67, "exp2": 0.67, "sigmoid": 1.48, "tanh": 1.06, "erf": 1.0, "rsqrt": 1.5}
"""As measured, rounded up; stated beside each function in math.cuh too."""
SUBNORMAL_ULP = 0.12
"""So much more where the result is subnormal: it has been rounded twice."""
EDGES = (0.0, 2.0**-149, 2.0**-126, 0.65, 1.0, 3.92, 10.0, 16.6, 87.34, 88.73, 103.98, 3.4e38, np.inf)
"""Magnitudes where a function takes another branch, saturates, or leaves the normal numbers."""
WORST = {
    "exp": (-5.88844728, 59.3011971, -87.7155304, 88.7228, -103.9, -27.3762455, 5.2068491),
    "exp2": (-0.496760041, -126.465225, 127.999992, 128.0, -149.5, -149.999985, 42.496760),
    "sigmoid": (-6.23706579, -6.23769903, -3.44006157, 7.85982847),
    "tanh": (-0.693442225,),
    "erf": (-1.06696296,),
    "rsqrt": (1.85608536e19,),
}
"""Where the error is largest, of the function or of one that lacks a correction (the reduction's rest in e^x, what the
sum of the sigmoid loses), or the result nearest to the ends of float32."""
REGIMES = ("normal", "wide", "tiny", "specials", "bits", "edges")

CASES = (
    *(
        Case("elementary", (3, 333), regime, "fp32", options=(f"fn={name}",))
        for name in FUNCTIONS
        for regime in REGIMES
    ),
    *(Case("elementary", (40, 7), "bits", "fp32", options=(f"fn={name}",)) for name in FUNCTIONS),
    Case("elementary", (2048, 3), "bits", "fp32", options=("fn=exp",)),
    *(Case("elementary", (1, len(x)), "worst", "fp32", options=(f"fn={name}",)) for name, x in WORST.items()),
)


def make_inputs(case: Case) -> Tensors:
    """X (M, K) float32; "bits": any bit pattern; "edges": some units in the last place around EDGES; "worst": WORST."""
    if case.regime == "worst":
        return {"x": torch.tensor(WORST[case.option("fn") or ""]).expand(case.shape).contiguous()}
    rng = regimes.generator(case, "x")
    if case.regime == "bits":
        patterns = rng.integers(0, 2**32, case.shape, dtype=np.uint32)
        return {"x": torch.from_numpy(patterns.view(np.float32))}
    if case.regime == "edges":
        nearest = rng.choice(np.array(EDGES, dtype=np.float32), case.shape).view(np.int32)
        moved = np.clip(nearest + rng.integers(-20, 21, case.shape, dtype=np.int32), 0, 0x7F800000).astype(np.uint32)
        signs = rng.integers(0, 2, case.shape, dtype=np.uint32) << 31
        return {"x": torch.from_numpy((moved | signs).view(np.float32))}
    return {"x": regimes.tensor(case, case.shape)}


def golden(case: Case, inputs: Tensors) -> Mapping[str, Expected]:
    """Y (M, K), float64."""
    name = case.option("fn") or ""
    return {"y": within(FUNCTIONS[name](inputs["x"].double()), ULP[name])}


def within(value: torch.Tensor, ulps: float) -> Expected:
    """A float32 output at most `ulps` units in the last place from `value`.

    The judge allows u |value| (half a unit or more) and the smallest subnormal by itself; the magnitude is the rest.
    The unit is that of the float32 nearest to `value`, so that float64's last bit does not decide it.
    """
    nearest = value.float().double().abs()
    unit = torch.exp2((nearest.clamp(2.0**-126, 2.0**127).frexp().exponent - 24).double())
    allowed = torch.where(nearest < 2.0**-126, ulps + SUBNORMAL_ULP, ulps)
    rest = allowed * unit - 2.0**-24 * value.abs() - 2.0**-149
    return Expected(value, rest.nan_to_num(0.0, neginf=0.0).clamp_min(0.0) * 2.0**24, 1, torch.float32)


def predict(case: Case, inputs: Tensors) -> Tensors:
    """As golden, in bits."""
    return {"y": torch.from_numpy(elementary_bits.compute(case.option("fn") or "", inputs["x"].numpy()))}


def launch(device: Device, case: Case, inputs: Tensors) -> Tensors:
    """One thread an element."""
    x = inputs["x"]
    y = device.empty(tuple(x.shape), torch.float32)
    kernel = f"elementary_{case.option('fn')}"
    device.launch("elementary.cu", kernel, (-(-x.numel() // 256),), (256,), y, x, np.int64(x.numel()))
    return {"y": y}


def fuzz() -> st.SearchStrategy[Case]:
    """Every function on every distribution."""
    return st.builds(
        lambda M, K, name, regime, seed: Case("elementary", (M, K), regime, "fp32", seed=seed, options=(f"fn={name}",)),
        st.integers(1, 9),
        st.integers(64, 500),  # few results near zero among them, so that the median bound stays small
        st.sampled_from(tuple(FUNCTIONS)),
        st.sampled_from(REGIMES),
        st.integers(0, 10_000),
    )


OP = Op(
    name="elementary",
    source="elementary.cu",
    axes="M K",
    cases=CASES,
    make_inputs=make_inputs,
    golden=golden,
    launch=launch,
    tolerance=Tolerance(
        why="a polynomial and some correctly rounded operations, measured over all inputs",
        unit_roundoff=2.0**-24,
        source="kernels/math.cuh, suites/meta/test_math.py",
        ceiling=1e-4,  # subnormal results have fewer digits
    ),
    fuzz=fuzz,
    predict=predict,
    without={**ONE_STAGE, "exact-arithmetic": "no sum: a function of one number"},
    row_axis="M",
    row_inputs=("x",),
)
