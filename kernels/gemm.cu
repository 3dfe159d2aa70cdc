// W4A16 GEMM: y = x W^T (+ bias), W in MXFP4, float32 accumulation in the canonical order of mma.cuh.
//
//   x      (M, K) bfloat16 or half, 16-byte aligned      codes  (N, K/2) uint8, low nibble first
//   bias   (N) float32 or null                           scales (N, K/32) uint8
//   y      (M, N) float32, or the type of x              K a multiple of 32; any M and N
//
// Two paths with the same bits, because both follow the canonical order:
//   gemm_small   few tokens: a block owns 16 features x 8 tokens, its warps take the chunks of K in turn
//   gemm_tile    many tokens: a block owns 64 features x 64 tokens and stages 32 k at a time in shared memory
// In both the weights are the 16-row operand of the tensor core and the tokens the 8-column one.
#include "mma.cuh"
#include "mxfp4.cuh"

__device__ inline void round_to(__nv_bfloat16* y, float value) { *y = __float2bfloat16_rn(value); }
__device__ inline void round_to(__half* y, float value) { *y = __float2half_rn(value); }

// A chunk's sum joins the total: the declared order's only other rounding.
template <class T> __device__ inline float add_chunk(float total, float chunk_sum, float scale) {
    return __fadd_rn(total, Order<T>::scale_operand ? chunk_sum : __fmul_rn(chunk_sum, scale));
}

// The two codes of a byte as an operand. A half operand carries no scale; where code times scale is past float32's
// range it is Inf like every other decoded weight, so that both paths and dtypes agree with the format's decoder.
template <class T> __device__ inline std::uint32_t operand(std::uint32_t byte, float scale) {
    const std::uint32_t pair = decode_byte<T>(byte);
    if constexpr (Order<T>::scale_operand) {
        return scale_pair(pair, scale);
    } else {
        if (!(scale >= 0x1p126f)) return pair;
        const std::uint32_t scaled = scale_pair(decode_byte<__nv_bfloat16>(byte), scale);
        std::uint32_t result = pair;
        if ((scaled & 0x00007fffu) == 0x00007f80u) result = (result & 0xffff8000u) | 0x00007c00u;
        if ((scaled & 0x7fff0000u) == 0x7f800000u) result = (result & 0x8000ffffu) | 0x7c000000u;
        return result;
    }
}

template <class T>
__device__ inline void write(void* y, const float* bias, float total, int m, int n, int M, int N, int float_output) {
    if (m >= M || n >= N) return;
    if (bias != nullptr) total = __fadd_rn(total, bias[n]);
    const long long at = static_cast<long long>(m) * N + n;
    if (float_output) static_cast<float*>(y)[at] = total;
    else round_to(static_cast<T*>(y) + at, total);
}

// ---------------------------------------------------------------------------------------------- few tokens

constexpr int SMALL_WARPS = 8, SMALL_N = 16, SMALL_M = 8;

