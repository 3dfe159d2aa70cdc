// Quantise float32, bfloat16 or half to MXFP4.
//
//   x       (R, K)                                Kp = K rounded up to 32, the rest of the last block counts as zero
//   codes   (R, Kp/2) uint8, low nibble first     scales  (R, Kp/32) uint8
//
// scale_rule and tie_rule are the enums of mxfp4.cuh. Elements past 6 times the scale saturate. A block that holds a
// NaN or an Inf becomes scale byte 255 with codes 0.
// A block of threads does as many blocks of the format: on a CPU a thread one, in its vectors; on a GPU two lanes share
// one, each a sector of memory of 16-bit elements, and have two, both read before either is encoded.
#include "mxfp4.cuh"
#include "stream.cuh"
#include "warp.cuh"

constexpr int THREADS = 256;
#ifdef __CUDACC__
constexpr bool PAIRS = true;  // bfloat16 elements are encoded in pairs
constexpr int LANES = 2;      // that share a block
using Codes = uint2;          // of a lane's share
#else
constexpr bool PAIRS = false;
constexpr int LANES = 1;
using Codes = uint4;
#endif
constexpr int SHARE = MX_BLOCK / LANES;

// A share's largest magnitude and codes.
template <class T> __device__ inline void widen_all(float (&values)[SHARE], const T (&share)[SHARE]) {
#pragma unroll
    for (int i = 0; i < SHARE; ++i) values[i] = widen(share[i]);
}
template <class T> __device__ inline int largest(const T (&share)[SHARE]) {
    if constexpr (PAIRS && std::is_same<T, __nv_bfloat16>::value)
        return largest_of(reinterpret_cast<const std::uint32_t(&)[SHARE / 2]>(share));
    float values[SHARE];
    widen_all(values, share);
    return largest_of(values);
}
template <class T>
__device__ inline void encode(std::uint32_t* words, const T (&share)[SHARE], int s, int tie_rule) {
    if constexpr (PAIRS && std::is_same<T, __nv_bfloat16>::value)
        if (tie_rule == TIE_EVEN) return encode_pairs(words, reinterpret_cast<const std::uint32_t(&)[SHARE / 2]>(share), s);
    float values[SHARE];
    widen_all(values, share);
    encode_all(words, values, s, tie_rule);
}

template <class T>
__device__ inline void quantize(std::uint8_t* __restrict__ codes, std::uint8_t* __restrict__ scales,
                                const T* __restrict__ x, long long R, int K, int scale_rule, int tie_rule) {
    constexpr int AHEAD = LANES, VECTORS = SHARE * sizeof(T) / 16;  // blocks of a lane, of a share
    const int blocks = (K + MX_BLOCK - 1) / MX_BLOCK, part = threadIdx.x % LANES * SHARE;
    const long long begin = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x / LANES, all = R * blocks;

    alignas(16) T read[AHEAD][SHARE];
    if (K % MX_BLOCK == 0 && static_cast<long long>(blockIdx.x + 1) * THREADS <= all) {  // no row to find, no end
        const T* in = x + begin * MX_BLOCK + part;
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
#pragma unroll
            for (int j = 0; j < VECTORS; ++j)
                reinterpret_cast<uint4*>(read[i])[j] = reinterpret_cast<const uint4*>(in + i * (THREADS / LANES * MX_BLOCK))[j];
    } else {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const long long block = begin + i * (THREADS / LANES), row = block / blocks;
            const long long first = (block - row * blocks) * MX_BLOCK + part;
            const T* in = x + row * K + first;
            if (K % 8 == 0 && block < all && K - first >= SHARE) {  // whole, aligned
#pragma unroll
                for (int j = 0; j < VECTORS; ++j)
                    reinterpret_cast<uint4*>(read[i])[j] = reinterpret_cast<const uint4*>(in)[j];
            } else {
#pragma unroll
                for (int j = 0; j < SHARE; ++j)
                    if (block < all && first + j < K) read[i][j] = in[j];
                    else narrow(&read[i][j], 0.0f);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        const long long block = begin + i * (THREADS / LANES);
        const int s = scale_of(warp_reduce<LANES>(largest(read[i]), Max()), scale_rule);
        if (block >= all) continue;
        Codes words;
        encode(reinterpret_cast<std::uint32_t*>(&words), read[i], s, tie_rule);
        write_once(reinterpret_cast<Codes*>(codes + (block * MX_BLOCK + part) / 2), words);
        if (part != 0) continue;
        scales[block] = static_cast<std::uint8_t>(s);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_fp32(std::uint8_t* codes, std::uint8_t* scales, const float* x, long long R, int K, int scale_rule,
                  int tie_rule) {
    quantize(codes, scales, x, R, K, scale_rule, tie_rule);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_bf16(std::uint8_t* codes, std::uint8_t* scales, const __nv_bfloat16* x, long long R, int K, int scale_rule,
                  int tie_rule) {
    quantize(codes, scales, x, R, K, scale_rule, tie_rule);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    quantize_fp16(std::uint8_t* codes, std::uint8_t* scales, const __half* x, long long R, int K, int scale_rule,
                  int tie_rule) {
    quantize(codes, scales, x, R, K, scale_rule, tie_rule);
}
