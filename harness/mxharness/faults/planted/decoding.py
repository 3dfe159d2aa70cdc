"""Faults of decoders, packings and scales."""

from __future__ import annotations

from mxharness.faults.planted.fault import Fault, KernelChange, LayoutChange


def _scale_bias(offset: int) -> Fault:
    word = f"{'plus' if offset > 0 else 'minus'}-{abs(offset)}"
    return Fault(
        name=f"scale-bias-{word}",
        seen_in="vllm-project/compressed-tensors PR 538, vllm PR 35979",
        symptom="perplexity 22,953 instead of 8.74: the stored scale byte is off by a constant",
        change=KernelChange("mxfp4.cuh", "    if (s == 0) return", f"    s += {offset};\n    if (s == 0) return"),
        op="dequant",
        detector="exact",
        pattern=f"they are {2.0**offset:g} times what they should be",
    )


FAULTS = (
    Fault(
        name="gguf-nibbles-read-as-linear",
        seen_in="kekzl/imp PR 567",
        symptom="fluent garbage: split nibbles of GGUF blocks are read as linear ones",
        change=LayoutChange("gguf", "nibbles", "linear-low"),
        op="dequant",
        detector="exact",
        pattern="the halves of each block of 32 are read as alternating",
    ),
    Fault(
        name="nibbles-swapped",
        seen_in="pytorch/ao issue 2939 and PR 3123",
        symptom="wrong across frameworks: the first element is taken from the high nibble",
        change=KernelChange(
            "mxfp4.cuh",
            "    const std::uint32_t first = byte & 7,",
            "    byte = byte >> 4 | (byte & 15) << 4;\n    const std::uint32_t first = byte & 7,",
        ),
        op="dequant",
        detector="exact",
        pattern="neighbours (even and odd k) are exchanged",
    ),
    *(_scale_bias(offset) for offset in (-2, -1, 1, 2)),
    Fault(
        name="scale-byte-0-is-zero",
        seen_in="triton-lang/triton PR 11624 and PR 11737",
        symptom="blocks vanish: 2^-127 is made by a shift and becomes 0",
        change=KernelChange("mxfp4.cuh", "if (s == 0) return __uint_as_float(0x00400000u);", ""),
        op="dequant",
        detector="exact",
        pattern="scale byte 0 alone",
    ),
    Fault(
        name="scale-cast-to-half",
        seen_in="pytorch/ao and ml-explore/mlx, fp16 output",
        symptom="zeros become NaN from scale byte 143 on: the scale, not the product, is rounded to half",
        change=KernelChange(
            "mxfp4.cuh",
            "    const float scale = decode_scale(scale_byte);",
            "    float scale = decode_scale(scale_byte);\n"
            "    if (std::is_same<T, __half>::value) scale = __half2float(__float2half_rn(scale));",
        ),
        op="dequant",
        detector="exact",
        pattern="the NaN in magnitude code 0 alone, in scale bytes 143 to 254",
    ),
    Fault(
        name="linear-code-table",
        seen_in="llama-orch, mxfp4_dequant.cu",
        symptom="codes 5, 6, 7 decode as 2.5, 3, 3.5",
        change=KernelChange("mxfp4.cuh", "low[2] = {0xC0800000u, 0xC0804000u}", "low[2] = {0xC0800000u, 0x60402000u}"),
        op="dequant",
        detector="exact",
        pattern="magnitude codes from 5 on",
    ),
    Fault(
        name="tail-written-past-the-end",
        seen_in="llama-orch, mxfp4_dequant.cu",
        symptom="buffer overrun: the element count is rounded up and written",
        change=KernelChange("dequant.cu", "const int count = min(COUNT, left);", "const int count = COUNT;"),
        op="dequant",
        detector="memory",
    ),
)
