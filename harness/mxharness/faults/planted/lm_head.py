"""Faults of LM heads and samplers."""

from __future__ import annotations

from mxharness.faults.planted.fault import Fault, FunctionChange, KernelChange

_MODULE = "mxharness.functional.lm_head"
_RANK = """\
    return z != z ? NAN_RANK : key << 32 | ~static_cast<std::uint32_t>(id);
}
__device__ inline int id_of(std::uint64_t rank) { return static_cast<int>(~static_cast<std::uint32_t>(rank)); }"""

FAULTS = (
    Fault(
        name="tied-embedding-decoded-on-one-side",
        seen_in="kekzl/imp PR 395",
        symptom="token-0 spam: the LM head decodes the shared table, the embedding takes its bare codes",
        change=FunctionChange(
            "mxharness.functional.embedding",
            "_packed",
            '"packed", *table)',
            '"packed", table.codes, torch.full_like(table.scales, 127))',
        ),
        op="lm_head_forward",
        detector="bound",
    ),
    Fault(
        name="vocabulary-tail-wraps",
        seen_in="triton-lang/triton PR 10385",
        symptom="the last tokens of a vocabulary that is not a multiple of the tile have the first ones' logits",
        change=KernelChange(
            "gemm_few.cuh",
            "const int first = min(n0, N - 1);",
            "const int first = n0 < N / 16 * 16 ? n0 : 0;",
        ),
        op="lm_head_forward",
        detector="bound",
        pattern="the last feature (32)",
    ),
    Fault(
        name="last-vector-past-the-end",
        seen_in="generic: a guard of whole vectors that is off by one",
        symptom="right wherever the count is a multiple of four; elsewhere an element past the end is read and written",
        change=KernelChange("lm_head.cu", "if (first + 4 <= count) {", "if (first + 3 <= count) {"),
        op="lm_head_forward_temperature",
        detector="memory",
    ),
    Fault(
        name="top-k-keeps-one-less",
        seen_in="samplers that compare with the k-th logit as if it were outside",
        symptom="k - 1 tokens are left; k = 2 is greedy",
        change=KernelChange(
            "lm_head.cu",
            "    const std::uint64_t top = over_block",
            "    k = max(k - 1, 1);\n    const std::uint64_t top = over_block",
        ),
        op="lm_head_forward_topk",
        detector="bound",
    ),
    Fault(
        name="top-k-keeps-all-ties",
        seen_in="huggingface/transformers, TopKLogitsWarper",
        symptom="more than k tokens are left where several have the k-th logit",
        change=KernelChange("lm_head.cu", "if (mine >= edge) to", "if (mine >> 32 >= edge >> 32) to"),
        op="lm_head_forward_topk",
        detector="bound",
    ),
    Fault(
        name="top-p-before-renormalising",
        seen_in="samplers that cut both filters from one softmax",
        symptom="with top-k active the nucleus is that of the whole vocabulary, and too large",
        change=FunctionChange(
            _MODULE,
            "logit_stages",
            'stages |= _filtered(device, "top_p", y, np.int64(share))',
            'stages |= _filtered(device, "top_p", stages.get("scaled", stages["logits"]), np.int64(share))',
        ),
        op="lm_head_sample",
        detector="bound",
    ),
    Fault(
        name="top-p-without-the-token-that-reaches-it",
        seen_in="samplers that keep what lies under p, and nothing where one token is past it",
        symptom="the nucleus lacks its last token",
        change=KernelChange("lm_head.cu", "key_of(z) == key && id <= cut", "key_of(z) == key && id < cut"),
        op="lm_head_forward_topp",
        detector="bound",
    ),
    Fault(
        name="temperature-after-softmax",
        seen_in="samplers whose softmax comes before their temperature",
        symptom="the temperature changes nothing",
        change=FunctionChange(
            _MODULE,
            "probability_stages",
            "z = last_of(stages)",
            'z = stages["logits"]',
        ),
        op="lm_head_probabilities",
        detector="bound",
    ),
    Fault(
        name="argmax-takes-the-last-tie",
        seen_in="parallel reductions that compare with >=",
        symptom="another token than elsewhere where two logits are equal",
        change=KernelChange(
            "lm_head.cu", _RANK, _RANK.replace("~static_cast<std::uint32_t>", "+static_cast<std::uint32_t>")
        ),
        op="lm_head_greedy",
        detector="bound",
    ),
    Fault(
        name="sample-off-by-one",
        seen_in="inverse distribution functions that return how many tokens lie under the uniform, from 1",
        symptom="a token is drawn that may have been filtered out",
        change=KernelChange("lm_head.cu", "ids[blockIdx.x] = id;", "ids[blockIdx.x] = min(id + 1, row.V - 1);"),
        op="lm_head_sample",
        detector="bound",
    ),
)
