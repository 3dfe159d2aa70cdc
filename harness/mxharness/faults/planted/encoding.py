"""Faults of encoders: scale rules, ties, tiny blocks; and of decoders that take shortcuts with exponents."""

from __future__ import annotations

from mxharness.faults.planted.fault import Fault, KernelChange

_INVERSE = "static_cast<std::uint32_t>(254 - s) << 23"
_SCALE = "encode_scale(__uint_as_float(largest), scale_rule)"
_FIRST = "const float first = __fmul_rn(__uint_as_float(pair << 16), scale);"
_PLACES = {
    "nan-test-on-the-scale": "scale bytes 134, 255",
    "scale-of-a-sixth-truncated": "they are 1 too small",
    "negative-exponent-wraps": "they are 254 too large",
}

FAULTS: tuple[Fault, ...] = (
    *(
        Fault(
            name=name,
            seen_in=seen_in,
            symptom=symptom,
            change=KernelChange(file, old, new),
            op=op,
            detector="exact",
            pattern=_PLACES.get(name, ""),
        )
        for name, seen_in, symptom, file, old, new, op in (
            (
                "tiny-blocks-halved",
                "pytorch/ao issue 1104",
                "blocks under 2^-126 come back half as large: divided by 2^-126, stored as 2^-127",
                "mxfp4.cuh",
                _INVERSE,
                _INVERSE.replace("- s", "- max(s, 1)"),
                "quantize",
            ),
            (
                "nan-test-on-the-scale",
                "sgl-project/sglang PR 25519",
                "2^7 becomes NaN and byte 255 Inf: the decoded scale, not its byte, is compared",
                "mxfp4.cuh",
                "if (s == 255) return",
                "if (__uint_as_float(s << 23) == 128.0f) return",
                "dequant",
            ),
            (
                "ties-away",
                "ROCm/aiter PR 3992",
                "0.25, 1.25, 2.5 and 5 go up instead of to the even code",
                "mxfp4.cuh",
                "if (rule != TIE_EVEN) {\n",
                "rule = rule == TIE_EVEN ? TIE_AWAY : rule;\n    if (rule != TIE_EVEN) {\n",
                "quantize",
            ),
            (
                "two-scale-rules-mixed",
                "ROCm/ATOM PR 1601, ROCm/aiter PR 3212",
                "accuracy falls a little: the path for row ends has another scale rule than the one for whole blocks",
                "quantize.cu",
                "Max()), scale_rule);",
                "Max()), K % 8 == 0 ? scale_rule : SCALE_CEIL);",
                "quantize",
            ),
            (
                "scale-of-a-sixth-truncated",
                "vllm PR 43557",
                "blocks whose largest magnitude is not a power of two have half the scale: amax / 6 is truncated",
                "mxfp4.cuh",
                "int byte = static_cast<int>(bits >> 23) - 2; ",
                "int byte = static_cast<int>(__float_as_uint(__fdiv_rn(amax, 6.0f)) >> 23); ",
                "quantize",
            ),
            (
                "sticky-bit-lost",
                "tenstorrent/tt-metal issue 51971",
                "0.25000006 becomes 0: the low bits are cut off before the tie is decided",
                "mxfp4.cuh",
                "__fmul_rn(__uint_as_float(__float_as_uint(x) & 0x7fffffffu), inverse)",
                "__fmul_rn(__uint_as_float(__float_as_uint(x) & 0x7ffff000u), inverse)",
                "quantize",
            ),
            (
                "tiny-scale-underflows",
                "flashinfer issue 2440",
                "tiny inputs become NaN or 6: the scale is flushed to zero and its inverse is Inf",
                "mxfp4.cuh",
                _INVERSE,
                _INVERSE.replace("254 - s", "s == 0 ? 255 : 254 - s"),
                "quantize",
            ),
            (
                "amax-rounded-to-bfloat16",
                "pytorch/ao PR 4725",
                "scales are one step off near a power of two: float32 to bfloat16 to E8M0 rounds twice",
                "mxfp4.cuh",
                _SCALE,
                _SCALE.replace("__uint_as_float(largest)", "__uint_as_float((largest + 0x8000) & 0x7fff0000)"),
                "quantize",
            ),
            (
                "exponents-added-without-guards",
                "vllm PR 46676, its review",
                "scale byte 0 times 0.5 is -Inf: exponents are added as integers",
                "mxfp4.cuh",
                _FIRST,
                "const float first = __uint_as_float((pair << 17) == 0 ? pair << 16 : "
                "(pair << 16) + __float_as_uint(scale) - 0x3f800000u);",
                "dequant",
            ),
            (
                "negative-exponent-wraps",
                "ml-explore/mlx 0.32.4, ggml",
                "a block of 1e-40 becomes one of 1e37: a negative exponent is cast to a byte",
                "mxfp4.cuh",
                "return byte > 0 ? byte : 0;",
                "return byte & 0xff;",
                "quantize",
            ),
            (
                "subnormals-flushed",
                "Quark's packer under flush-to-zero",
                "0.5 is lost in blocks near 2^-126: subnormal inputs are read as zero",
                "mxfp4.cuh",
                "    const std::uint32_t power = ",
                "    if ((__float_as_uint(x) & 0x7f800000u) == 0) return __float_as_uint(x) & 0x80000000u;\n"
                "    const std::uint32_t power = ",
                "quantize",
            ),
        )
    ),
)
