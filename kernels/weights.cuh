// Powers of 2, rounded to a 16-bit type: the weights of a softmax.
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

// The weight of a key whose score lies -z powers of 2 below its row's base: 2^z, 0 below 2^-126. z up to 1, or NaN.
__device__ inline float weight32(float z) { return z < -126.0f ? 0.0f : exp2_32_within(z); }

// Two of weight32, rounded to T. Not 0: what is there may be wrong in the last place.
template <class T> __device__ inline std::uint32_t weight_pair(std::uint32_t& to, float first, float second) {
#ifdef __CUDACC__
    // The approximate unit is off by 2^-22 of its result, weight32 by 4e-8 of its own. Where both bounds round to the same
    // number of 16 bits so does weight32. Below 2^-126 the unit gives 0, too.
    float low[2], high[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float e;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(i == 0 ? first : second));
        low[i] = __fmul_rn(e, 0.99999964f);
        high[i] = __fmul_rn(e, 1.00000036f);
    }
    to = pack<T>(high[0], high[1]);
    return to ^ pack<T>(low[0], low[1]);
#else
    to = pack<T>(weight32(first), weight32(second));
    return 0;
#endif
}

// weight_pair for all N pairs, right in every place.
template <class T, int N> __device__ inline void weight_pairs(std::uint32_t (&to)[N], const float (&z)[2 * N]) {
    std::uint32_t unsure[N], any = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        unsure[i] = weight_pair<T>(to[i], z[2 * i], z[2 * i + 1]);
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
            if (unsure[j] != 0) to[j] = pack<T>(weight32(z[2 * j]), weight32(z[2 * j + 1]));
    }
}
