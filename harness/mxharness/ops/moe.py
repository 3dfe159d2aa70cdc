"""Mixture of experts of gpt-oss: a router, the k largest logits, a softmax over these alone, experts, a weighted sum.

logits = x R^T + r; y = sum over the chosen e of weight_e (D_e h_e + d_e), h_e = swiglu(G_e x + g_e), gate and up
interleaved. moe_forward returns every stage, and each is judged given the actual one before it (moe_reference.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from hypothesis import strategies as st

from mxharness import mxfp4, places, regimes
from mxharness.device import Device
from mxharness.functional.moe import moe_router, moe_stages
from mxharness.op import Case, Op, Operand, Tensors, Tolerance
from mxharness.ops.moe_reference import activation, chosen, composed, golden, predict
from mxharness.pattern import Places, along

ROUTER = (
    *(
        Case("moe_router", shape, regime=regime, dtype=dtype, options=options)
        for shape, regime, options in (
            ((5, 32, 64), "normal", ("k=4",)),
            ((70, 128, 96), "normal", ("k=4",)),
            ((33, 5, 32), "positive", ("k=5",)),
            ((9, 100, 160), "wide", ("k=8",)),
            ((40, 37, 64), "normal", ("k=6", "ties")),
            ((6, 12, 32), "normal", ("k=3", "nan")),
            ((6, 12, 32), "normal", ("k=3", "nan_expert")),
            ((6, 13, 32), "normal", ("infinite", "k=8")),
            ((7, 9, 64), "outliers", ("crowded", "k=4")),
        )
        for dtype in ("bf16", "fp16")
    ),
    *(Case("moe_router", (7, 40, 96), "integers", dtype, options=("k=4",)) for dtype in ("bf16", "fp16")),
    Case("moe_router", (1, 1, 32), options=("k=1",)),
    Case("moe_router", (4, 256, 2880), regime="outliers", options=("k=4",)),
    Case("moe_router", (2048, 9, 32), options=("k=2",)),
)
FORWARD = (
    *(
        Case("moe_forward", shape, regime=regime, dtype=dtype, options=options)
        for shape, regime, options in (
            ((1, 32, 64, 32), "normal", ("k=4",)),
            ((5, 128, 64, 32), "normal", ("k=4",)),
            ((70, 32, 32, 64), "normal", ("k=4",)),
            ((70, 6, 96, 32), "outliers", ("crowded", "k=3")),
            ((2, 4, 64, 160), "positive", ("k=4",)),
            ((40, 4, 32, 1024), "positive", ("k=4",)),  # features for the kernels of many blocks
        )
        for dtype in ("bf16", "fp16")
    ),
    *(
        Case("moe_forward", (9, 5, 64, 96), "integers", dtype, options=("alpha=256.0", "k=3"))
        for dtype in ("bf16", "fp16")
    ),
    Case("moe_forward", (40, 7, 32, 32), options=("alpha=1.0", "k=2", "limit=2.5")),
    Case("moe_forward", (6, 5, 64, 32), regime="codes", options=("k=2",)),
    Case("moe_forward", (12, 5, 32, 64), options=("k=2", "nan")),
    Case("moe_forward", (2, 3, 2880, 32), options=("k=2",)),
    Case("moe_forward", (2, 3, 32, 2880), dtype="fp16", options=("k=2",)),
    Case("moe_forward", (2048, 3, 32, 32), options=("k=1",)),
)


def make_inputs(case: Case) -> Tensors:
    """X (T, H), the router's weight (E, H) and bias (E), and for moe_forward both weights and biases of the experts.

    The router's weight is scaled to logits of about 2, so that softmax weights are neither equal nor 0 and 1. Options:
    "ties" gives the experts in pairs the same row, "crowded" sends every token to the last k experts, "infinite" bars
    every second expert by a bias of -Inf, "nan" makes the second token NaN, and one feature of one expert's down,
    "nan_expert" one expert's logits.
    """
    T, E, H, *width = case.shape
    if case.regime == "integers":
        return _integer_inputs(case, T, E, H, *width)
    x = regimes.activations(case, (T, H))
    rng = regimes.generator(case, "router")
    w = torch.from_numpy(rng.standard_normal((E, H))) * (2 / (x.double().square().mean() * H).sqrt())
    bias = torch.from_numpy(rng.standard_normal(E)).to(torch.float32)
    if "ties" in case.options:
        half = E // 2
        w[half : 2 * half], bias[half : 2 * half] = w[:half].clone(), bias[:half].clone()
    if "crowded" in case.options:
        bias[E - chosen(case) :] += 200  # past the range of e^x
    if "infinite" in case.options:
        bias[::2] = -torch.inf
    if "nan_expert" in case.options:
        bias[E - 2] = torch.nan
    if "nan" in case.options:
        x[1, H // 2] = torch.nan
    routing = {"x": x, "router_weight": w.to(torch.float32).to(x.dtype), "router_bias": bias}
    if case.op == "moe_router":
        return routing
    (width_of_expert,) = width
    for name, N, K, spread in (("gate_up", 2 * width_of_expert, H, 4), ("down", H, width_of_expert, 1)):
        codes, scales = regimes.weights(case, (E * N, K), name)
        routing[f"{name}_codes"], routing[f"{name}_scales"] = codes.view(E, N, -1), scales.view(E, N, -1)
        # gate_up's bias is wide, so that both sides of the limit and the clipping of either branch are met
        drawn = regimes.generator(case, f"{name}_bias").standard_normal((E, N)) * spread
        routing[f"{name}_bias"] = torch.from_numpy(drawn).to(torch.float32)
    if "nan" in case.options:
        routing["down_scales"][E - 1, 3, 0] = mxfp4.SCALE_NAN
    return routing


def _integer_inputs(case: Case, T: int, E: int, H: int, width: int = 0) -> Tensors:
    """As make_inputs, but every product is a sum of integers, and no two logits of a token are equal.

    gate_up's results are multiples of 4: with an alpha of 256 the sigmoid is 1 or 0 but where the gate is 0, and h an
    integer.
    """
    rng = regimes.generator(case, "router")
    x, w = regimes.activations(case, (T, H)), regimes.activations(case, (E, H), "router_weight")
    unit = 2.0 ** round(math.log2(x.double().square().mean() * math.sqrt(H) / 2))  # a logit's deviation becomes about 2
    found = {
        "x": x,
        "router_weight": w / unit,
        "router_bias": torch.from_numpy((rng.permutation(E) - E // 2) / (256 * unit)).to(torch.float32),
    }
    for name, N, K, shift in (("gate_up", 2 * width, H, 3), ("down", H, width, 0)) if width else ():
        codes, scales = regimes.integer_weights(case, (E * N, K), name, 2, shift)
        found[f"{name}_codes"], found[f"{name}_scales"] = codes.view(E, N, -1), scales.view(E, N, -1)
        found[f"{name}_bias"] = regimes.bias(case, E * N, f"{name}_bias").view(E, N) * 2.0**shift / 2
    return found


def launch(device: Device, case: Case, inputs: Tensors) -> Tensors:
    """The function of the case's name, with all its stages.

    gate_up, which moe_forward need not write, is that of moe_stages; what comes after it is what moe_forward makes.
    """
    x, w, bias, k = inputs["x"], inputs["router_weight"], inputs["router_bias"], chosen(case)
    if case.op == "moe_router":
        return dict(zip(("logits", "ids", "weights"), moe_router(x, w, bias, k, device=device), strict=True))
    gate_up, down = (mxfp4.Quantized(inputs[f"{name}_codes"], inputs[f"{name}_scales"]) for name in ("gate_up", "down"))
    alpha, limit = activation(case)
    run = partial(
        moe_stages, x, w, bias, gate_up, inputs["gate_up_bias"], down, inputs["down_bias"], k=k, alpha=alpha,
        limit=limit, device=device,
    )  # fmt: skip
    made = run(fused=True)
    return {"gate_up": made["gate_up"] if "gate_up" in made else run(fused=False)["gate_up"], **made}


def where(case: Case, tensors: Tensors) -> Mapping[str, Places]:
    """Token, slot, expert, feature."""
    ids, routed = tensors["ids"], {}
    expert = torch.where((ids >= 0) & (ids < case.shape[1]), ids, -1)
    for name in ("gate_up", "h", "down"):
        if name in tensors:
            routed[name] = {**along(tensors[name].shape, "token", "slot", "feature"), "expert": expert.unsqueeze(-1)}
    chosen_ones = {**along(ids.shape, "token", "slot"), "expert": expert}
    found = {"logits": along(tensors["logits"].shape, "token", "expert"), "ids": chosen_ones, "weights": chosen_ones}
    return {**found, **routed, **({"y": places.product(tensors["y"], "token")} if "y" in tensors else {})}


def operands(case: Case) -> Mapping[str, Operand]:
    """The router's rows; the experts' weights, as each row meets its own."""
    return {"logits": Operand("x"), "gate_up": Operand("gate_up_codes"), "down": Operand("down_codes")}


def fuzz(name: str) -> st.SearchStrategy[Case]:
    """Any number of experts and k, tokens on both sides of the switch between kernels, every option."""

    def build(T: int, E: int, blocks: int, width: int, k: int, regime: str, dtype: str, option: str, seed: int) -> Case:
        shape = (T + 1, E, 32 * blocks) if name == "moe_router" else (1 + T // 4, 1 + E // 4, 32 * blocks, 32 * width)
        options = tuple(sorted((f"k={min(k, shape[1])}", *((option,) if option else ()))))
        if option == "nan" and shape[0] == 1:
            options = options[:1]
        return Case(name, shape, regime=regime, dtype=dtype, seed=seed, options=options)

    return st.builds(
        build,
        st.integers(0, 40),
        st.integers(1, 70),
        st.integers(1, 3),
        st.integers(1, 2),
        st.integers(1, 8),
        st.sampled_from(("normal", "positive", "outliers")),
        st.sampled_from(("bf16", "fp16")),
        st.sampled_from(("", "ties", "crowded", "nan", "infinite") if name == "moe_router" else ("", "crowded", "nan")),
        st.integers(0, 10_000),
    )


TOLERANCE = Tolerance(
    why="products summed on a tensor core, float32 elsewhere; intermediate results kept in x's dtype",
    unit_roundoff=2.0**-24,
    source="gamma_n a stage (docs/judging.md), running error analysis for the whole (bounds.py)",
    ceiling=0.1,
    composed_ceiling=0.2,
)


def _op(name: str, axes: str, cases: tuple[Case, ...]) -> Op:
    return Op(
        name=name,
        source="moe.cu",
        axes=axes,
        cases=cases,
        make_inputs=make_inputs,
        golden=golden,
        launch=launch,
        tolerance=TOLERANCE,
        fuzz=partial(fuzz, name),
        predict=predict,
        composed=composed,
        places=where,
        operands=operands,
        row_axis="T",
        row_inputs=("x",),
    )


OPS = (_op("moe_router", "T E H", ROUTER), _op("moe_forward", "T E H I", FORWARD))
