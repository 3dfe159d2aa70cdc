"""LM head: logits = x W^T, W (V, K) in MXFP4, over a temperature, filtered by top-k and top-p; ids and probabilities.

Every stage is an output and is judged from the one before: logits by bits, the quotient and the filters exactly, the
last token of a nucleus and a sample by what their masses permit (ops/sampling.py), probabilities by their bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from hypothesis import strategies as st

from mxharness import functional, mxfp4, places, regimes
from mxharness import golden as reference
from mxharness.bounds import gamma
from mxharness.device import Device
from mxharness.functional import lm_head
from mxharness.op import ONE_STAGE, Case, Expected, Op, Operand, Tensors, Tolerance
from mxharness.ops import gemm, lm_head_cases, sampling


def settings(case: Case) -> tuple[float, int, float]:
    """Temperature, k and p; 1, 0 and 1 where the case names none."""
    return float(case.option("t") or 1), int(case.option("k") or 0), float(case.option("p") or 1)


def golden(case: Case, tensors: Tensors) -> Mapping[str, Expected]:
    """Every stage, from the kernel's own outcome of the one before."""
    temperature, k, p = settings(case)
    z = tensors["logits"]
    expected = {"logits": gemm.linear(tensors["x"], tensors["codes"], tensors["scales"], None, torch.float32)}
    if "tied" in case.options:
        rows = reference.decode(mxfp4.unpack(tensors["codes"]), tensors["scales"])[tensors["ids"]]
        expected["x"] = Expected(rows.to(torch.float32).to(regimes.DTYPES[case.dtype]))
    if temperature == 0:
        return expected | {"ids": sampling.greedy(z)}
    if temperature != 1:
        # float32 over float32: float64 rounds far enough away that rounding again is rounding once.
        expected["scaled"] = Expected((z.double() / np.float32(temperature).item()).to(torch.float32))
        z = tensors["scaled"]
    if k:
        expected["top_k_last"] = sampling.top_k(z, k)
        expected["top_k"] = Expected(sampling.filtered(z, tensors["top_k_last"]))
        z = tensors["top_k"]
    if p < 1:
        expected["top_p_last"] = sampling.top_p(z, p)
        expected["top_p"] = Expected(sampling.filtered(z, tensors["top_p_last"]))
        z = tensors["top_p"]
    match case.op:
        case "lm_head_greedy":
            expected["ids"] = sampling.greedy(z)
        case "lm_head_probabilities":
            expected["p"] = sampling.probabilities(z)
        case "lm_head_sample":
            expected["ids"] = sampling.sample(z, tensors["uniforms"])
    return expected


def predict(case: Case, tensors: Tensors) -> Tensors:
    """The logits in bits."""
    bits = gemm.linear_bits(tensors["x"], tensors["codes"], tensors["scales"], None, torch.float32)
    return {"logits": bits}


def composed(case: Case, inputs: Tensors) -> Mapping[str, Expected]:
    """The function's outcome from x and W: each logit an interval, and what may be chosen with logits within it."""
    temperature, k, p = settings(case)
    linear = gemm.linear(inputs["x"], inputs["codes"], inputs["scales"], None, torch.float32)
    assert linear.magnitude is not None  # noqa: S101  a contraction has one
    value, error = linear.value, (gamma(linear.chain) * linear.magnitude).nan_to_num(0.0, posinf=0.0)
    if temperature not in (0, 1):
        value, error = value / np.float32(temperature).item(), error / np.float32(temperature).item()
        error = error + 2.0**-24 * (value.abs().nan_to_num(0.0, posinf=0.0) + error) + 2.0**-149
    tokens, z, name, right = sampling.outcome(value, error), value, "", torch.zeros(0)
    ordered, weighed = ~value.isnan().any(-1), sampling.has_softmax(value)
    if temperature == 0 or case.op == "lm_head_greedy":
        _, right = sampling.possible_top_k(tokens, 1)
        return {"ids": sampling.decided(sampling.greedy(z).value, right, ordered)}
    if k:
        tokens, right = sampling.possible_top_k(tokens, k)
        name, choice, exists = "top_k_last", sampling.top_k(z, k).value, ordered
        z = sampling.filtered(z, choice)
    if p < 1:
        tokens, right = sampling.possible_top_p(tokens, p)
        name, choice, exists = "top_p_last", sampling.top_p(z, p).value, weighed
        z = sampling.filtered(z, choice)
    match case.op:
        case "lm_head_sample":
            right = sampling.possible_sample(tokens, inputs["uniforms"])
            choice = sampling.sample(z, inputs["uniforms"]).value
            return {"ids": sampling.decided(choice, right, weighed & sampling.inside(inputs["uniforms"]))}
        case "lm_head_probabilities":
            return {"p": _near(sampling.probabilities(z).value, sampling.possible_probabilities(value, error))}
    if name:
        return {name: sampling.decided(choice, right, exists)}
    return {"logits" if temperature == 1 else "scaled": _near(value, error)}


