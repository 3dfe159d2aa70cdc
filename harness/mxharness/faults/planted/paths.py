"""Faults of dispatch: the wrong backend, a layout that only one path knows, a tile map for another number of warps."""

from __future__ import annotations

from mxharness.faults.planted.fault import Fault, FunctionChange, KernelChange

FAULTS: tuple[Fault, ...] = (
    Fault(
        name="silent-fallback",
        seen_in="flashinfer issue 3334",
        symptom="right and unproven: another backend answers, the kernel under test never runs",
        change=FunctionChange(
            "mxharness.functional.quantize",
            "dequantize",
            "    codes, scales = weight\n",
            "    from mxharness.mxfp4 import dequantize as software\n\n"
            "    return y.copy_(software(*weight, dtype)[:, :K])\n"
            "    codes, scales = weight\n",
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
            "Problem(kind, ACTIVATIONS[x.dtype], N,",
            "Problem(kind, ACTIVATIONS[torch.bfloat16], N,",
        ),
        op="gemm",
        detector="bound",
    ),
    Fault(
        name="layout-of-one-path",
        seen_in="vllm PR 49335",
        symptom="wrong with few rows only: one path takes the two bytes of a load in the other order",
        change=KernelChange(
            "gemm_few.cuh",
            "words[i][0] = __byte_perm(a, c, 0x5140);",
            "words[i][0] = __byte_perm(a, c, 0x4051);",
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
        op="gemm_persistent",
        detector="bound",
        pattern="features 32 to 63",
    ),
    Fault(
        name="piece-brought-twice",
        seen_in="generic: a box's coordinate that does not move with its place",
        symptom="features from 128 on are those before them: the copy engine is asked for the first rows again",
        change=KernelChange("dense_wide.cuh", "first_feature + h % MB * PIECE_ROWS, c", "first_feature, c"),
        op="gemm_persistent",
        detector="bound",
    ),
    Fault(
        name="scale-of-the-chunk's-first-block",
        seen_in="generic: four scales read as one word",
        symptom="every block of 128 k takes the scale of the first 32",
        change=KernelChange(
            "dense_wide.cuh", "decode_scale(now.words[i] >> 8 * span & 0xff)", "decode_scale(now.words[i] & 0xff)"
        ),
        op="gemm_persistent",
        detector="bound",
    ),
    Fault(
        name="warpgroups-share-their-features",
        seen_in="triton-lang/triton PR 9029",
        symptom="wrong from the second warpgroup on: its place in the tile is that of the first",
        change=KernelChange(
            "gemm_wide.cuh",
            "(TURNS ? 0 : group * MB * GROUP_ROWS) + ",
            "(TURNS ? 0 : group / 2 * MB * GROUP_ROWS) + ",
        ),
        op="gemm",
        detector="bound",
    ),
    Fault(
        name="codes-of-the-wrong-lane",
        seen_in="any kernel that decodes into fragments",
        symptom="the codes that lanes 1 and 2 of four decode are exchanged",
        change=KernelChange(
            "gemm_stage.cuh",
            "return 16 * piece_of(g, 0) + 4 * t;",
            "return 16 * piece_of(g, 0) + 4 * (t == 0 || t == 3 ? t : 3 - t);",
        ),
        op="gemm",
        detector="bound",
    ),
    Fault(
        name="large-scales-in-one-product",
        seen_in="kernels that fold 2^126 into the scale's bfloat16 factor",
        symptom="wrong from scale byte 129 on: the factor's exponent runs over",
        change=KernelChange("operand.cuh", "if (byte < 128) continue;", "if (byte < 512) continue;"),
        op="gemm",
        detector="bound",
    ),
    Fault(
        name="later-scales-never-looked-at",
        seen_in="kernels with a fast path for usual scales",
        symptom="right while scales are usual: whether some are extreme is asked of the first 1,024 columns alone",
        change=KernelChange(
            "gemm_wide.cuh",
            "if (n > 1 && n % SCALES_OF == 1) look_at_scales(n - 1 + SCALES_OF);",
            "if (n < 0) look_at_scales(n - 1 + SCALES_OF);",
        ),
        op="gemm",
        detector="bound",
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
