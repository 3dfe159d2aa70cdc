"""Faults of attention's core."""

from __future__ import annotations

from mxharness.faults.planted.fault import Fault, KernelChange

_SOFTMAX = "weight_pairs<T>(mine, z);"
_SCORES = "for (int i = 0; i < OWN / 4; ++i) mine[i] = pack<T>(s[0][i / 2][i % 2 * 2], s[0][i / 2][i % 2 * 2 + 1]);"
_END = "return ((problem->causal ? position(last) + 1 : length) + CHUNK - 1) / CHUNK;"
_BARRIER = "        __syncthreads();  // {}\n"
_SHARED, _FEW, _MANY, _WIDE = "attention.cuh", "attention_few.cuh", "attention_many.cuh", "attention_wide.cuh"
_UNDEFINED = (
    "barrier-dropped-before-scores",
    "barrier-dropped-before-values",
    "idle-warps-return",
    "wait-dropped-before-a-barrier",
    "wait-for-all-but-the-chunk-itself",
    "products-joined-before-they-are-there",
    "queries-in-the-other-buffer",
)
_PLACES = {
    "head-stride-of-another-layout": "heads 1 to 4",
    "grouped-output-never-written": "heads of its group from 1 on",
    "causal-mask-long-by-one": "tokens up to 3",
    "unseen-value-times-zero": "in tokens up to 6",
}

