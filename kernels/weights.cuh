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

// Numbers of which it is known that they are off by less than `OFF` units in the last place, or not, are rounded to T in pairs,
// and found out whether the exact numbers would be rounded to the same.
#ifdef __CUDACC__
template <class T> struct Rounding;
template <> struct Rounding<__nv_bfloat16> {  // half-way lie those whose lower 16 bits are 0x8000
    std::uint32_t nearest = 0xffffffffu;      // of two halves: the smallest distance from there, counted from OFF before it
    __device__ std::uint32_t pair(float first, float second, std::uint32_t off) {
        const std::uint32_t lower = __byte_perm(__float_as_uint(first), __float_as_uint(second), 0x5410);
        nearest = __viaddmin_u16x2(lower, 0x80008000u + 0x10001u * off, nearest);
        return pack<__nv_bfloat16>(first, second);
    }
    __device__ bool sure(std::uint32_t off) const { return min(nearest & 0xffffu, nearest >> 16) > 2 * off; }
};
template <> struct Rounding<__half> {
    std::uint32_t differ = 0;
    __device__ std::uint32_t pair(float first, float second, std::uint32_t off) {
        const float by = static_cast<float>(off) * 1.2e-7f;
        const std::uint32_t high = pack<__half>(__fmaf_rn(first, by, first), __fmaf_rn(second, by, second));
        differ |= high ^ pack<__half>(__fmaf_rn(first, -by, first), __fmaf_rn(second, -by, second));
        return high;
    }
    __device__ bool sure(std::uint32_t) const { return differ == 0; }
};
// The approximate unit and weight32 were compared for all z on an H100: at most 2.9 units apart; by its description 4.7.
#if __CUDA_ARCH__ == 900
constexpr std::uint32_t EXP2_OFF = 3;
#else
constexpr std::uint32_t EXP2_OFF = 5;
#endif
#endif

// weight32 of all N pairs, rounded to T.
template <class T, int N> __device__ inline void weight_pairs(std::uint32_t (&to)[N], const float (&z)[2 * N]) {
#ifdef __CUDACC__
    const auto approximate = [](float z) {  // 0 below 2^-126, too
        float e;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(z));
        return e;
    };
    Rounding<T> all;
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = all.pair(approximate(z[2 * i]), approximate(z[2 * i + 1]), EXP2_OFF);
    if (all.sure(EXP2_OFF)) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        Rounding<T> one;
        one.pair(approximate(z[2 * i]), approximate(z[2 * i + 1]), EXP2_OFF);
        if (!one.sure(EXP2_OFF)) to[i] = pack<T>(weight32(z[2 * i]), weight32(z[2 * i + 1]));
    }
#else
    for (int i = 0; i < N; ++i) to[i] = pack<T>(weight32(z[2 * i]), weight32(z[2 * i + 1]));
#endif
}
