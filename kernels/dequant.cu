// Dequantise MXFP4 to float32, bfloat16 or half.
//
//   codes   (R, Kp/2) uint8, low nibble first     scales  (R, Kp/32) uint8     Kp = K rounded up to 32
//   y       (R, K)    element (r, k) = code * 2^(scale - 127), rounded once
//
// float32 and bfloat16 hold every value (subnormals included) up to 2^128 and are Inf from there on; half rounds to
// nearest even: Inf from 65520 on, subnormal or zero below 2^-14. Scale byte 255 makes the whole block NaN.
// A block of threads, as many as there are, does TILE elements. A group of a thread's is on a GPU one 16-byte store, next
// to those of its neighbours; on a CPU, where a thread's own loop becomes vectors, a block of 32. Codes and scales, whose
// rows are padded, lie one after another for all groups; y's rows do so where K is a multiple of 32, and no thread then has
// to find its own. Codes and scales are brought to the L2 cache before their turn.
#include "mxfp4.cuh"
#include "stream.cuh"

constexpr int THREADS = 256, TILE = 2048, LINE = 128;
constexpr long long SOON = 1 << 23;  // so many elements on
#ifdef __CUDACC__
template <class T> constexpr int GROUP = 16 / sizeof(T);
#else
template <class T> constexpr int GROUP = MX_BLOCK;
#endif

template <int BYTES> struct Word;  // so many codes' bytes, read at once
template <> struct Word<2> { using Type = std::uint16_t; };
template <> struct Word<4> { using Type = std::uint32_t; };
template <> struct Word<16> { using Type = uint4; };

template <class T, int COUNT>
__device__ inline void write(T* __restrict__ to, const T (&values)[COUNT], bool whole, int left) {
    if (whole) {  // and 16-byte aligned
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(values) / 16); ++i)
            write_once(reinterpret_cast<uint4*>(to) + i, reinterpret_cast<const uint4*>(values)[i]);
    } else {
        const int count = min(COUNT, left);
        for (int i = 0; i < count; ++i) to[i] = values[i];
    }
}

template <class T>
__device__ inline void dequant(T* __restrict__ y, const std::uint8_t* __restrict__ codes,
                               const std::uint8_t* __restrict__ scales, long long R, int K) {
    constexpr int group = GROUP<T>, OF_BLOCK = MX_BLOCK / group;
    using Codes = typename Word<group / 2>::Type;
    const int groups = (K + MX_BLOCK - 1) / MX_BLOCK * OF_BLOCK;  // a row, padding included
    const long long begin = static_cast<long long>(blockIdx.x) * (TILE / group), all = R * groups;
#pragma unroll 2
    for (int i = threadIdx.x; i < TILE / group; i += static_cast<int>(blockDim.x)) {
        const long long at = begin + i, soon = at + SOON / group;
        if (at >= all) break;
        if (i % (2 * LINE / group) == 0 && soon < all) bring(reinterpret_cast<const Codes*>(codes) + soon);
        if (i == 0 && soon < all) bring(scales + soon / OF_BLOCK);
        alignas(16) std::uint8_t packed[group / 2];
        reinterpret_cast<Codes&>(packed) = read_once(reinterpret_cast<const Codes*>(codes) + at);
        const std::uint8_t scale = scales[at / OF_BLOCK];
        const long long row = K % MX_BLOCK == 0 ? 0 : at / groups, k = (at - row * groups) * group;
        if (K % MX_BLOCK != 0 && k >= K) continue;  // padding
        alignas(16) T values[group];
        decode(values, packed, scale);
        write(y + row * K + k, values, K % group == 0, static_cast<int>(K - k));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    dequant_fp32(float* y, const std::uint8_t* codes, const std::uint8_t* scales, long long R, int K) {
    dequant(y, codes, scales, R, K);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    dequant_bf16(__nv_bfloat16* y, const std::uint8_t* codes, const std::uint8_t* scales, long long R, int K) {
    dequant(y, codes, scales, R, K);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    dequant_fp16(__half* y, const std::uint8_t* codes, const std::uint8_t* scales, long long R, int K) {
    dequant(y, codes, scales, R, K);
}