FAULTS = tuple(
    Fault(
        name=name,
        seen_in=seen_in,
        symptom=symptom,
        change=KernelChange(file, old, new),
        op="attention",
        detector=detector,
        pattern=_PLACES.get(name, ""),
        undefined=name in _UNDEFINED,
    )
    for name, seen_in, symptom, file, old, new, detector in (
        (
            "attention-without-softmax",
            "llama-orch, mxfp4_attention.cu",
            "scores weigh the values as they are",
            _FEW,
            _SOFTMAX,
            _SCORES,
            "bound",
        ),
        (
            "softmax-without-maximum",
            "generic: exponentials of raw scores",
            "right for small scores, Inf and NaN for large ones",
            _SHARED,
            "return ceilf(__fmul_rn(largest, factor));",
            "return 0.0f;",
            "bound",
        ),
        (
            "head-stride-of-another-layout",
            "llama-orch, mxfp4_attention.cu",
            "with several KV heads queries are read as if the heads of a group lay apart",
            _SHARED,
            "q_stride + tile.query_head(r) * D : nullptr;",
            "q_stride + (r % tile.G * (tile.problem->H / tile.G) + tile.head) * D : nullptr;",
            "bound",
        ),
        (
            "grouped-output-never-written",
            "llama-orch, mxfp4_attention.cu",
            "only the first query head of a group reaches the output",
            _FEW,
            "if (r >= tile.count) continue;",
            "if (r >= tile.count || r % tile.G > 0) continue;",
            "bound",
        ),
        *(
            (
                f"causal-mask-{word}-by-one",
                "generic",
                f"a query sees {what}",
                _SHARED,
                "problem->causal ? position(r) + 1 : length;",
                f"problem->causal ? {high} : length;",
                "bound",
            )
            for word, what, high in (
                ("short", "no key of its own position", "position(r)"),
                ("long", "the key after its own position", "min(position(r) + 2, length)"),
            )
        ),
        (
            "window-off-by-one",
            "generic",
            "the sliding window holds one key too many",
            _SHARED,
            "max(position(r) - problem->window + 1, 0) : 0;",
            "max(position(r) - problem->window, 0) : 0;",
            "bound",
        ),
        (
            "sink-dropped",
            "generic",
            "the sink takes no weight",
            _SHARED,
            "return {top, __fmul_rn(exp2_32(z[0]), Weight<T>::FACTOR)};",
            "return {top, 0.0f};",
            "bound",
        ),
        (
            "chunk-not-rescaled",
            "generic: online softmax",
            "the output so far keeps the scale of an older maximum",
            _SHARED,
            "return __fmaf_rn(part, by.joined, __fmul_rn(o, by.kept));",
            "return __fmaf_rn(part, by.joined, o);",
            "bound",
        ),
        (
            "prefill-floors-its-chunks",
            "flashinfer issue 3559",
            "the same token differs between prefill and decode: one path leaves out the last chunk",
            _SHARED,
            _END,
            _END.replace("+ CHUNK - 1)", "+ (problem->T > 1 ? 0 : CHUNK - 1))"),
            "bound",
        ),
        (
            "cache-scale-dropped",
            "generic: a quantised KV cache",
            "codes of an MXFP4 cache are read without their scale",
            _SHARED,
            "decode_eight<T>(words[w], scales[i]);",
            "decode_eight<T>(words[w], 127);",
            "bound",
        ),
        (
            "unseen-value-times-zero",
            "generic: masks that only zero the weights",
            "0 times NaN: a broken value reaches queries that do not see it",
            _MANY,
            "if (!all_finite) broken = 1;",
            "",
            "bound",
        ),
        (
            "chunks-joined-from-the-last",
            "split-KV decoding, whose parts are merged in any order",
            "within every bound, and other bits than the declared order: the last chunk of keys comes first",
            _FEW,
            "return at + i; };",
            "return first + end - 1 - at - i; };",
            "predicted",
        ),
        (
            "first-part-joined-twice",
            "generic: split-KV decoding",
            "the keys of the first block count twice: in the state it left and as a part of their own",
            _FEW,
            "const int first = max(per_split, low / CHUNK - begin)",
            "const int first = max(0, low / CHUNK - begin)",
            "bound",
        ),
        (
            "window-masked-on-the-diagonal-only",
            "generic: tiled prefill",
            "chunks that the window begins in are taken for wholly seen",
            _MANY,
            "const bool masked = all_low > first_key || all_high < first_key + CHUNK;",
            "const bool masked = all_high < first_key + CHUNK;",
            "bound",
        ),
        (
            "weights-summed-before-their-rounding",
            "generic: softmax in float32, weights in 16 bits",
            "the sum that divides is not that of the weights that were used: it is taken before they are rounded",
            _MANY,
            "row_sums<T>(sum, p);",
            "for (int half = 0; half < 2; ++half) {\n"
            "    sum[half] = 0.0f;\n"
            "    for (int i = 0; i < CHUNK / 4; ++i)\n"
            "        sum[half] = __fadd_rn(sum[half], weight32<T>(s[0][i / 2][2 * half + i % 2]));\n"
            "    sum[half] = warp_reduce<4>(sum[half], Sum());\n"
            "}",
            "predicted",
        ),
        (
            "softmax-of-an-approximate-exponential",
            "generic: ex2.approx, __expf",
            "within every bound, and other bits on other GPUs: of exponents where the unit is not sure enough",
            _SHARED,
            "__fsub_rn(__fmaf_rn(s[i], by[i / 2 % 2], from[i / 2 % 2]), GRID);",
            "__fmaf_rn(s[i], by[i / 2 % 2], __fsub_rn(from[i / 2 % 2], GRID));",
            "predicted",
        ),
        (
            "barrier-dropped-before-scores",
            "any tiled kernel",
            "a race: keys are read before all of them have been staged",
            _SHARED,
            _BARRIER.format("copied keys are there, the last values have been used"),
            "",
            "bound",
        ),
        (
            "barrier-dropped-before-values",
            "any tiled kernel",
            "a race: values are weighed before all weights have been written",
            _SHARED,
            _BARRIER.format("values and weights are there"),
            "",
            "bound",
        ),
        (
            "idle-warps-return",
            "llama-orch, mxfp4_attention.cu",
            "warps without columns of the output return while the others wait",
            _FEW,
            "        chunks.weights();",
            "        if (16 * warp >= D) return;\n        chunks.weights();",
            "crash",
        ),
        (
            "wait-dropped-before-a-barrier",
            "NVIDIA/Fuser PR 3438",
            "a race: the barrier is there, but nobody has waited for the asynchronous copies of the chunk",
            _SHARED,
            "            else wait_async<0>();\n",
            "",
            "bound",
        ),
        (
            "wait-for-all-but-the-chunk-itself",
            "csarofeen/pytorch PR 2457, tile-ai/tilelang PR 2505",
            "a race: the wait leaves a group of copies too many on its way, the one that is read next",
            _SHARED,
            "if (COPIED<Cache>) wait_async<1>();",
            "if (COPIED<Cache>) wait_async<2>();",
            "crash",
        ),
        (
            "products-joined-before-they-are-there",
            "generic: asynchronous tensor core steps",
            "a race: nobody waits for the products of weights and values before they join the output",
            _WIDE,
            "                group_wait<0>(part);\n                values_used(time);",
            "                if (chunk + 1 == end) group_wait<0>(part);\n                values_used(time);",
            "bound",
        ),
        (
            "queries-in-the-other-buffer",
            "generic: double buffers",
            "what shared memory held is multiplied; were that NaN, a second pass would make all rows again",
            "attention_wide_tiles.cuh",
            "load_queries(shared.queries[number % 2][0], shared.tiles[number % KNOWN]);",
            "load_queries(shared.queries[(number + 1) % 2][0], shared.tiles[number % KNOWN]);",
            "repeatability",
        ),
        (
            "keys-of-the-next-chunk-forgotten",
            "generic: rings of stages",
            "every chunk's weights are those of the chunk before: the next keys lie a stage further on",
            _WIDE,
            "number, time + 1, more);",
            "number, time, more);",
            "bound",
        ),
    )
)
