"""Faults of feed-forward layers: activations, the order of gate and up, residuals."""

from __future__ import annotations

from mxharness.faults.planted.fault import Fault, FunctionChange, KernelChange

_ACTIVATION = "activation.cuh"
_GPT_OSS = (
    (
        "swiglu-limit-on-one-side",
        "up is held below the limit only",
        "at_least(at_most(up, limit), -limit)",
        "at_most(up, limit)",
    ),
    ("swiglu-gate-unlimited", "the gate has no limit", "g = at_most(gate, limit)", "g = gate"),
    (
        "swiglu-gate-limited-below",
        "the gate is held from below too",
        "at_most(gate, limit)",
        "at_least(at_most(gate, limit), -limit)",
    ),
    ("swiglu-alpha-one", "the sigmoid's alpha is 1, not 1.702", "sigmoid(__fmul_rn(alpha, g))", "sigmoid(g)"),
    ("swiglu-plus-one-dropped", "up instead of up + 1", "__fmul_rn(__fadd_rn(u, 1.0f), glu)", "__fmul_rn(u, glu)"),
    ("swiglu-limit-hides-nan", "a NaN becomes the limit", "x > limit ? limit : x", "x < limit ? x : limit"),
)
_PLACES = {
    "swiglu-limit-on-one-side": "where up is below -limit",
    "swiglu-gate-unlimited": "where the gate is above the limit",
    "swiglu-gate-limited-below": "where the gate is below -limit",
    "swiglu-limit-hides-nan": "where gate or up is NaN",
}

FAULTS: tuple[Fault, ...] = (
    *(
        Fault(
            name=name,
            seen_in="generic: the activation of gpt-oss",
            symptom=symptom,
            change=KernelChange(_ACTIVATION, old, new),
            op="swiglu",
            detector="bound",
            pattern=_PLACES.get(name, ""),
        )
        for name, symptom, old, new in _GPT_OSS
    ),
    Fault(
        name="gate-and-up-not-alternating",
        seen_in="sglang PR 26884",
        symptom="fluent nonsense: interleaved gate and up are read as two halves, and halves as interleaved",
        change=KernelChange("ffn.cu", "    if (interleaved) {", "    if (!interleaved) {"),
        op="swiglu",
        detector="bound",
    ),
    Fault(
        name="gate-and-up-swapped-interleaved",
        seen_in="vllm PR 44893",
        symptom="up is taken first",
        change=KernelChange(
            "ffn.cu",
            "gate[i] = widen(both.of[2 * i]), up[i] = widen(both.of[2 * i + 1]);",
            "up[i] = widen(both.of[2 * i]), gate[i] = widen(both.of[2 * i + 1]);",
        ),
        op="swiglu",
        detector="bound",
    ),
    Fault(
        name="gate-and-up-swapped",
        seen_in="vllm PR 44893",
        symptom="silu is taken of up, not of gate",
        change=KernelChange("ffn.cu", "swiglu(widen(gate[i]), widen(up[i]))", "swiglu(widen(up[i]), widen(gate[i]))"),
        op="swiglu_ffn_forward",
        detector="bound",
    ),
    Fault(
        name="gelu-forms-exchanged",
        seen_in="generic",
        symptom="small errors everywhere: the tanh form where erf is asked for, and the other way round",
        change=KernelChange("ffn.cu", "kind == 0 ? gelu", "kind == 1 ? gelu"),
        op="ffn_forward",
        detector="bound",
    ),
    Fault(
        name="up-bias-dropped",
        seen_in="generic",
        symptom="the hidden layer has no bias",
        change=FunctionChange(
            "mxharness.functional.ffn",
            "hidden_layer",
            "_project(device, x, up, up_bias, x.dtype)",
            "_project(device, x, up, None, x.dtype)",
        ),
        op="ffn_forward_bias",
        detector="bound",
        pattern="not in the products",
    ),
    Fault(
        name="residual-added-twice",
        seen_in="generic",
        symptom="the stream grows: the residual is added by the norm and once more too often after the layer",
        change=KernelChange(
            "ffn.cu",
            "__fadd_rn(widen(residual[i]), update[i])",
            "__fadd_rn(widen(residual[i]), __fadd_rn(widen(residual[i]), update[i]))",
        ),
        op="ffn_residual",
        detector="bound",
    ),
    Fault(
        name="residual-not-added",
        seen_in="generic",
        symptom="the layer replaces the stream",
        change=KernelChange("ffn.cu", "__fadd_rn(widen(residual[i]), update[i])", "update[i]"),
        op="ffn_residual",
        detector="bound",
    ),
    Fault(
        name="residual-before-the-sum",
        seen_in="generic",
        symptom="the layer's result is added to x, the residual that the norm added is lost",
        change=FunctionChange("mxharness.functional.ffn", "residual_stages", 'made.get("sum", x)', "x"),
        op="ffn_residual",
        detector="bound",
    ),
)
