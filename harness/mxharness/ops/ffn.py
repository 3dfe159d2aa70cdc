"""Feed-forward layers: y = D f(U x), y = D (silu(G x) * (U x)), y = s + FFN(norm(s)), with MXFP4 weights.

Every stage is judged from the kernels' own output of the stage before: projections as contractions, in predicted bits
too; activations and norms by the first-order effect of their roundings. The whole is judged from the inputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from hypothesis import strategies as st

from mxharness import functional, mxfp4, places, regimes, tensor_core
from mxharness import golden as reference
from mxharness.bounds import Bounded, apply, contraction, exact, gamma, rounded
from mxharness.device import Device
from mxharness.functional import ffn
from mxharness.op import Case, Expected, Op, Operand, Tensors, Tolerance
from mxharness.ops import activation_bits, activations, ffn_integers, swiglu
from mxharness.ops.gemm import linear, linear_bits
from mxharness.ops.norm import added, added_bits, norm
from mxharness.pattern import Places

DTYPES = ("bf16", "fp16")
SPREAD = 4.0
"""Activations are so much larger than a layer norm's, so that U x reaches where activations differ from each other."""
EPS = 1e-5
_GELU = {"gelu": activations.gelu, "gelu_tanh": activations.gelu_tanh}
_SHAPES = ((1, 32, 32), (3, 96, 160), (9, 64, 96), (66, 64, 64))
_RESIDUAL = (
    ("gelu", "rms"),
    ("gelu_tanh", "layer", "residual"),
    ("rms", "swiglu"),
    ("layer", "residual", "swiglu"),
)


def _cases(name: str) -> tuple[Case, ...]:
    choices = {"swiglu_ffn_forward": ((),), "ffn_residual": _RESIDUAL}.get(name, (("gelu",), ("gelu_tanh",)))
    return (
        *(
            Case(name, shape, regime, dtype, options=choices[(i + j) % len(choices)])
            for j, regime in enumerate(("normal", "outliers"))
            for dtype in DTYPES
            for i, shape in enumerate(_SHAPES)
        ),
        *(Case(name, (5, 64, 64), dtype=dtype, options=options) for dtype in DTYPES for options in choices),
        *(Case(name, (2, 64, 32), "nan", dtype, options=choices[-1]) for dtype in DTYPES),
        Case(name, (2048, 32, 32), options=choices[-1]),
        *(Case(name, (2, 64, 32), "wide", options=options) for options in choices if name == "ffn_forward"),
        *(
            Case(name, (19, 32, 32) if name == "ffn_residual" else (5, 64, 96), "integers", dtype, options=options)
            for options in choices
            for dtype in DTYPES
            if "layer" not in options or dtype == "fp16"  # else the whole function's bound proves nothing
        ),
    )


def make_inputs(case: Case) -> Tensors:
    """X (M, K), codes and scales of up and gate (I, K) and down (K, I), and what else the case's function takes."""
    M, K, I = case.shape  # noqa: E741  the intermediate size
    gated = case.op == "swiglu_ffn_forward" or "swiglu" in case.options
    if case.regime == "integers":
        found = ffn_integers.inputs(case, M, K, I, gated, case.op == "ffn_residual")
        return {**found, **ffn_integers.biases(case, K, I)} if case.op == "ffn_forward_bias" else found
    inputs = {"x": regimes.activations(case, (M, K)) * SPREAD}
    for name, shape in (("up", (I, K)), ("gate", (I, K)), ("down", (K, I))):
        if gated or name != "gate":
            inputs[f"{name}_codes"], inputs[f"{name}_scales"] = regimes.weights(case, shape, name)
    if case.op == "ffn_forward_bias":
        inputs |= {"up_bias": regimes.bias(case, I, "up_bias"), "down_bias": regimes.bias(case, K, "down_bias")}
    if case.op == "ffn_residual":
        inputs["norm_weight"] = _vector(case, "norm_weight", K, SPREAD / 2)
        if "layer" in case.options:
            inputs["norm_bias"] = _vector(case, "norm_bias", K, 0.0)
        if "residual" in case.options:
            inputs["residual"] = regimes.activations(case, (M, K), "residual")
    return inputs


def _vector(case: Case, name: str, K: int, mean: float) -> torch.Tensor:
    """Parameters of a norm (K) float32, around their mean, as those of models are."""
    return torch.from_numpy(regimes.generator(case, name).normal(mean, 0.3, K)).to(torch.float32)


def _activation(case: Case) -> str:
    return next((name for name in _GELU if name in case.options), "swiglu")


def _norm(case: Case) -> str:
    return "layer" if "layer" in case.options else "rms"


