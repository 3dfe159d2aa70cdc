"""Faults of matrix products."""

from __future__ import annotations

from mxharness.planted.fault import Fault, KernelChange

FAULTS = (
    *(
        Fault(
            name=f"scales-past-the-row-{path}",
            seen_in="triton-lang/triton issue 10772, vllm PR 47910, sglang PR 36456",
            symptom="accuracy 0 %, depends on neighbours: rows of K/32 = 90 scales are read as if padded",
            change=KernelChange("gemm.cu", old, old.replace(", k)", " * ((K + 127) / 128 * 4) / (K / 32), k)")),
            op="gemm",
            detector="bound",
        )
        for path, old in (
            ("few-rows", "weights.scale(first_row + n[i], k)"),
            ("many-rows", "weights.scale(weight_row, k)"),
        )
    ),
    *(
        Fault(
            name=f"k-tail-dropped-{path}",
            seen_in="triton-lang/triton PR 7203",
            symptom="wrong when K is not a multiple of the block: the last chunk of K is left out",
            change=KernelChange("gemm.cu", old, new),
            op="gemm",
            detector="bound",
        )
        for path, old, new in (
            ("few-rows", "const int chunks = (K + chunk - 1) / chunk;", "const int chunks = K / chunk;"),
            ("many-rows", "begin < K; begin += chunk", "begin + chunk <= K; begin += chunk"),
        )
    ),
    Fault(
        name="half-accumulators",
        seen_in="llama-orch, mxfp4_gemm.cu",
        symptom="sums are kept in half",
        change=KernelChange(
            "gemm.cu",
            "    return __fadd_rn(total, Order<T>::scale_operand ? chunk_sum : __fmul_rn(chunk_sum, scale));",
            "    return __half2float(__float2half_rn("
            "__fadd_rn(total, Order<T>::scale_operand ? chunk_sum : __fmul_rn(chunk_sum, scale))));",
        ),
        op="gemm",
        detector="bound",
    ),
)
