"""Faults of the KV cache and of rotation."""

from __future__ import annotations

from mxharness.faults.planted.fault import Fault, FunctionChange, KernelChange

FAULTS = (
    Fault(
        name="rope-pair-order",
        seen_in="generic: GGUF against transformers weights",
        symptom="pairs (2i, 2i + 1) are taken for (i, i + D/2)",
        change=FunctionChange("mxharness.functional.rope", "check_rope", "return ORDERS[rope.order]", "return 0"),
        op="apply_rope",
        detector="bound",
    ),
    Fault(
        name="rope-order-of-keys-alone",
        seen_in="generic: a cache that rotates on its own",
        symptom="queries and keys are rotated in different pairs",
        change=FunctionChange(
            "mxharness.functional.kv_cache", "kv_cache_append", "order, cache.page", "1 - order, cache.page"
        ),
        op="multi_head_attention",
        detector="bound",
    ),
    Fault(
        name="rope-sign",
        seen_in="generic",
        symptom="pairs turn the other way: right alone, wrong beside keys rotated elsewhere",
        change=KernelChange(
            "rope.cuh",
            "first ? __fsub_rn(along, across) : __fadd_rn(along, across)",
            "first ? __fadd_rn(along, across) : __fsub_rn(along, across)",
        ),
        op="apply_rope",
        detector="bound",
    ),
    Fault(
        name="rope-rounded-in-between",
        seen_in="generic: rotation in half precision",
        symptom="a product of the rotation is rounded to 16 bits before the sum",
        change=KernelChange(
            "rope.cuh",
            "    T result;\n    narrow(&result, first ? __fsub_rn(along, across)",
            "    T result;\n    narrow(&result, along);\n    narrow(&result, first ? __fsub_rn(widen(result), across)",
        ),
        op="apply_rope",
        detector="bound",
    ),
    Fault(
        name="rope-of-the-first-token",
        seen_in="generic: decode without an offset",
        symptom="in decode every token is rotated as if it stood at position 0",
        change=KernelChange(
            "kv_cache.cu",
            "    if (tokens.starts != nullptr) place.position += tokens.starts[place.sequence];\n    return true;",
            "    if (tokens.starts != nullptr && tokens.T > 1) place.position += tokens.starts[place.sequence];\n"
            "    return true;",
        ),
        op="apply_rope",
        detector="bound",
    ),
    *(
        Fault(
            name=f"{name}-{where}",
            seen_in="generic: paged attention",
            symptom=symptom,
            change=KernelChange("kv_cache.cuh", old, new),
            op=op,
            detector=detector,
            pattern="positions 0, 4, 8" if (name, where) == ("stale-page", "written") else "",
        )
        for where, op, detector in (("written", "kv_cache_append", "bound"), ("read", "attention", "bound"))
        for name, symptom, old, new in (
            (
                "block-table-off-by-one",
                "the page after the right one is used",
                "* pages + n]",
                "* pages + min(n + 1, pages - 1)]",
            ),
            (
                "stale-page",
                "at a page's first position the page before is still used",
                "* pages + n]",
                "* pages + max(position - 1, 0) / page]",
            ),
        )
    ),
    Fault(
        name="cache-blocks-straddle-rows",
        seen_in="DeepWok/mase PR 321",
        symptom="with head_dim 80 blocks of the cache are cut from rows laid end to end",
        change=KernelChange(
            "kv_cache.cu",
            "const long long to = row * row_blocks(tokens.D) + place.first / MX_BLOCK;",
            "const long long to = (row * tokens.D + place.first) / MX_BLOCK;",
        ),
        op="kv_cache_append",
        detector="bound",
    ),
    Fault(
        name="quantised-before-rotation",
        seen_in="generic: a quantised KV cache",
        symptom="an MXFP4 cache holds keys that were never rotated",
        change=KernelChange(
            "kv_cache.cu",
            "widen(rotated(from, angles, place.first + i, tokens.D, tokens.order))",
            "widen(from[place.first + i])",
        ),
        op="kv_cache_append",
        detector="bound",
    ),
    Fault(
        name="value-heads-of-the-keys",
        seen_in="generic: fused projections",
        symptom="values are read with the tokens' distance of the keys",
        change=KernelChange("kv_cache.cu", "v + place.token * v_stride)", "k + place.token * k_stride)"),
        op="kv_cache_append",
        detector="bound",
    ),
)
