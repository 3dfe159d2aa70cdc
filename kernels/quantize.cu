// Quantise float32, bfloat16 or half to MXFP4.
//
//   x       (R, K)                                Kp = K rounded up to 32, the rest of the last block counts as zero
//   codes   (R, Kp/2) uint8, low nibble first     scales  (R, Kp/32) uint8
//
// scale_rule and tie_rule are the enums of mxfp4.cuh. Elements past 6 times the scale saturate. A block that holds a
// NaN or an Inf becomes scale byte 255 with codes 0. One thread does one block.
#include "convert.cuh"
#include "mxfp4.cuh"

template <class T>
__device__ inline void quantize(std::uint8_t* __restrict__ codes, std::uint8_t* __restrict__ scales,
                                const T* __restrict__ x, long long R, int K, int scale_rule, int tie_rule) {
    const int blocks = (K + MX_BLOCK - 1) / MX_BLOCK;
    const long long block = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long row = block / blocks;
    if (row >= R) return;
    const int first = static_cast<int>(block % blocks) * MX_BLOCK;
    const T* in = x + row * K + first;

    float values[MX_BLOCK];
    if (K % 8 == 0 && K - first >= MX_BLOCK) {  // whole and 16-byte aligned
        constexpr int per_vector = 16 / sizeof(T);
#pragma unroll
        for (int i = 0; i < MX_BLOCK / per_vector; ++i) {
            const uint4 vector = reinterpret_cast<const uint4*>(in)[i];
            const T* elements = reinterpret_cast<const T*>(&vector);
#pragma unroll
            for (int j = 0; j < per_vector; ++j) values[i * per_vector + j] = widen(elements[j]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < MX_BLOCK; ++i) values[i] = first + i < K ? widen(in[i]) : 0.0f;
    }

    const auto [packed, s] = encode_block(values, scale_rule, tie_rule);
    reinterpret_cast<uint4*>(codes)[block] = packed;
    scales[block] = static_cast<std::uint8_t>(s);
}

extern "C" __global__ void quantize_fp32(std::uint8_t* codes, std::uint8_t* scales, const float* x, long long R, int K,
                                         int scale_rule, int tie_rule) {
    quantize(codes, scales, x, R, K, scale_rule, tie_rule);
}
extern "C" __global__ void quantize_bf16(std::uint8_t* codes, std::uint8_t* scales, const __nv_bfloat16* x, long long R, int K,
                                         int scale_rule, int tie_rule) {
    quantize(codes, scales, x, R, K, scale_rule, tie_rule);
}
extern "C" __global__ void quantize_fp16(std::uint8_t* codes, std::uint8_t* scales, const __half* x, long long R, int K,
                                         int scale_rule, int tie_rule) {
    quantize(codes, scales, x, R, K, scale_rule, tie_rule);
}
