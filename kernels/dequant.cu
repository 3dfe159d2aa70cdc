// Dequantise MXFP4 to float32, bfloat16 or half.
//
//   codes   (R, Kp/2) uint8, low nibble first     scales  (R, Kp/32) uint8     Kp = K rounded up to 32
//   y       (R, K)    element (r, k) = code * 2^(scale - 127), rounded once
//
// float32 and bfloat16 hold every value (subnormals included) up to 2^128 and are Inf from there on; half rounds to
// nearest even: Inf from 65520 on, subnormal or zero below 2^-14. Scale byte 255 makes the whole block NaN.
// One thread writes 8 elements: one 4-byte load, one or two 16-byte stores where the row allows it.
#include "convert.cuh"
#include "mxfp4.cuh"

constexpr int PER_THREAD = 8;

template <class T>
__device__ inline void dequant(T* __restrict__ y, const std::uint8_t* __restrict__ codes,
                               const std::uint8_t* __restrict__ scales, long long R, int K) {
    const int blocks = (K + MX_BLOCK - 1) / MX_BLOCK;                  // a row
    const int groups = (K + PER_THREAD - 1) / PER_THREAD;              // threads a row
    const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long row = thread / groups;
    if (row >= R) return;
    const int k = static_cast<int>(thread % groups) * PER_THREAD;

    const std::uint32_t packed =
        *reinterpret_cast<const std::uint32_t*>(codes + row * blocks * (MX_BLOCK / 2) + k / 2);
    const float scale = decode_scale(scales[row * blocks + k / MX_BLOCK]);

    alignas(16) T values[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD / 2; ++i) {
        const std::uint32_t pair = scale_pair(decode_byte<__nv_bfloat16>((packed >> (8 * i)) & 0xff), scale);
        narrow(&values[2 * i], __uint_as_float(pair << 16));
        narrow(&values[2 * i + 1], __uint_as_float(pair & 0xffff0000u));
    }

    T* out = y + row * K + k;
    if (K % PER_THREAD == 0) {  // then every group is whole and 16-byte aligned
        constexpr int vectors = sizeof(values) / 16;
#pragma unroll
        for (int i = 0; i < vectors; ++i) reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(values)[i];
    } else {
        const int count = min(PER_THREAD, K - k);
        for (int i = 0; i < count; ++i) out[i] = values[i];
    }
}

extern "C" __global__ void dequant_fp32(float* y, const std::uint8_t* codes, const std::uint8_t* scales, long long R,
                                        int K) {
    dequant(y, codes, scales, R, K);
}
extern "C" __global__ void dequant_bf16(__nv_bfloat16* y, const std::uint8_t* codes, const std::uint8_t* scales, long long R,
                                        int K) {
    dequant(y, codes, scales, R, K);
}
extern "C" __global__ void dequant_fp16(__half* y, const std::uint8_t* codes, const std::uint8_t* scales, long long R,
                                        int K) {
    dequant(y, codes, scales, R, K);
}