template <class T>
__device__ inline void gemm_small(void* y, const T* __restrict__ x, const std::uint8_t* __restrict__ codes,
                                  const std::uint8_t* __restrict__ scales, const float* __restrict__ bias, int M, int N,
                                  int K, int float_output) {
    constexpr int chunk = Order<T>::chunk;
    __shared__ float sums[SMALL_WARPS][SMALL_N * SMALL_M];  // a round's chunk sums, times their scale
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int n0 = blockIdx.x * SMALL_N, m0 = blockIdx.y * SMALL_M;

    // A lane covers 4 consecutive k of a step (4t .. 4t + 3), for weights and tokens alike: inside a step the
    // assignment of k to the fragment's slots is free.
    const int n[2] = {n0 + g, n0 + g + 8}, m = m0 + g;
    const long long row[2] = {n[0] < N ? n[0] : 0, n[1] < N ? n[1] : 0};
    const T* tokens = x + static_cast<long long>(m < M ? m : 0) * K;

    const int chunks = (K + chunk - 1) / chunk;
    float total = 0;  // of result threadIdx.x, in the first 128 threads
    for (int first = 0; first < chunks; first += SMALL_WARPS) {
        const int begin = (first + warp) * chunk, end = min(begin + chunk, K);
        float sum[1][1][4] = {};
        float scale[2] = {0, 0};
        for (int k = begin; k < end; k += MMA_K) {
            std::uint32_t a[1][4], b[1][2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                scale[i] = decode_scale(n[i] < N ? scales[row[i] * (K / MX_BLOCK) + k / MX_BLOCK] : 0);
                const std::uint32_t four =
                    n[i] < N ? *reinterpret_cast<const std::uint16_t*>(codes + row[i] * (K / 2) + k / 2 + 2 * t) : 0;
                a[0][i] = operand<T>(four & 0xff, scale[i]);
                a[0][i + 2] = operand<T>(four >> 8, scale[i]);
            }
            const uint2 four = m < M ? *reinterpret_cast<const uint2*>(tokens + k + 4 * t) : make_uint2(0, 0);
            b[0][0] = four.x;
            b[0][1] = four.y;
            mma_step(Fragments<T, 1, 1>{sum, a, b});
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            sums[warp][(g + 8 * (i / 2)) * SMALL_M + 2 * t + i % 2] = add_chunk<T>(0.0f, sum[0][0][i], scale[i / 2]);
        __syncthreads();
        if (threadIdx.x < SMALL_N * SMALL_M)
            for (int w = 0; w < min(SMALL_WARPS, chunks - first); ++w) total = __fadd_rn(total, sums[w][threadIdx.x]);
        __syncthreads();
    }
    if (threadIdx.x < SMALL_N * SMALL_M)
        write<T>(y, bias, total, m0 + threadIdx.x % SMALL_M, n0 + threadIdx.x / SMALL_M, M, N, float_output);
}

// ---------------------------------------------------------------------------------------------- many tokens

constexpr int TILE_N = 64, TILE_M = 64, TILE_THREADS = 128;
constexpr int STAGE_K = 32;                      // one block of codes
constexpr int PITCH = (STAGE_K + 8) / 2;         // of a shared row in 4-byte words; fragment loads hit 32 banks

template <class T>
__device__ inline void gemm_tile(void* y, const T* __restrict__ x, const std::uint8_t* __restrict__ codes,
                                 const std::uint8_t* __restrict__ scales, const float* __restrict__ bias, int M, int N,
                                 int K, int float_output) {
    constexpr int chunk = Order<T>::chunk;
    constexpr int MT = 2, NT = 4;  // a warp owns 32 features x 32 tokens
    __shared__ __align__(16) std::uint32_t weights[TILE_N][PITCH], tokens[TILE_M][PITCH];
    __shared__ float row_scale[TILE_N];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int n0 = blockIdx.x * TILE_N, m0 = blockIdx.y * TILE_M;
    const int warp_n = warp / 2 * 32, warp_m = warp % 2 * 32;

    // Staging: two threads a row, each half a block: 8 bytes of codes, 32 bytes of tokens.
    const int stage_row = thread / 2, half = thread % 2;
    const int n = n0 + stage_row, m = m0 + stage_row;

    float total[MT][NT][4] = {};
    for (int begin = 0; begin < K; begin += chunk) {
        float sum[MT][NT][4] = {};
        for (int k = begin; k < min(begin + chunk, K); k += STAGE_K) {
            __syncthreads();  // the stage before has been read
            {
                const uint2 packed =
                    n < N ? *reinterpret_cast<const uint2*>(codes + static_cast<long long>(n) * (K / 2) + k / 2 + 8 * half)
                          : make_uint2(0, 0);
                const float scale = decode_scale(n < N ? scales[static_cast<long long>(n) * (K / MX_BLOCK) + k / MX_BLOCK] : 0);
                if (half == 0) row_scale[stage_row] = scale;
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    weights[stage_row][8 * half + i] = operand<T>(((i < 4 ? packed.x : packed.y) >> (8 * (i % 4))) & 0xff, scale);
                const uint4 zero = make_uint4(0, 0, 0, 0);
                const uint4* from = reinterpret_cast<const uint4*>(x + static_cast<long long>(m) * K + k + 16 * half);
                uint4* to = reinterpret_cast<uint4*>(&tokens[stage_row][8 * half]);
                to[0] = m < M ? from[0] : zero;
                to[1] = m < M ? from[1] : zero;
            }
            __syncthreads();
#pragma unroll
            for (int step = 0; step < STAGE_K / MMA_K; ++step) {
                const int word = step * MMA_K / 2 + t;
                std::uint32_t a[MT][4], b[NT][2];
#pragma unroll
                for (int i = 0; i < MT; ++i)
#pragma unroll
                    for (int r = 0; r < 4; ++r) a[i][r] = weights[warp_n + 16 * i + g + 8 * (r & 1)][word + 4 * (r >> 1)];
#pragma unroll
                for (int j = 0; j < NT; ++j)
#pragma unroll
                    for (int r = 0; r < 2; ++r) b[j][r] = tokens[warp_m + 8 * j + g][word + 4 * r];
                mma_step(Fragments<T, MT, NT>{sum, a, b});
            }
        }
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const float scale = row_scale[warp_n + 16 * i + g + 8 * (r / 2)];
#pragma unroll
                for (int j = 0; j < NT; ++j) total[i][j][r] = add_chunk<T>(total[i][j][r], sum[i][j][r], scale);
            }
    }
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r)
                write<T>(y, bias, total[i][j][r], m0 + warp_m + 8 * j + 2 * t + r % 2, n0 + warp_n + 16 * i + g + 8 * (r / 2),
                         M, N, float_output);
}

// ---------------------------------------------------------------------------------------------- entry points

extern "C" __global__ void __launch_bounds__(SMALL_WARPS * 32)
    gemm_small_bf16(void* y, const __nv_bfloat16* x, const std::uint8_t* codes, const std::uint8_t* scales, const float* bias,
                    int M, int N, int K, int float_output) {
    gemm_small(y, x, codes, scales, bias, M, N, K, float_output);
}
extern "C" __global__ void __launch_bounds__(SMALL_WARPS * 32)
    gemm_small_fp16(void* y, const __half* x, const std::uint8_t* codes, const std::uint8_t* scales, const float* bias,
                    int M, int N, int K, int float_output) {
    gemm_small(y, x, codes, scales, bias, M, N, K, float_output);
}
extern "C" __global__ void __launch_bounds__(TILE_THREADS)
    gemm_tile_bf16(void* y, const __nv_bfloat16* x, const std::uint8_t* codes, const std::uint8_t* scales, const float* bias,
                    int M, int N, int K, int float_output) {
    gemm_tile(y, x, codes, scales, bias, M, N, K, float_output);
}
extern "C" __global__ void __launch_bounds__(TILE_THREADS)
    gemm_tile_fp16(void* y, const __half* x, const std::uint8_t* codes, const std::uint8_t* scales, const float* bias,
                    int M, int N, int K, int float_output) {
    gemm_tile(y, x, codes, scales, bias, M, N, K, float_output);
}
