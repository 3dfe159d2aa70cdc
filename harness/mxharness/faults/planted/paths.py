"""Faults of dispatch: the wrong backend, a layout that only one path knows, a tile map for another number of warps."""

from __future__ import annotations

from mxharness.faults.planted.fault import Fault, FunctionChange, KernelChange

_OPERANDS = "return make_uint2(operand<T>(codes4 & 0xff, scale), operand<T>(codes4 >> 8, scale));"

FAULTS: tuple[Fault, ...] = (
    Fault(
        name="silent-fallback",
        seen_in="flashinfer issue 3334",
        symptom="right and unproven: another backend answers, the kernel under test never runs",
        change=FunctionChange(
            "mxharness.functional.quantize",
            "dequantize",
            "    threads = R * -(-K // 8)\n",
            "    from mxharness.mxfp4 import dequantize as software\n\n"
            "    return y.copy_(software(*weight, dtype)[:, :K])\n"
            "    threads = R * -(-K // 8)\n",
        ),
        op="dequant",
        detector="contract",
    ),
    Fault(
        name="kernel-of-another-dtype",
        seen_in="flashinfer issue 3334",
        symptom="GPQA 0.000 and no error: half activations go to the bfloat16 kernel",
        change=FunctionChange(
            "mxharness.functional.gemm",
            "multiply",
            "{'small' if small else 'tile'}_{ACTIVATIONS[x.dtype]}",
            "{'small' if small else 'tile'}_{ACTIVATIONS[torch.bfloat16]}",
        ),
        op="gemm",
        detector="bound",
    ),
    Fault(
        name="layout-of-one-path",
        seen_in="vllm PR 49335",
        symptom="wrong with few rows only: one path takes the two bytes of a load in the other order",
        change=KernelChange(
            "gemm.cuh",
            _OPERANDS,
            "return make_uint2(operand<T>(codes4 >> 8, scale), operand<T>(codes4 & 0xff, scale));",
        ),
        op="gemm",
        detector="bound",
    ),
    Fault(
        name="tile-map-of-eight-warps",
        seen_in="triton-lang/triton PR 9029",
        symptom="wrong with four warps: a warp's place in the tile is that of eight",
        change=KernelChange(
            "gemm_tile.cuh",
            "const int warp_n = warp / 2 * 32, warp_m = warp % 2 * 32;",
            "const int warp_n = warp / 4 * 32, warp_m = warp % 4 / 2 * 32;",
        ),
        op="gemm",
        detector="bound",
        pattern="features 32 to 63",
    ),
    Fault(
        name="tokens-read-as-columns",
        seen_in="llama-orch, mxfp4_gemm.cu",
        symptom="right at batch 1 only: activations are taken for (K, M)",
        change=FunctionChange(
            "mxharness.functional.gemm",
            "multiply",
            "    w, scales = weight\n",
            "    w, scales = weight\n    x = x.mT.contiguous().reshape(x.shape)\n",
        ),
        op="gemm",
        detector="bound",
    ),
)
