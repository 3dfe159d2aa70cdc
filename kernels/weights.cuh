// Powers of 2, rounded to a 16-bit type: the weights of a softmax.
#pragma once

#include "convert.cuh"
#include "math.cuh"

// The weight of a key whose score lies z powers of 2 above its row's base: FACTOR 2^z, 0 below 2^-126, to be rounded to T.
// z is NaN or a multiple of 2^-12 up to 1. None of these numbers comes nearer to one where the rounding to T changes than
// 3.3e-7 of itself (6.6e-7 for bfloat16). So the approximate unit, off by 2^-22 at most, and a product's rounding give the
// weight that exp2_32 gives. The factor cancels with the sum of a row's weights.
template <class T> struct Weight;
template <> struct Weight<__nv_bfloat16> { static constexpr float FACTOR = 1.0f; };
template <> struct Weight<__half> { static constexpr float FACTOR = 0.951235235f; };  // with 1 some are too near
template <class T> __device__ inline float weight32(float z) {
#ifdef __CUDACC__
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(z));
#else
    const float power = z < -126.0f ? 0.0f : exp2_32(z);
#endif
    return Weight<T>::FACTOR == 1.0f ? power : __fmul_rn(power, Weight<T>::FACTOR);
}

// The weights of N pairs, rounded to T.
template <class T, int N> __device__ inline void weight_pairs(std::uint32_t (&to)[N], const float (&z)[2 * N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = pack<T>(weight32<T>(z[2 * i]), weight32<T>(z[2 * i + 1]));
}
