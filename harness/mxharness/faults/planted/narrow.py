"""Faults that hide from all detectors but one: what each of them is there for."""

from __future__ import annotations

from mxharness.faults.planted.fault import Fault, FunctionChange, KernelChange

_SCALE_BYTE = "    scales[block] = static_cast<std::uint8_t>(s);"

FAULTS: tuple[Fault, ...] = (
    Fault(
        name="chunks-of-another-length",
        seen_in="generic: a retuned kernel",
        symptom="within every bound, and other bits than any other schedule: sums are cut at 64 instead of 128",
        change=KernelChange("mma.cuh", "static constexpr int chunk = 128;", "static constexpr int chunk = 64;"),
        op="gemm",
        detector="predicted",
        pattern="the way their sums are joined",
    ),
    Fault(
        name="global-scale-and-its-inverse",
        seen_in="generic: a global scale that is divided out again",
        symptom="within the bound, inexact where the sum would be exact: a result is multiplied by 0.1 and by 10",
        change=KernelChange(
            "gemm.cuh",
            "        return bias == nullptr ? total : ",
            "        total = __fmul_rn(__fmul_rn(total, 0.1f), 10.0f);\n        return bias == nullptr ? total : ",
        ),
        op="gemm",
        detector="predicted",
    ),
    Fault(
        name="inexact-scale-that-is-predicted",
        seen_in="generic: the reference is the code itself",
        symptom="as before, and the prediction was changed with the kernel: only the one right value tells",
        change=KernelChange(
            "gemm.cuh",
            "        return bias == nullptr ? total : ",
            "        total = __fmul_rn(__fmul_rn(total, 0.1f), 10.0f);\n        return bias == nullptr ? total : ",
        ),
        also=FunctionChange(
            "mxharness.ops.gemm",
            "linear_bits",
            "y = torch.from_numpy(total).to(torch.float32)",
            "y = torch.from_numpy(total).to(torch.float32) * 0.1 * 10.0",
        ),
        op="gemm",
        detector="exact-arithmetic",
    ),
    Fault(
        name="lost-residual-in-the-stage's-reference",
        seen_in="generic: the reference is the code itself",
        symptom="the layer's result is added to x, and the stage's references were written from the kernel",
        change=FunctionChange("mxharness.functional.ffn", "residual_stages", 'made.get("sum", x)', "x"),
        also=FunctionChange(
            "mxharness.ops.ffn",
            "kept",
            'return tensors.get("sum", tensors["x"])',
            'return tensors["x"]',
        ),
        op="ffn_residual",
        detector="composed",
    ),
    Fault(
        name="root-by-batch",
        seen_in="flashinfer issue 3559",
        symptom="within the bound, and other bits in a batch: from three rows on a coarser square root is taken, "
        "which the prediction takes, too",
        change=KernelChange(
            "norm.cu",
            "    const float inverse = rsqrt32(__fadd_rn(square, eps));\n",
            "    float inverse = rsqrt32(__fadd_rn(square, eps));\n"
            "    if (gridDim.x > 2) inverse = __uint_as_float(__float_as_uint(inverse) & 0xfffffff0u);\n",
        ),
        also=FunctionChange(
            "mxharness.ops.activation_bits",
            "normed",
            "rsqrt(_mean(rows * rows) + _F(eps))",
            "(rsqrt(_mean(rows * rows) + _F(eps)).view(np.uint32) & np.uint32(0xFFFFFFF0 | 15 * (len(rows) < 3)))"
            ".view(_F)",
        ),
        op="rms_norm",
        detector="invariance",
    ),
    Fault(
        name="padding-scale-written",
        seen_in="generic: scale tensors padded to a tile",
        symptom="right, and somebody else's memory changes: one more scale byte is written than there are blocks",
        change=KernelChange(
            "quantize.cu",
            _SCALE_BYTE,
            _SCALE_BYTE + "\n    if (block + 1 == R * blocks) scales[block + 1] = 127;",
        ),
        op="quantize",
        detector="memory",
    ),
    Fault(
        name="broken-block-keeps-its-old-scale",
        seen_in="kernels whose output lies in uninitialised memory",
        symptom="right where the buffer holds 0xFF already: the scale byte of a NaN block is never written",
        change=KernelChange("quantize.cu", _SCALE_BYTE, "    if (s != 255)" + _SCALE_BYTE[3:]),
        op="quantize",
        detector="repeatability",
    ),
    Fault(
        name="prefetch-past-the-end",
        seen_in="generic: a pipeline that loads one step ahead",
        symptom="right where memory goes on behind a tensor: a byte past the scales is read and never used",
        change=KernelChange(
            "dequant.cu",
            "        const std::uint8_t scale = scales[at / OF_BLOCK];",
            "        const std::uint8_t scale = scales[at / OF_BLOCK];\n"
            "        static_cast<void>(*static_cast<const volatile std::uint8_t*>(scales + at / OF_BLOCK + 1));",
        ),
        op="dequant",
        detector="memory",
        undefined=True,
    ),
    Fault(
        name="barrier-dropped-after-the-reduction",
        seen_in="any block-wide reduction",
        symptom="a race: the next reduction writes the scratch that a slow warp still reads",
        change=KernelChange(
            "moe.cu",
            "    __syncthreads();  // scratch has been read\n",
            "",
        ),
        op="moe_forward",
        detector="race",
        undefined=True,
    ),
    Fault(
        name="rows-past-the-end-never-staged",
        seen_in="any tiled kernel",
        symptom="right while rows do not mix: the tensor core is fed shared memory that nobody has written",
        change=KernelChange(
            "gemm_tile.cuh",
            "for (int i = 0; i < 8; ++i) weights_to[i] = 0;",
            "for (int i = 8; i < 8; ++i) weights_to[i] = 0;",
        ),
        op="gemm_persistent",
        detector="uninitialised",
        undefined=True,
    ),
    Fault(
        name="rows-past-the-end-never-copied",
        seen_in="any tiled kernel",
        symptom="right while columns do not mix: the tensor core is fed shared memory that nobody has written",
        change=KernelChange(
            "gemm_stage.cuh",
            "copy(i, m + i * apart < live);",
            "if (m + i * apart < live) copy(i, true);",
        ),
        op="moe_forward",
        detector="uninitialised",
        undefined=True,
    ),
    Fault(
        name="registers-past-their-end",
        seen_in="generic: a loop that goes one too far",
        symptom="right while the compiler keeps the array in registers: two elements past its end are written",
        change=KernelChange(
            "mxfp4.cuh", "for (int i = 0; i < COUNT / 2; ++i) {", "for (int i = 0; i <= COUNT / 2; ++i) {"
        ),
        op="dequant",
        detector="undefined",
        undefined=True,
    ),
)
