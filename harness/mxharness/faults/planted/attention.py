"""Faults of attention's core."""

from __future__ import annotations

from mxharness.faults.planted.fault import Fault, KernelChange

_SOFTMAX = "visible[j][r] ? exp32(__fsub_rn(s[0][j][r], base(top[half]))) : 0.0f"
_QUERY = "problem.q_stride + (head * G + r % G) * D + column"
_END = "const int end = ((problem.causal ? start + last / G + 1 : length) + CHUNK - 1) / CHUNK;"
_UNDEFINED = ("barrier-dropped-before-scores", "barrier-dropped-before-staging", "idle-warps-return")
_PLACES = {
    "head-stride-of-another-layout": "heads 1 to 4",
    "grouped-output-never-written": "heads of its group from 1 on",
    "causal-mask-long-by-one": "tokens up to 3",
    "unseen-value-times-zero": "position 67 alone",
}

FAULTS = tuple(
    Fault(
        name=name,
        seen_in=seen_in,
        symptom=symptom,
        change=KernelChange("kv_cache.cuh" if name == "cache-scale-dropped" else "attention.cu", old, new),
        op="attention",
        detector=detector,
        pattern=_PLACES.get(name, ""),
        undefined=name in _UNDEFINED,
    )
    for name, seen_in, symptom, old, new, detector in (
        (
            "attention-without-softmax",
            "llama-orch, mxfp4_attention.cu",
            "scores weigh the values as they are",
            _SOFTMAX,
            "visible[j][r] ? s[0][j][r] : 0.0f",
            "bound",
        ),
        (
            "softmax-without-maximum",
            "generic: exponentials of raw scores",
            "right for small scores, Inf and NaN for large ones",
            "return m == -__uint_as_float(0x7f800000u) ? 0.0f : m;",
            "return 0.0f;",
            "predicted",
        ),
        (
            "head-stride-of-another-layout",
            "llama-orch, mxfp4_attention.cu",
            "with several KV heads queries are read as if the heads of a group lay apart",
            _QUERY,
            "problem.q_stride + (r % G * rows.heads + head) * D + column",
            "bound",
        ),
        (
            "grouped-output-never-written",
            "llama-orch, mxfp4_attention.cu",
            "only the first query head of a group reaches the output",
            "if (column >= D || row >= count) continue;",
            "if (column >= D || row >= count || row % G > 0) continue;",
            "bound",
        ),
        *(
            (
                f"causal-mask-{word}-by-one",
                "generic",
                f"a query sees {what}",
                "problem.causal ? position + 1 : length;",
                f"problem.causal ? {high} : length;",
                "bound",
            )
            for word, what, high in (
                ("short", "no key of its own position", "position"),
                ("long", "the key after its own position", "min(position + 2, length)"),
            )
        ),
        (
            "window-off-by-one",
            "generic",
            "the sliding window holds one key too many",
            "max(position - problem.window + 1, 0) : 0;",
            "max(position - problem.window, 0) : 0;",
            "bound",
        ),
        (
            "sink-dropped",
            "generic",
            "the sink takes no weight",
            "l[half] = sink ? 1.0f : 0.0f;",
            "l[half] = 0.0f;",
            "bound",
        ),
        (
            "chunk-not-rescaled",
            "generic: online softmax",
            "the output so far keeps the scale of an older maximum",
            "__fadd_rn(__fmul_rn(o[c][r], kept), ",
            "__fadd_rn(o[c][r], ",
            "bound",
        ),
        (
            "prefill-floors-its-chunks",
            "flashinfer issue 3559",
            "the same token differs between prefill and decode: one path leaves out the last chunk",
            _END,
            _END.replace("+ CHUNK - 1)", "+ (T_ > 1 ? 0 : CHUNK - 1))"),
            "bound",
        ),
        (
            "cache-scale-dropped",
            "generic: a quantised KV cache",
            "codes of an MXFP4 cache are read without their scale",
            "const float scale = decode_scale(scales[block]);",
            "const float scale = 1.0f;",
            "bound",
        ),
        (
            "unseen-value-times-zero",
            "generic: masks that only zero the weights",
            "0 times NaN: a broken value reaches queries that do not see it",
            "if (specials && special<T>(pair[i])) pair[i] = 0;",
            "",
            "bound",
        ),
        (
            "chunks-joined-from-the-last",
            "split-KV decoding, whose parts are merged in any order",
            "within every bound, and other bits than the declared order: the last chunk of keys comes first",
            "for (int chunk = begin; chunk < end; ++chunk) {",
            "for (int chunk = end - 1; chunk >= begin; --chunk) {",
            "predicted",
        ),
        (
            "weights-summed-before-their-rounding",
            "generic: softmax in float32, weights in 16 bits",
            "the sum that divides is not that of the weights that were used: it is taken before they are rounded",
            "each[j] = __fadd_rn(widen(p[0]), widen(p[1]));",
            "for (int i = 0; i < 2; ++i) s[0][j][2 * half + i] = visible[j][2 * half + i] ? "
            "exp32(__fsub_rn(s[0][j][2 * half + i], base(top[half]))) : 0.0f;\n"
            "                each[j] = __fadd_rn(s[0][j][2 * half], s[0][j][2 * half + 1]);",
            "predicted",
        ),
        (
            "softmax-of-an-approximate-exponential",
            "generic: ex2.approx, __expf",
            "within every bound, and other bits on other GPUs: weights err by two units in the last place",
            _SOFTMAX,
            _SOFTMAX.replace("exp32(", "__uint_as_float(~3u & __float_as_uint(exp32(").replace(" :", ")) :"),
            "predicted",
        ),
        (
            "barrier-dropped-before-scores",
            "any tiled kernel",
            "a race: keys are read before all of them have been staged",
            "        __syncthreads();\n\n        float s[1][2][4] = {};",
            "        float s[1][2][4] = {};",
            "bound",
        ),
        (
            "barrier-dropped-before-staging",
            "any tiled kernel",
            "a race: the next chunk overwrites one that is still read",
            "        __syncthreads();  // the chunk before has been used\n",
            "",
            "bound",
        ),
        (
            "idle-warps-return",
            "llama-orch, mxfp4_attention.cu",
            "warps without columns of the output return while the others wait",
            "        float partial[2];",
            "        if (16 * warp >= D) return;\n        float partial[2];",
            "crash",
        ),
    )
)
