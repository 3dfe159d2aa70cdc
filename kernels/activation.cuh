// Activations of feed-forward layers, in float32, one rounding an operation; NaN stays NaN.
//
//   gelu             x (1 + erf(x / sqrt(2))) / 2
//   gelu_tanh        x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
//   silu             x / (1 + e^-x)
//   swiglu           silu(gate) up                                                        Llama
//   swiglu_limited   g / (1 + e^(-alpha g)) (u + 1), g = min(gate, limit),                gpt-oss
//                    u = up held between -limit and limit
#pragma once

#include "convert.cuh"
#include "math.cuh"

__device__ inline float gelu(float x) {
    const float erf = erf32(__fmul_rn(x, 0.707106781f));
    return __fmul_rn(__fmul_rn(0.5f, x), __fadd_rn(1.0f, erf));
}

__device__ inline float gelu_tanh(float x) {
    const float cubic = __fmul_rn(x, __fmaf_rn(__fmul_rn(0.044715f, x), x, 1.0f));
    const float tanh = tanh32(__fmul_rn(0.797884561f, cubic));
    return __fmul_rn(__fmul_rn(0.5f, x), __fadd_rn(1.0f, tanh));
}

__device__ inline float silu(float x) { return __fmul_rn(x, sigmoid32(x)); }

__device__ inline float swiglu(float gate, float up) { return __fmul_rn(silu(gate), up); }

// The smaller and the larger one, where a NaN x stays.
__device__ inline float at_most(float x, float limit) { return x > limit ? limit : x; }
__device__ inline float at_least(float x, float limit) { return x < limit ? limit : x; }

// sigmoid(x): that of this file, or one that is near it.
template <class Sigmoid> __device__ inline float swiglu_by(float gate, float up, float alpha, float limit, Sigmoid sigmoid) {
    const float g = at_most(gate, limit), u = at_least(at_most(up, limit), -limit);
    const float glu = __fmul_rn(g, sigmoid(__fmul_rn(alpha, g)));
    return __fmul_rn(__fadd_rn(u, 1.0f), glu);
}
__device__ inline float swiglu_limited(float gate, float up, float alpha, float limit) {
    return swiglu_by(gate, up, alpha, limit, [](float x) { return sigmoid32(x); });
}

// Of pairs of gate and up, swiglu_limited rounded to T, two in a word.
#ifdef __CUDACC__
// Nearly sigmoid32(x) in 9 instructions. rises: log2 of e^-x, which must be at most 60.
__device__ inline float sigmoid_near(float x, float& rises) {
    rises = __fmul_rn(x, -1.44269502f);
    // What the product and its factor lack, as an exponent: -x log2(e) = rises + lost.
    const float lost = __fmaf_rn(x, -1.92596299e-8f, __fmaf_rn(x, -1.44269502f, -rises));
    float e, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(rises));
    e = __fmaf_rn(e, __fmul_rn(lost, 0.693147182f), e);
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(__fadd_rn(1.0f, e)));
    return inverse;
}

// In units of 2^-24 of the value: the unit for powers is off by 4, the one for inverses by 2, e's correction, the sum and the
// two products after the inverse by 1 each, 10 in all; sigmoid32 by 3 and its two products by 1 each, 5 in all. So what
// swiglu_limited gives lies within NEAR of what is computed here, if that is neither so large nor so small that an
// operation loses bits, and where both ends round to the same number of T, so does everything between.
constexpr float NEAR = 0x1p-20f, LARGEST_LIMIT = 0x1p39f;  // of 16; up + 1 does not hide a glu below 2^-100

template <class T, int N>
__device__ inline void swiglu_pairs(std::uint32_t (&to)[N], const float (&gate)[2 * N], const float (&up)[2 * N], float alpha,
                                    float limit) {
    bool sure = limit <= LARGEST_LIMIT;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        float high[2], low[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float rises;
            const float y = swiglu_by(gate[2 * i + j], up[2 * i + j], alpha, limit, [&](float x) { return sigmoid_near(x, rises); });
            sure &= (rises <= 60.0f) & (magnitude(y) >= 0x1p-60f) & (magnitude(y) <= 0x1p120f);  // false for NaN
            high[j] = __fmaf_rn(y, NEAR, y), low[j] = __fmaf_rn(y, -NEAR, y);
        }
        to[i] = pack<T>(high[0], high[1]);
        sure &= to[i] == pack<T>(low[0], low[1]);
    }
    if (sure) return;
#pragma unroll
    for (int i = 0; i < N; ++i)
        to[i] = pack<T>(swiglu_limited(gate[2 * i], up[2 * i], alpha, limit),
                        swiglu_limited(gate[2 * i + 1], up[2 * i + 1], alpha, limit));
}
#else
template <class T, int N>
inline void swiglu_pairs(std::uint32_t (&to)[N], const float (&gate)[2 * N], const float (&up)[2 * N], float alpha, float limit) {
    for (int i = 0; i < N; ++i)
        to[i] = pack<T>(swiglu_limited(gate[2 * i], up[2 * i], alpha, limit),
                        swiglu_limited(gate[2 * i + 1], up[2 * i + 1], alpha, limit));
}
#endif
