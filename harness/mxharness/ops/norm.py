"""Norms of rows s = x + residual: y = s / rms(s) w, or y = (s - mean(s)) / std(s) w + b.

Two stages where there is a residual: the sum, rounded once, and the norm of the sum that the kernel made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from hypothesis import strategies as st

from mxharness import regimes
from mxharness.bounds import UNIT_ROUNDOFF, gamma, quantum
from mxharness.device import Device
from mxharness.functional.norm import normalise, threads
from mxharness.op import Case, Expected, Op, Tensors, Tolerance
from mxharness.ops import activation_bits

REGIMES = ("normal", "wide", "outliers", "offset", "small")
"""offset: the mean is a hundred times the deviation; small: eps is most of the mean square."""
EPS = {"normal": 1e-5, "small": 1e-2}
DTYPES = ("bf16", "fp16")

_SHAPES = ((1, 1), (3, 33), (5, 257), (2, 2880))


def _cases(name: str) -> tuple[Case, ...]:
    options = [("residual",), ("narrow", "residual"), ("narrow",), ()]
    return (
        *(
            Case(name, shape, regime, dtype, options=options[(i + j) % 4])
            for i, shape in enumerate(_SHAPES)
            for j, regime in enumerate(REGIMES)
            for dtype in DTYPES
        ),
        Case(name, (2048, 40), "offset", options=("residual",)),
        *(Case(name, (4, 513), dtype=dtype, options=("plain", "residual")) for dtype in DTYPES),  # no bias
        *(Case(name, (6, 70), "integers", dtype, options=("residual",)) for dtype in DTYPES),  # of the sum alone
        Case(name, (1, 2049), dtype="fp16"),  # a length that half does not hold
    )


def make_inputs(case: Case) -> Tensors:
    """X (M, K), residual (M, K) if the case has one, weight and bias (K) float32, or x's dtype if it is "narrow"."""
    M, K = case.shape
    names = ("x", "residual") if "residual" in case.options else ("x",)
    inputs = {name: _rows(case, (M, K), name) for name in names}
    vectors = {name: torch.from_numpy(regimes.generator(case, name).normal(size=K)) for name in ("weight", "bias")}
    if case.op == "rms_norm" or "plain" in case.options:
        del vectors["bias"]
    dtype = inputs["x"].dtype if "narrow" in case.options else torch.float32
    return inputs | {name: vector.to(torch.float32).to(dtype) for name, vector in vectors.items()}


def _rows(case: Case, shape: tuple[int, int], name: str) -> torch.Tensor:
    if case.regime in ("offset", "small"):
        mean, deviation = {"offset": (1000.0, 10.0), "small": (0.0, 0.03)}[case.regime]
        x = regimes.generator(case, name).normal(mean, deviation, shape)
        return torch.from_numpy(x).to(torch.float32).to(regimes.DTYPES[case.dtype])
    return regimes.activations(case, shape, name)


def eps_of(case: Case) -> float:
    """Of the case's regime."""
    return EPS.get(case.regime, EPS["normal"])


def golden(case: Case, tensors: Tensors) -> Mapping[str, Expected]:
    """Sum (M, K), where there is a residual, and y (M, K)."""
    x, residual, weight, bias = (tensors.get(name) for name in ("x", "residual", "weight", "bias"))
    assert x is not None  # noqa: S101  make_inputs gave them
    assert weight is not None  # noqa: S101
    if residual is None:
        return {"y": norm(case.op.removesuffix("_norm"), x, weight, bias, eps_of(case))}
    return {
        "sum": added(x, residual, x.dtype),
        "y": norm(case.op.removesuffix("_norm"), tensors["sum"], weight, bias, eps_of(case)),
    }


def predict(case: Case, tensors: Tensors) -> Tensors:
    """As golden, in bits."""
    s, kind = tensors.get("sum", tensors["x"]), case.op.removesuffix("_norm")
    found = {"y": activation_bits.normed(kind, s, tensors["weight"], tensors.get("bias"), eps_of(case))}
    return (
        found if "residual" not in tensors else {**found, "sum": added_bits(tensors["x"], tensors["residual"], s.dtype)}
    )