def _near(value: torch.Tensor, slack: torch.Tensor) -> Expected:
    """No rounding but those that the slack holds already."""
    return Expected(value, torch.zeros_like(value), 0, torch.float32, slack)


def launch(device: Device, case: Case, inputs: Tensors) -> Tensors:
    """The stages of the function of the case's name; for a tied table those of its own rows."""
    weight = mxfp4.Quantized(inputs["codes"], inputs["scales"])
    t, k, p = settings(case)
    if "tied" in case.options:
        x = functional.embedding_lookup(inputs["ids"], weight, dtype=regimes.DTYPES[case.dtype], device=device)
        return {"x": x, "logits": functional.lm_head_forward(x, weight, device=device)}
    x = inputs["x"]
    match case.op:
        case "lm_head_greedy":
            return lm_head.greedy_stages(x, weight, device=device)
        case "lm_head_probabilities":
            return lm_head.probability_stages(x, weight, temperature=t, device=device)
        case "lm_head_sample":
            uniforms = inputs["uniforms"]
            return lm_head.sample_stages(
                x,
                weight,
                uniforms,
                temperature=t,
                top_k=k,
                top_p=p,
                validate="outside" not in case.options,
                device=device,
            )
    return lm_head.logit_stages(x, weight, temperature=t, top_k=k, top_p=p, device=device)


def fuzz(name: str) -> st.SearchStrategy[Case]:
    """Any vocabulary; temperature, k and p as far as the function takes them; probabilities that do not vanish."""

    def build(M: int, V: int, blocks: int, regime: str, dtype: str, seed: int, drawn: dict[str, str]) -> Case:
        taken = {"topk": "kt", "topp": "pt", "sample": "kpt", "temperature": "t", "probabilities": "t"}
        letters = taken.get(name.rpartition("_")[2], "")
        options = tuple((drawn | {"k": f"k={1 + seed % V}"})[letter] for letter in letters)
        return Case(name, (M, V, 32 * blocks), regime=regime, dtype=dtype, seed=seed, options=options)

    return st.builds(
        build,
        st.integers(1, 5),
        st.integers(1, 300),
        st.integers(1, 3),
        st.sampled_from(("normal",) if name == "lm_head_probabilities" else lm_head_cases.REGIMES),
        st.sampled_from(("bf16", "fp16")),
        st.integers(0, 10_000),
        st.fixed_dictionaries(
            {
                "t": st.sampled_from(("t=1", "t=0.05", "t=0.7", "t=4")),
                "p": st.sampled_from(("p=1", "p=0.001", "p=0.3", "p=0.95", "p=0.9999")),
            }
        ),
    )


TOLERANCE = Tolerance(
    why="logits summed on a tensor core; tokens weighed by exp32 of rounded differences, cut off at 2^-40",
    unit_roundoff=2.0**-24,
    source="gamma_n with n = chunk + number of chunks (docs/tensor_core.md); ops/sampling.py",
    ceiling=0.1,
    composed_ceiling=0.1,
)


def _op(name: str, cases: tuple[Case, ...]) -> Op:
    return Op(
        name=name,
        source="lm_head.cu",
        axes="M V K",
        cases=cases,
        make_inputs=lm_head_cases.make_inputs,
        golden=golden,
        launch=launch,
        tolerance=replace(TOLERANCE, composed_ceiling=0.0) if name == "lm_head_forward" else TOLERANCE,
        fuzz=partial(fuzz, name),
        predict=predict,
        places=lambda case, tensors: places.vocabulary(tensors, case.shape[1]),
        operands=lambda case: {"logits": Operand("codes" if "tied" in case.options else "x")},
        composed=None if name == "lm_head_forward" else composed,
        without=ONE_STAGE if name == "lm_head_forward" else {},
        row_axis="M",
        row_inputs=("x", "ids", "uniforms"),
    )


OPS = (
    _op("lm_head_forward", lm_head_cases.FORWARD),
    _op("lm_head_forward_temperature", lm_head_cases.TEMPERATURE),
    _op("lm_head_forward_topk", lm_head_cases.TOP_K),
    _op("lm_head_forward_topp", lm_head_cases.TOP_P),
    _op("lm_head_greedy", lm_head_cases.GREEDY),
    _op("lm_head_probabilities", lm_head_cases.PROBABILITIES),
    _op("lm_head_sample", lm_head_cases.SAMPLE),
)