def _contractions(
    case: Case, tensors: Tensors
) -> dict[str, tuple[torch.Tensor, str, torch.Tensor | None, torch.dtype]]:
    """Every stage that is a projection: its input, its weight, its bias, its output's dtype."""
    x = tensors["normed" if case.op == "ffn_residual" else "x"]
    last = ("down", torch.float32) if case.op == "ffn_residual" else ("y", x.dtype)
    found = {
        "up": (x, "up", tensors.get("up_bias"), x.dtype),
        last[0]: (tensors["activated"], "down", tensors.get("down_bias"), last[1]),
    }
    if "gate_codes" in tensors:
        found["gate"] = (x, "gate", None, x.dtype)
    return found


def kept(tensors: Tensors) -> torch.Tensor:
    """What the layer's result is added to (M, K): the sum of x and the residual, or x."""
    return tensors.get("sum", tensors["x"])


def golden(case: Case, tensors: Tensors) -> Mapping[str, Expected]:
    """All stages: sum, normed, gate, up, activated, down, y, as far as the function has them."""
    stages = {
        name: linear(x, tensors[f"{weight}_codes"], tensors[f"{weight}_scales"], bias, dtype)
        for name, (x, weight, bias, dtype) in _contractions(case, tensors).items()
    }
    x, up = tensors["x"], tensors["up"]
    activation = _activation(case)
    if activation == "swiglu":
        stages["activated"] = activations.expected(activations.swiglu, x.dtype, tensors["gate"], up)
    else:
        stages["activated"] = activations.expected(_GELU[activation], x.dtype, up)
    if case.op == "ffn_residual":
        s = tensors.get("sum", x)
        if "residual" in tensors:
            stages["sum"] = added(x, tensors["residual"], x.dtype)
        stages["normed"] = norm(_norm(case), s, tensors["norm_weight"], tensors.get("norm_bias"), EPS)
        stages["y"] = added(kept(tensors), tensors["down"], x.dtype)
    return stages


def predict(case: Case, tensors: Tensors) -> Tensors:
    """Every stage, in bits."""
    found = {
        name: linear_bits(x, tensors[f"{weight}_codes"], tensors[f"{weight}_scales"], bias, dtype)
        for name, (x, weight, bias, dtype) in _contractions(case, tensors).items()
    }
    x, activation = tensors["x"], _activation(case)
    branches = [tensors[name] for name in ("gate", "up") if name in tensors]
    found["activated"] = activation_bits.activated(getattr(activation_bits, activation), x.dtype, *branches)
    if case.op == "ffn_residual":
        s, bias = tensors.get("sum", x), tensors.get("norm_bias")
        if "residual" in tensors:
            found["sum"] = added_bits(x, tensors["residual"], x.dtype)
        found["normed"] = activation_bits.normed(_norm(case), s, tensors["norm_weight"], bias, EPS)
        found["y"] = added_bits(kept(tensors), tensors["down"], x.dtype)
    return found


def composed(case: Case, inputs: Tensors) -> Mapping[str, Expected]:
    """Y (M, K) from the inputs alone, the formula in float64 with every rounding carried along."""
    dtype = inputs["x"].dtype
    stream = exact(inputs["x"])
    if "residual" in inputs:
        stream = rounded(apply(torch.add, stream, exact(inputs["residual"])), dtype)
    x = rounded(_normed(case, stream, inputs), dtype) if case.op == "ffn_residual" else stream
    up = rounded(_projected(x, "up", inputs, inputs.get("up_bias")), dtype)
    if _activation(case) == "swiglu":
        gate = rounded(_projected(x, "gate", inputs, None), dtype)
        hidden = activations.carried(activations.swiglu, gate, up)
    else:
        hidden = activations.carried(_GELU[_activation(case)], up)
    y = _projected(rounded(hidden, dtype), "down", inputs, inputs.get("down_bias"))
    if case.op == "ffn_residual":
        y = Bounded(stream.value + y.value, stream.error + y.error)
    magnitude = y.value.abs() + y.error
    return {"y": Expected(y.value, magnitude, 1, dtype, y.error)}