def added_bits(x: torch.Tensor, residual: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As added, in bits."""
    return (x.float() + residual.float()).to(dtype)


def added(x: torch.Tensor, residual: torch.Tensor, dtype: torch.dtype) -> Expected:
    """X + residual: one float32 addition, then the rounding to `dtype`."""
    value = x.double() + residual.double()
    step = torch.minimum(*(quantum(term.unsqueeze(-1)) for term in (x, residual)))
    return Expected(value, value.abs(), 1, dtype, quantum=step)


def norm(kind: str, s: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> Expected:
    """Y (M, K) of s (M, K) bf16 or fp16; kind is "rms" or "layer".

    A path through a row's sum over B threads has at most K - 1 additions that can round, and no more than its length:
    ceil(K / B) - 1 in a thread, 5 in a warp, B / 32 - 1 between warps. The division by K rounds unless K is a power of
    two. All squares are positive, so the mean square is right to these n roundings, three of the square's own and one
    of eps, and its inverse root to half of that and 2. The mean is not: it may be off by gamma_n of mean |s|, which
    moves every s - mean alike, and the variance by its square.
    """
    wide, w, K = s.double(), weight.double(), s.shape[1]
    path = -(-K // threads(K)) - 1 + 5 + threads(K) // 32 - 1
    chain = min(K - 1, path) + (K & (K - 1) != 0)
    centre = wide.mean(1, keepdim=True) if kind == "layer" else torch.zeros_like(wide[:, :1])
    distance = wide - centre
    inverse = (distance.square().mean(1, keepdim=True) + float(np.float32(eps))).rsqrt()
    scaled = distance * inverse * w
    roundings = -(-(chain + 4) // 2) + 2
    if kind == "rms":
        return Expected(scaled, scaled.abs(), roundings + 2, s.dtype)
    off = gamma(chain) * wide.abs().mean(1, keepdim=True)
    slack = off * (inverse * w).abs() + (off * inverse).square() / 2 * scaled.abs()
    b = torch.zeros_like(w) if bias is None else bias.double()
    return Expected(scaled + b, scaled.abs() + b.abs(), roundings + 4, s.dtype, slack)


def launch(device: Device, case: Case, inputs: Tensors) -> Tensors:
    """The function of the case's name with its intermediate sum."""
    kind, bias, residual = case.op.removesuffix("_norm"), inputs.get("bias"), inputs.get("residual")
    return normalise(kind, inputs["x"], inputs["weight"], bias, eps_of(case), residual, device)


def fuzz(name: str) -> st.SearchStrategy[Case]:
    """Any rows and columns around the edges of warps and blocks."""
    return st.builds(
        lambda M, K, regime, dtype, options, seed: Case(name, (M, K), regime, dtype, seed=seed, options=options),
        st.integers(1, 9),
        st.integers(8, 600),
        st.sampled_from(REGIMES),
        st.sampled_from(DTYPES),
        st.sampled_from(((), ("residual",), ("narrow",), ("narrow", "residual"))),
        st.integers(0, 10_000),
    )


def _op(name: str) -> Op:
    draw: Callable[[], st.SearchStrategy[Case]] = partial(fuzz, name)
    return Op(
        name=name,
        source="norm.cu",
        axes="M K",
        cases=_cases(name),
        make_inputs=make_inputs,
        golden=golden,
        launch=launch,
        tolerance=Tolerance(
            why="float32 statistics over a row, then one rounding",
            unit_roundoff=UNIT_ROUNDOFF[torch.float32],
            source="gamma_n of a sum of positive terms; Higham, 2nd ed., sections 1.9 and 3.1",
            ceiling=0.01,
        ),
        fuzz=draw,
        predict=predict,
        without={"composed": "the rounding of x + residual may be as large as what is left without the mean"},
        row_axis="M",
        row_inputs=("x", "residual"),
    )


OPS = (_op("rms_norm"), _op("layer_norm"))
