"""Faults of matrix products."""

from __future__ import annotations

from mxharness.faults.planted.fault import Fault, FunctionChange, KernelChange

FAULTS = (
    *(
        Fault(
            name=f"scales-past-the-row-{path}",
            seen_in="triton-lang/triton issue 10772, vllm PR 47910, sglang PR 36456",
            symptom="accuracy 0 %, depends on neighbours: rows of K/32 = 90 scales are read as if padded",
            change=KernelChange(file, old, new),
            op=op,
            detector="memory",
            on_gpu="bound",
        )
        for path, op, file, old, new in (
            (
                "few-rows",
                "gemm",
                "gemm_few.cuh",
                "from.scales[(from.at[i] + k / 2) / 16]",
                "from.scales[(from.at[i] + k / 2) / 16 * ((K + 127) / 128 * 4) / (K / 32)]",
            ),
            (
                "many-rows",
                "gemm_persistent",
                "gemm_tile.cuh",
                "weights.scale(weight_row, k)",
                "weights.scale(weight_row * ((K + 127) / 128 * 4) / (K / 32), k)",
            ),
            (
                "warpgroups",
                "gemm",
                "gemm_stage.cuh",
                "weights.scales + row * blocks + first;",
                "weights.scales + row * ((blocks + 3) / 4 * 4) + first;",
            ),
        )
    ),
    *(
        Fault(
            name=f"k-tail-dropped-{path}",
            seen_in="triton-lang/triton PR 7203",
            symptom="wrong when K is not a multiple of the block: the last chunk of K is left out",
            change=KernelChange(file, old, new),
            op=op,
            detector="bound",
            pattern=pattern,
        )
        for path, op, file, old, new, pattern in (
            (
                "few-rows",
                "gemm",
                "gemm_few.cuh",
                "chunks = (K + chunk - 1) / chunk,",
                "chunks = K / chunk,",
                "every element, the last K block (8)",
            ),
            (
                "many-rows",
                "gemm_persistent",
                "gemm_tile.cuh",
                "begin < K; begin += chunk",
                "begin + chunk <= K; begin += chunk",
                "the last K block (4)",
            ),
            (
                "warpgroups",
                "gemm",
                "gemm_wide.cuh",
                "const int chunks = (K + STAGE_K - 1) / STAGE_K;",
                "const int chunks = max(K / STAGE_K, 1);",
                "the last K block (4)",
            ),
        )
    ),
    Fault(
        name="half-accumulators",
        seen_in="llama-orch, mxfp4_gemm.cu",
        symptom="sums are kept in half",
        change=KernelChange(
            "gemm.cuh",
            "    return __fadd_rn(total, Order<T>::scale_operand ? chunk_sum : __fmul_rn(chunk_sum, scale));",
            "    return __half2float(__float2half_rn("
            "__fadd_rn(total, Order<T>::scale_operand ? chunk_sum : __fmul_rn(chunk_sum, scale))));",
        ),
        also=KernelChange(
            "gemm.cuh",
            "? __fmaf_rn(chunk_sum, scale, total) :",
            "? __half2float(__float2half_rn(__fmaf_rn(chunk_sum, scale, total))) :",
        ),
        op="gemm",
        detector="bound",
    ),
    Fault(
        name="tail-columns-wrap",
        seen_in="triton-lang/triton PR 10385",
        symptom="the last columns hold those of the start: the number of features is floored to whole tiles",
        change=KernelChange(
            "gemm.cuh",
            "        const long long at = row * N + n;",
            "        const long long at = row * N + (N >= 16 ? n % (N / 16 * 16) : n);",
        ),
        op="gemm",
        detector="bound",
        pattern="the last feature (32)",
    ),
    Fault(
        name="raw-scale-byte-in-the-small-path",
        seen_in="ml-explore/mlx issue 3762",
        symptom="wrong with few rows only: the scale byte is used as a number",
        change=KernelChange(
            "gemm_few.cuh",
            "return special ? decode_scale(byte(block, i)) : __uint_as_float(byte(block, i) << 23);",
            "return static_cast<float>(byte(block, i));",
        ),
        op="gemm",
        detector="bound",
    ),
    Fault(
        name="output-transposed",
        seen_in="llama-orch, mxfp4_gemm.cu",
        symptom="right at batch 1, wrong from batch 2 on: the result is written as (N, M)",
        change=KernelChange(
            "gemm.cuh",
            "        const long long at = row * N + n;",
            "        const long long at = static_cast<long long>(n) * tile.count + row;",
        ),
        op="gemm",
        detector="bound",
        pattern="the result is transposed",
    ),
    Fault(
        name="packed-along-the-wrong-axis",
        seen_in="triton-lang/triton PR 11734",
        symptom="nearly every output is wrong: a byte is taken to hold the same k of two rows",
        change=FunctionChange(
            "mxharness.functional.gemm",
            "multiply",
            "w, scales = weight\n",
            "w, scales = weight\n    if w.dtype.itemsize == 1:\n        w = w.mT.contiguous().reshape(w.shape)\n",
        ),
        op="gemm",
        detector="bound",
    ),
    Fault(
        name="blocks-straddle-rows",
        seen_in="DeepWok/mase PR 321",
        symptom="wrong when K is no multiple of 32: blocks are cut from the flattened matrix",
        change=KernelChange(
            "quantize.cu",
            "    const T* in = x + row * K + first;",
            "    const T* in = x + min(block * MX_BLOCK, R * K - min(static_cast<long long>(K), 32ll));",
        ),
        op="quantize",
        detector="exact",
    ),
    Fault(
        name="batch-dependent-path",
        seen_in="flashinfer issue 3559",
        symptom="a token's result changes with the batch: one of the two paths adds its chunks in another order",
        change=KernelChange(
            "gemm_few.cuh",
            "first_sum[part * TILE_M * PITCH]",
            "first_sum[(parts - 1 - part) * TILE_M * PITCH]",
        ),
        op="gemm",
        detector="predicted",
        pattern="the way their sums are joined",
    ),
    Fault(
        name="partial-sum-dropped",
        seen_in="split-K kernels",
        symptom="the eighth partial sum is never added",
        change=KernelChange("gemm_few.cuh", "part < parts; ++part)", "part < parts; part += part == 6 ? 2 : 1)"),
        op="gemm",
        detector="bound",
        pattern="K block 7 alone, k 224 to 255",
    ),
    Fault(
        name="partial-sum-added-twice",
        seen_in="split-K kernels",
        symptom="one warp's partial sum is added twice, another's not at all",
        change=KernelChange(
            "gemm_few.cuh",
            "first_sum[part * TILE_M * PITCH]",
            "first_sum[max(part, min(1, parts - 1)) * TILE_M * PITCH]",
        ),
        op="gemm",
        detector="bound",
        pattern="K blocks 0 to 7, k 0 to 255",
    ),
    *(
        Fault(
            name=f"barrier-dropped-{where}",
            seen_in="any tiled kernel",
            symptom=f"a race: {symptom}",
            change=KernelChange("gemm_tile.cuh", old, new),
            op="gemm_persistent",
            detector=detector,
            undefined=True,
        )
        for where, symptom, old, new, detector in (
            (
                "before-use",
                "the tile is read before all of it has been loaded",
                "            __syncthreads();\n#pragma unroll\n            for (int step",
                "#pragma unroll\n            for (int step",
                "bound",
            ),
            (
                "before-load",
                "the next tile overwrites one that is still read",
                "            __syncthreads();  // the stage before has been read\n",
                "",
                "bound",
            ),
        )
    ),
    Fault(
        name="return-before-a-barrier",
        seen_in="llama-orch, mxfp4_attention.cu",
        symptom="threads past the end return while the others wait",
        change=KernelChange(
            "gemm_tile.cuh",
            "    float total[MT][NT][4] = {};\n    for (int begin",
            "    if (n >= N) return;\n    float total[MT][NT][4] = {};\n    for (int begin",
        ),
        op="gemm_persistent",
        detector="crash",
        undefined=True,
    ),
    Fault(
        name="barrier-dropped-warpgroups",
        seen_in="any tiled kernel",
        symptom="a race: who loads tells of a stage, or comes to the barrier after it, while it is still on its way",
        change=KernelChange(
            "gemm_wide.cuh",
            "wait_async<1>();  // the stage before has arrived",
            "wait_async<2>();",
        ),
        op="gemm",
        detector="bound",
        undefined=True,
    ),
    Fault(
        name="barrier-dropped-shared-k",
        seen_in="any kernel that splits K",
        symptom="a race: sums of a round are added before all warpgroups have left theirs, and overwritten before that",
        change=KernelChange(
            "gemm_split.cuh",
            "            __syncthreads();  // this stage has arrived, and the sums of the round before\n",
            "",
        ),
        also=KernelChange(
            "gemm_split.cuh",
            "            __syncthreads();  // the stage has arrived; the one before has been read\n",
            "",
        ),
        op="gemm",
        detector="bound",
        undefined=True,
    ),
    Fault(
        name="copies-not-awaited-thin",
        seen_in="any kernel with asynchronous copies",
        symptom="the newest stage but one is read while it is still on its way",
        change=KernelChange("gemm_thin.cuh", "wait_async<STAGES - 2>();", "wait_async<STAGES - 1>();"),
        op="gemm",
        detector="bound",
        undefined=True,
    ),
    Fault(
        name="shares-joined-out-of-order",
        seen_in="split-K kernels",
        symptom="right within the bound; the warps that share K add their sums last to first",
        change=KernelChange(
            "gemm_thin.cuh",
            "const Own sum = shared.sums_of(r, from)[c]",
            "const Own sum = shared.sums_of(r, shares - 1 - from)[c]",
        ),
        op="gemm",
        detector="predicted",
    ),
    Fault(
        name="turns-joined-out-of-order",
        seen_in="split-K kernels",
        symptom="right within the bound; warpgroups that take turns add their own chunk before the other's earlier one",
        change=KernelChange(
            "gemm_wide.cuh",
            "if (TURNS && span == SPANS - 1 && c > 0) add_left(c - 1);",
            "",
        ),
        also=KernelChange(
            "gemm_wide.cuh",
            "if constexpr (TURNS) leave_and_add(c);",
            "if constexpr (TURNS) leave_and_add(c), c > 0 ? add_left(c - 1) : void();",
        ),
        op="gemm",
        detector="predicted",
    ),
    Fault(
        name="return-before-a-barrier-warpgroups",
        seen_in="llama-orch, mxfp4_attention.cu",
        symptom="threads whose features lie past the end return while the others wait",
        change=KernelChange(
            "gemm_wide.cuh",
            "        float total[MB][OWN][4] = {};",
            "        if (first_feature >= features_live) return;\n        float total[MB][OWN][4] = {};",
        ),
        op="gemm",
        detector="crash",
        undefined=True,
    ),
    Fault(
        name="matrix-stride-padded",
        seen_in="vllm PR 42595",
        symptom="from the second matrix on weights of elsewhere: a padded size is used as offset",
        change=KernelChange(
            "gemm_few.cuh",
            "static_cast<long long>(tile.problem) * N + first,",
            "static_cast<long long>(tile.problem) * (N - N % 16) + first,",
        ),
        op="gemm_batch",
        detector="bound",
        pattern="matrices from 1 on",
    ),
    Fault(
        name="persistent-buffer-of-another-scale",
        seen_in="generic: a dequantised copy that leaves its scales behind",
        symptom="a half-precision buffer of bare codes is multiplied without scales",
        change=FunctionChange(
            "mxharness.functional.gemm", "gemm_persistent", "scales=weight.scales, ", "scales=None, "
        ),
        op="gemm_persistent",
        detector="bound",
    ),
)
