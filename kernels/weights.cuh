// exp32 of differences that are at most 0, rounded to a 16-bit type: the weights of a softmax.
#pragma once

#include "convert.cuh"
#include "math.cuh"

#include <type_traits>

// Two values rounded to T, the first in the low half.
template <class T> __device__ inline std::uint32_t pack(float first, float second);
template <> __device__ inline std::uint32_t pack<__nv_bfloat16>(float first, float second) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const std::uint32_t*>(&both);
}
template <> __device__ inline std::uint32_t pack<__half>(float first, float second) {
    const __half2 both = __floats2half2_rn(first, second);
    return *reinterpret_cast<const std::uint32_t*>(&both);
}
template <class T> __device__ inline float low_of(std::uint32_t pair);
template <class T> __device__ inline float high_of(std::uint32_t pair);
template <> __device__ inline float low_of<__nv_bfloat16>(std::uint32_t pair) { return __uint_as_float(pair << 16); }
template <> __device__ inline float high_of<__nv_bfloat16>(std::uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}
template <> __device__ inline float low_of<__half>(std::uint32_t pair) {
    return __half2float(*reinterpret_cast<const __half*>(&pair));
}
template <> __device__ inline float high_of<__half>(std::uint32_t pair) {
    pair >>= 16;
    return __half2float(*reinterpret_cast<const __half*>(&pair));
}

// exp32 of numbers up to 0 or NaN, without a branch: that of -104 is 0, too.
__device__ inline float negative_exp32(float x) { return exp32_within(x < -104.0f ? -104.0f : x); }

// Two of exp32(x), x from -1e38 to 0 or NaN, rounded to T. Not 0: what is there may be wrong in the last place.
template <class T> __device__ inline std::uint32_t exp_pair(std::uint32_t& to, float first, float second) {
#ifdef __CUDACC__
    // 2^z by the approximate unit, and two bounds between which exp32 lies: the unit is off by 2^-22 of its result, exp32 by
    // 8e-8 of its own, a product or sum by 6e-8. Where both bounds round to the same number of 16 bits so does exp32. The
    // unit gives 0 for what is subnormal in float32: SMALLEST then parts the bounds, as Inf times 0 does for x = -Inf.
    constexpr float SMALLEST = 9.183549616e-41f;  // 2^-133, bfloat16's smallest; half's is 2^-24
    float low[2], high[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float x = i == 0 ? first : second;
        float e;
        if constexpr (std::is_same<T, __half>::value) {  // its numbers lie so close that what z loses counts
            const float z = __fmul_rn(x, 1.44269504f), rest = __fmaf_rn(x, 1.92596303e-8f, __fmaf_rn(x, 1.44269504f, -z));
            asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(z));
            low[i] = __fmul_rn(e, __fmaf_rn(rest, 0.693147182f, 0.99999946f));
            high[i] = __fmaf_rn(e, __fmaf_rn(rest, 0.693147182f, 1.0000005f), 0.0f);  // no -0
        } else {
            // e^(1.00000007 x - 2e-7), below exp32 whatever was lost.
            asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(__fmaf_rn(x, 1.442695141f, -2.9e-7f)));
            low[i] = e;
            high[i] = __fmaf_rn(e, __fmaf_rn(x, -1.3e-7f, 1.00000048f), SMALLEST);
        }
    }
    to = pack<T>(high[0], high[1]);
    return to ^ pack<T>(low[0], low[1]);
#else
    to = pack<T>(exp32(first), exp32(second));
    return 0;
#endif
}

struct KeepAll {
    __device__ std::uint32_t operator()(int) const { return ~0u; }
};
// exp_pair for all N pairs, right in every place; of pair i the bits of keep(i), the others 0.
template <class T, int N, class Keep = KeepAll>
__device__ inline void exp_pairs(std::uint32_t (&to)[N], const float (&x)[2 * N], Keep keep = {}) {
    std::uint32_t unsure[N], any = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        unsure[i] = exp_pair<T>(to[i], x[2 * i], x[2 * i + 1]) & keep(i);
        to[i] &= keep(i);
        any |= unsure[i];
    }
    if (any == 0) return;
    constexpr int FOUR = 4;
#pragma unroll
    for (int i = 0; i < N; i += FOUR) {
        std::uint32_t some = 0;
#pragma unroll
        for (int j = i; j < N && j < i + FOUR; ++j) some |= unsure[j];
        if (some == 0) continue;
#pragma unroll
        for (int j = i; j < N && j < i + FOUR; ++j)
            if (unsure[j] != 0) to[j] = pack<T>(negative_exp32(x[2 * j]), negative_exp32(x[2 * j + 1])) & keep(j);
    }
}
