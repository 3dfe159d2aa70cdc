// Between float32 and the 16-bit activation types, one rounding to nearest each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline void narrow(float* y, float value) { *y = value; }
__device__ inline void narrow(__nv_bfloat16* y, float value) { *y = __float2bfloat16_rn(value); }
__device__ inline void narrow(__half* y, float value) { *y = __float2half_rn(value); }

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
