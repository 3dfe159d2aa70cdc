// Elementary functions in float32 with the same bits on every device: only correctly rounded operations (+ - * / sqrt
// and fused multiply-add), never a library's function or an approximate instruction.
//
// NaN in gives NaN out. The error beside each function is the largest over all 2^32 inputs, in units in the last place
// of the exact value (2^-149 for subnormal ones); suites/meta/test_math.py holds each to it on a sample.
// Polynomials: weighted Remez for the relative error of the function, coefficients rounded to float32 one after
// another, lowest order first, the others fitted again each time. Their own error is given with the interval.
#pragma once

#include <cstdint>

// e^(r + rest) for |r| <= ln(2) / 2 and a rest that is at most its rounding, before the last one.
__device__ inline float exp_near(float r, float rest) {
    // (e^r - 1 - r) / r^2, to 1.1e-9 of e^r
    float q = 1.728078787e-4f;
    q = __fmaf_rn(q, r, 1.393460087e-3f);
    q = __fmaf_rn(q, r, 8.337888867e-3f);
    q = __fmaf_rn(q, r, 4.166648164e-2f);
    q = __fmaf_rn(q, r, 1.666664779e-1f);
    q = __fmaf_rn(q, r, 0.5f);
    const float high = __fadd_rn(1.0f, r);
    const float low = __fadd_rn(__fsub_rn(1.0f, high), r);  // 1 + r = high + low exactly
    return __fadd_rn(high, __fadd_rn(low, __fmaf_rn(__fmul_rn(r, r), q, rest)));
}
// p 2^n for n from -150 to 128, in two factors, so that neither overflows and the last product alone is rounded.
__device__ inline float times_power(float p, float n) {
    const int whole = static_cast<int>(n), first = whole / 2;
    const float a = __uint_as_float(static_cast<std::uint32_t>(127 + first) << 23);
    const float b = __uint_as_float(static_cast<std::uint32_t>(127 + whole - first) << 23);
    return __fmul_rn(__fmul_rn(p, a), b);
}
constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

// e^x for x from -104 to 88.8 or NaN. Error 0.67 ulp; 0.77 below 2^-126, where results are subnormal and rounded once more.
__device__ inline float exp32_within(float x) {
    const float n = __fsub_rn(__fmaf_rn(x, 1.44269504f, ROUNDING), ROUNDING);
    const float wide = __fmaf_rn(n, -6.93145752e-1f, x);  // ln 2 in two parts, the first so short that this is exact
    const float r = __fmaf_rn(n, -1.42860677e-6f, wide);
    const float rest = __fmaf_rn(n, -1.42860677e-6f, __fsub_rn(wide, r));  // what r lost
    return times_power(exp_near(r, rest), n);
}

// e^x. 0 below -103.98, Inf above 88.72.
__device__ inline float exp32(float x) {
    if (x != x) return x;
    if (x > 88.8f) return __uint_as_float(0x7f800000u);
    if (x < -104.0f) return 0.0f;
    return exp32_within(x);
}

// 2^x for x from -150 to 128 or NaN; exact for integers. Error 0.67 ulp; 0.79 below 2^-126.
__device__ inline float exp2_32_within(float x) {
    const float n = __fsub_rn(__fadd_rn(x, ROUNDING), ROUNDING), f = __fsub_rn(x, n);
    const float r = __fmul_rn(f, 6.93147182e-1f);
    const float rest = __fmaf_rn(f, -1.90465421e-9f, __fmaf_rn(f, 6.93147182e-1f, -r));  // what r lost, and ln 2 lacks
    return times_power(exp_near(r, rest), n);
}

// 2^x. 0 from -150 on downwards, Inf from 128 on upwards.
__device__ inline float exp2_32(float x) {
    if (x != x) return x;
    if (x > 128.0f) return __uint_as_float(0x7f800000u);
    if (x < -150.0f) return 0.0f;
    return exp2_32_within(x);
}

