"""Faults of routing and of experts."""

from __future__ import annotations

from mxharness.faults.planted.fault import Fault, FunctionChange, KernelChange

_STAGES = "mxharness.functional.moe"
_BIAS = "bias + static_cast<long long>(tile.problem) * N"


def _fault(
    name: str,
    symptom: str,
    change: KernelChange | FunctionChange,
    seen_in: str = "generic: routing to experts",
    op: str = "moe_forward",
    detector: str = "bound",
    pattern: str = "",
    on_gpu: str = "",
) -> Fault:
    return Fault(
        name=name,
        seen_in=seen_in,
        symptom=symptom,
        change=change,
        op=op,
        detector=detector,
        pattern=pattern,
        on_gpu=on_gpu,
    )


FAULTS = (
    _fault(
        "softmax-before-top-k",
        "weights do not add up to 1: the softmax is taken over all experts and then cut",
        KernelChange(
            "moe.cu",
            "for (int slot = 0; slot < k; ++slot) total = __fadd_rn(total, shuffle(exponential, slot));",
            "for (int e = 0; e < E; ++e) total = __fadd_rn(total, exp32(__fsub_rn(logits[token * E + e], largest)));",
        ),
        op="moe_router",
    ),
    _fault(
        "expert-index-off-by-one",
        "every token meets its neighbour's expert: ids count from 1",
        KernelChange("moe.cu", "lane] = id_of(mine);", "lane] = id_of(mine) + 1;"),
        pattern="they are 1 too large",
    ),
    _fault(
        "nan-logit-never-chosen",
        "a NaN in a token vanishes: it loses every comparison",
        KernelChange("moe.cu", "order = 0xffffffffu;", "order = 1;"),
        seen_in="generic: fmaxf drops NaN",
        op="moe_router",
    ),
    _fault(
        "gate-and-up-not-interleaved",
        "gsm8k .88 -> .21: the first half of the rows is taken for the gate",
        FunctionChange(_STAGES, "moe_stages", "interleaved=True", "interleaved=False"),
        seen_in="sglang PR 26884, vllm PR 44893",
    ),
    _fault(
        "gate-and-up-swapped-in-the-product",
        "up is taken first where a product's kernel makes the hidden layer; right wherever another one does",
        KernelChange(
            "gemm_stage.cuh",
            "gate[i] = widen(made.values[2 * i]), up[i] = widen(made.values[2 * i + 1]);",
            "up[i] = widen(made.values[2 * i]), gate[i] = widen(made.values[2 * i + 1]);",
        ),
        seen_in="vllm PR 44893",
    ),
    _fault(
        "swiglu-of-unrounded-products",
        "other bits than in transformers: the product is not kept in the activations' type before its SwiGLU",
        KernelChange(
            "gemm_stage.cuh",
            "gate[i] = widen(made.values[2 * i]), up[i] = widen(made.values[2 * i + 1]);",
            "gate[i] = (&piece[i / 2].x)[2 * i % 4], up[i] = (&piece[i / 2].x)[2 * i % 4 + 1];",
        ),
    ),
    _fault(
        "expert-bias-stride-padded",
        "from the second expert on biases of elsewhere: a padded size is used as offset",
        KernelChange("gemm.cuh", _BIAS, _BIAS.replace("* N", "* ((N + 127) / 128 * 128)")),
        seen_in="vllm PR 42595",
        detector="memory",
        on_gpu="bound",
    ),
    _fault(
        "bias-of-the-first-expert",
        "right where all tokens go to expert 0: the others' biases are never read",
        KernelChange("gemm.cuh", _BIAS, "bias"),
        pattern="not in the products",
    ),
    _fault(
        "row-of-another-token",
        "right for one token: an entry is taken for a token",
        FunctionChange(_STAGES, "moe_stages", "fan=k)", "fan=1)"),
        detector="memory",
        on_gpu="bound",
    ),
    _fault(
        "empty-expert-takes-a-tile",
        "right while every expert has a token: the last tiles of the others never run",
        KernelChange("gemm.cuh", "return (count + size - 1) / size;", "return count / size + 1;"),
    ),
    _fault(
        "offset-past-the-expert's-own",
        "every expert works on the next one's entries",
        KernelChange("moe.cu", "smaller += some[i] < expert;", "smaller += some[i] <= expert;"),
        detector="memory",
    ),
    _fault(
        "last-slot-dropped",
        "one expert of k never counts",
        KernelChange(
            "moe.cu",
            "const long long entry = token * k + slot;",
            "if (slot == k - 1) break;\n        const long long entry = token * k + slot;",
        ),
    ),
    _fault(
        "weight-of-another-slot",
        "right where all weights are equal: the weights are taken in the opposite order",
        KernelChange(
            "moe.cu", "const float weight = weights[entry];", "const float weight = weights[token * k + k - 1 - slot];"
        ),
    ),
)