def _projected(x: Bounded, weight: str, inputs: Tensors, bias: torch.Tensor | None) -> Bounded:
    w = reference.decode(mxfp4.unpack(inputs[f"{weight}_codes"]), inputs[f"{weight}_scales"])
    K = w.shape[1]
    chunk = tensor_core.CHUNK[functional.ACTIVATIONS[inputs["x"].dtype]]
    y = contraction(x, w, min(chunk, K) + -(-K // chunk))
    if bias is None:
        return y
    value = y.value + bias.double()
    return Bounded(value, y.error + gamma(1) * (value.abs() + y.error))


def _normed(case: Case, s: Bounded, inputs: Tensors) -> Bounded:
    """The norm of uncertain s: what its own roundings do, and what the error of s does, which the root may divide by.

    With r the root of the mean square of s (less its mean), the error e moves an element by |e| / r, the mean by
    mean |e| and r, relatively, by no more than rms(e) / r; a second time, that much smaller, for what is not linear.
    """
    weight, bias = inputs["norm_weight"].double(), inputs.get("norm_bias")
    own = norm(_norm(case), s.value, weight, bias, EPS)
    layer = _norm(case) == "layer"
    distance = s.value - s.value.mean(1, keepdim=True) if layer else s.value
    inverse = (distance.square().mean(1, keepdim=True) + EPS).rsqrt()
    shift = s.error.mean(1, keepdim=True) if layer else torch.zeros_like(inverse)
    relative = s.error.square().mean(1, keepdim=True).sqrt() * inverse
    moved = (weight * inverse).abs() * (s.error + shift + distance.abs() * relative) / (1 - relative)
    assert own.magnitude is not None  # noqa: S101  norm() bounds
    slack = torch.zeros_like(moved) if own.slack is None else own.slack
    return Bounded(own.value, gamma(own.chain) * own.magnitude + slack + moved)


def launch(device: Device, case: Case, inputs: Tensors) -> Tensors:
    """The function of the case's name with all its stages."""
    weights = {
        name: mxfp4.Quantized(inputs[f"{name}_codes"], inputs[f"{name}_scales"])
        for name in ("up", "gate", "down")
        if f"{name}_codes" in inputs
    }
    x, up, down, gate = inputs["x"], weights["up"], weights["down"], weights.get("gate")
    if case.op == "ffn_residual":
        return ffn.residual_stages(
            x, up, down, inputs["norm_weight"], gate, inputs.get("residual"), _norm(case), inputs.get("norm_bias"),
            EPS, _activation(case), device,
        )  # fmt: skip
    if gate is not None:
        return ffn.swiglu_stages(x, gate, up, down, device)
    biases = inputs.get("up_bias"), inputs.get("down_bias")
    return ffn.forward_stages(x, up, down, *biases, _activation(case), device)


def where(case: Case, tensors: Tensors) -> Mapping[str, Places]:
    """Row and feature of every stage."""
    stages = ("sum", "normed", "gate", "up", "activated", "down", "y")
    return {name: places.product(tensors[name], "row") for name in stages if name in tensors}


def operands(case: Case) -> Mapping[str, Operand]:
    """The weight of every projection: the rows of the second are the kernels' own."""
    last = "down" if case.op == "ffn_residual" else "y"
    return {"up": Operand("up_codes"), "gate": Operand("gate_codes"), last: Operand("down_codes")}


def fuzz(name: str) -> st.SearchStrategy[Case]:
    """Any number of rows, any sizes, every activation and norm."""
    choices = sorted({case.options for case in _cases(name)})
    return st.builds(
        lambda M, K, width, regime, dtype, options, seed: Case(
            name, (M, 32 * K, 32 * width), regime, dtype, seed=seed, options=options
        ),
        st.integers(1, 20),
        st.integers(1, 3),
        st.integers(1, 4),
        st.sampled_from(("normal", "outliers", "nan")),
        st.sampled_from(DTYPES),
        st.sampled_from(choices),
        st.integers(0, 10_000),
    )


TOLERANCE = Tolerance(
    why="contractions on a tensor core; activations and norms in float32; each stage rounded once",
    unit_roundoff=2.0**-24,
    source="gamma_n, and the first-order effect of roundings (ops/activations.py)",
    ceiling=0.02,
    composed_ceiling=0.3,  # bfloat16 between a norm and three projections of up to 160 terms
)


def _op(name: str) -> Op:
    draw: Callable[[], st.SearchStrategy[Case]] = partial(fuzz, name)
    return Op(
        name=name,
        source="ffn.cu",
        axes="M K I",
        cases=_cases(name),
        make_inputs=make_inputs,
        golden=golden,
        launch=launch,
        tolerance=TOLERANCE,
        fuzz=draw,
        predict=predict,
        composed=composed,
        places=where,
        operands=operands,
        row_axis="M",
        row_inputs=("x", "residual"),
    )


OPS = (
    _op("ffn_forward"),
    _op("ffn_forward_bias"),
    _op("swiglu_ffn_forward"),
    _op("ffn_residual"),
    swiglu.OP,
)