// numerator / (large + small) for finite large >= small >= 0, with what the sum and the quotient lose put back.
__device__ inline float over_sum(float numerator, float large, float small) {
    const float sum = __fadd_rn(large, small);
    const float lost = __fadd_rn(__fsub_rn(large, sum), small);  // exactly, as large is not below small
    const float inverse = __fdiv_rn(1.0f, sum);
    const float quotient = __fmul_rn(numerator, inverse);
    const float residual = __fmaf_rn(-quotient, lost, __fmaf_rn(-quotient, sum, numerator));
    return __fmaf_rn(residual, inverse, quotient);
}

// 1 / (1 + e^-x). Error 1.48 ulp.
__device__ inline float sigmoid32(float x) {
    const float e = exp32(x < 0.0f ? x : -x);  // at most 1
    return over_sum(x < 0.0f ? e : 1.0f, 1.0f, e);
}

__device__ inline float magnitude(float x) { return __uint_as_float(__float_as_uint(x) & 0x7fffffffu); }
__device__ inline float with_sign(float y, float x) {  // of x, for y >= 0
    return __uint_as_float(__float_as_uint(y) | (__float_as_uint(x) & 0x80000000u));
}

// (e^x - e^-x) / (e^x + e^-x). Error 1.06 ulp.
__device__ inline float tanh32(float x) {
    const float a = magnitude(x);
    if (a > 10.0f) return with_sign(1.0f, x);
    if (!(a > 0.65f)) {  // NaN too
        const float u = __fmul_rn(a, a);
        // (tanh(x) / x - 1) / u for u = x^2 <= 0.65^2, to 3.6e-10 of tanh(x)
        float p = 2.010663040e-3f;
        p = __fmaf_rn(p, u, -8.028396405e-3f);
        p = __fmaf_rn(p, u, 2.163868956e-2f);
        p = __fmaf_rn(p, u, -5.393514410e-2f);
        p = __fmaf_rn(p, u, 1.333311200e-1f);
        p = __fmaf_rn(p, u, -3.333332837e-1f);
        return with_sign(__fmaf_rn(__fmul_rn(p, u), a, a), x);
    }
    return with_sign(__fsub_rn(1.0f, over_sum(2.0f, exp32(__fadd_rn(a, a)), 1.0f)), x);
}

// The error function, 2 / sqrt(pi) times the integral of e^(-t^2) from 0 to x. Error 1.0 ulp.
__device__ inline float erf32(float x) {
    const float a = magnitude(x);
    if (a > 3.92f) return with_sign(1.0f, x);  // nearer to it than to any other float32
    if (!(a > 1.0f)) {  // NaN too
        const float u = __fmul_rn(a, a);
        // erf(x) / x - 1 for u = x^2 <= 1, to 1.5e-9 of erf(x)
        float p = 7.806890790e-5f;
        p = __fmaf_rn(p, u, -7.997851935e-4f);
        p = __fmaf_rn(p, u, 5.187162198e-3f);
        p = __fmaf_rn(p, u, -2.685334720e-2f);
        p = __fmaf_rn(p, u, 1.128357872e-1f);
        p = __fmaf_rn(p, u, -3.761262596e-1f);
        p = __fmaf_rn(p, u, 1.283791661e-1f);
        return with_sign(__fmaf_rn(p, a, a), x);
    }
    const float t = __fsub_rn(a, 1.0f);
    // ln((1 - erf(1 + t)) / (1 - erf(1))) / t for 0 <= t <= 2.93, to 1.3e-9 of erf(1 + t)
    float p = 1.856373419e-4f;
    p = __fmaf_rn(p, t, -1.828078763e-3f);
    p = __fmaf_rn(p, t, 9.895947762e-3f);
    p = __fmaf_rn(p, t, -4.150532931e-2f);
    p = __fmaf_rn(p, t, -8.431166410e-1f);
    p = __fmaf_rn(p, t, -2.638967037f);
    return with_sign(__fsub_rn(1.0f, exp32(__fmaf_rn(p, t, -1.849605560f))), x);  // ln(1 - erf(1))
}

// 1 / sqrt(x): two roundings. Error 1.5 ulp. Inf for 0, NaN below.
__device__ inline float rsqrt32(float x) { return __fdiv_rn(1.0f, __fsqrt_rn(x)); }
