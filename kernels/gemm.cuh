// The two paths of gemm.cu, which says what they compute and on what; both have the same bits, because both follow the
// canonical order of mma.cuh:
//   small   few rows: a block owns 16 features x 8 rows, its warps take the chunks of K in turn
//   tile    many rows: a block owns 64 features x 64 rows and stages 32 k at a time in shared memory
// In both the weights are the 16-row operand of the tensor core and the tokens the 8-column one.
#pragma once

#include "convert.cuh"
#include "mma.cuh"
#include "mxfp4.cuh"

struct Rows {
    const int* offsets;
    const int* entries;
    int problems, M, x_step, fan;
};

// The rows that one block works on.
struct Tile {
    int problem, first, count;  // first row within the problem, rows of the problem
    const Rows* rows;

    __device__ bool has(int m) const { return first + m < count; }
    __device__ int entry(int m) const { return rows->entries[rows->offsets[problem] + first + m]; }
    __device__ long long x_row(int m) const {
        if (rows->offsets != nullptr) return entry(m) / rows->fan;
        return static_cast<long long>(problem) * rows->x_step + first + m;
    }
    __device__ long long y_row(int m) const {
        if (rows->offsets != nullptr) return entry(m);
        return static_cast<long long>(problem) * rows->M + first + m;
    }
};

// Block row blockIdx.y of the grid; tiles of routed problems follow one another. False: there is nothing left to do.
__device__ inline bool locate(Tile& tile, const Rows& rows, int size) {
    tile.rows = &rows;
    if (rows.offsets == nullptr) {
        tile.problem = blockIdx.z;
        tile.first = blockIdx.y * size;
        tile.count = rows.M;
        return true;
    }
    int left = blockIdx.y;
    for (int p = 0; p < rows.problems; ++p) {
        const int count = rows.offsets[p + 1] - rows.offsets[p], tiles = (count + size - 1) / size;
        if (left < tiles) {
            tile.problem = p;
            tile.first = left * size;
            tile.count = count;
            return true;
        }
        left -= tiles;
    }
    return false;
}

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

// Weights (P, N, K) as operands of the tensor core. `row` counts through all problems.
template <class T> struct Packed {
    const std::uint8_t* codes;
    const std::uint8_t* scales;
    int K;

    __device__ float scale(long long row, int k) const { return decode_scale(scales[row * (K / MX_BLOCK) + k / MX_BLOCK]); }
    // 4 weights from k on, k a multiple of 4.
    __device__ uint2 four(long long row, int k, float scale) const {
        const std::uint32_t codes4 = *reinterpret_cast<const std::uint16_t*>(codes + row * (K / 2) + k / 2);
        return make_uint2(operand<T>(codes4 & 0xff, scale), operand<T>(codes4 >> 8, scale));
    }
    // 16 weights from k on, k a multiple of 16, into 8 words.
    __device__ void sixteen(std::uint32_t* to, long long row, int k, float scale) const {
        const uint2 codes16 = *reinterpret_cast<const uint2*>(codes + row * (K / 2) + k / 2);
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = operand<T>(((i < 4 ? codes16.x : codes16.y) >> (8 * (i % 4))) & 0xff, scale);
    }
};

template <class T> struct Dense {
    const T* operands;
    const std::uint8_t* scales;
    int K;

    __device__ float scale(long long row, int k) const {
        return scales == nullptr ? 1.0f : decode_scale(scales[row * (K / MX_BLOCK) + k / MX_BLOCK]);
    }
    __device__ uint2 four(long long row, int k, float) const { return *reinterpret_cast<const uint2*>(operands + row * K + k); }
    __device__ void sixteen(std::uint32_t* to, long long row, int k, float) const {
        const uint4* from = reinterpret_cast<const uint4*>(operands + row * K + k);
        reinterpret_cast<uint4*>(to)[0] = from[0];
        reinterpret_cast<uint4*>(to)[1] = from[1];
    }
};

// Where a problem's results go.
template <class T> struct Output {
    void* y;
    const float* bias;
    int N, float_output;

    __device__ void write(const Tile& tile, int m, int n, float total) const {
        if (!tile.has(m) || n >= N) return;
        if (bias != nullptr) total = __fadd_rn(total, bias[static_cast<long long>(tile.problem) * N + n]);
        const long long at = tile.y_row(m) * N + n;
        if (float_output) static_cast<float*>(y)[at] = total;
        else narrow(static_cast<T*>(y) + at, total);
    }
};

// ---------------------------------------------------------------------------------------------- few rows

constexpr int SMALL_WARPS = 8, SMALL_N = 16, SMALL_M = 8;

template <class T, class Weights>
__device__ inline void multiply_small(const Output<T>& output, const T* __restrict__ x, const Weights& weights,
                                      const Rows& rows) {
    constexpr int chunk = Order<T>::chunk;
    __shared__ float sums[SMALL_WARPS][SMALL_N * SMALL_M];  // a round's chunk sums, times their scale
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int n0 = blockIdx.x * SMALL_N, N = output.N, K = weights.K;
    Tile tile;
    if (!locate(tile, rows, SMALL_M)) return;

    // A lane covers 4 consecutive k of a step (4t .. 4t + 3), for weights and tokens alike: inside a step the
    // assignment of k to the fragment's slots is free.
    const int n[2] = {n0 + g, n0 + g + 8};
    const long long first_row = static_cast<long long>(tile.problem) * N;
    const T* tokens = x + (tile.has(g) ? tile.x_row(g) : 0) * K;  // a column of no row is not written: any will do

    const int chunks = (K + chunk - 1) / chunk;
    float total = 0;  // of result threadIdx.x, in the first 128 threads
    for (int first = 0; first < chunks; first += SMALL_WARPS) {
        const int begin = (first + warp) * chunk, end = min(begin + chunk, K);
        float sum[1][1][4] = {};
        float scale[2] = {0, 0};
        for (int k = begin; k < end; k += MMA_K) {
            std::uint32_t a[1][4] = {};
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (n[i] < N) {
                    scale[i] = weights.scale(first_row + n[i], k);
                    const uint2 four = weights.four(first_row + n[i], k + 4 * t, scale[i]);
                    a[0][i] = four.x;
                    a[0][i + 2] = four.y;
                }
            const uint2 four = *reinterpret_cast<const uint2*>(tokens + k + 4 * t);
            std::uint32_t b[1][2] = {{four.x, four.y}};
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
    if (threadIdx.x < SMALL_N * SMALL_M) output.write(tile, threadIdx.x % SMALL_M, n0 + threadIdx.x / SMALL_M, total);
}

// ---------------------------------------------------------------------------------------------- many rows

constexpr int TILE_N = 64, TILE_M = 64, TILE_THREADS = 128;
constexpr int STAGE_K = 32;                      // one block of codes
constexpr int PITCH = (STAGE_K + 8) / 2;         // of a shared row in 4-byte words; fragment loads hit 32 banks

template <class T, class Weights>
__device__ inline void multiply_tile(const Output<T>& output, const T* __restrict__ x, const Weights& weights,
                                     const Rows& rows) {
    constexpr int chunk = Order<T>::chunk;
    constexpr int MT = 2, NT = 4;  // a warp owns 32 features x 32 rows
    __shared__ __align__(16) std::uint32_t staged[TILE_N][PITCH], tokens[TILE_M][PITCH];
    __shared__ float row_scale[TILE_N];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int n0 = blockIdx.x * TILE_N, N = output.N, K = weights.K;
    const int warp_n = warp / 2 * 32, warp_m = warp % 2 * 32;
    Tile tile;
    if (!locate(tile, rows, TILE_M)) return;

    // Staging: two threads a row, each half a block: 16 weights and 32 bytes of tokens.
    const int stage_row = thread / 2, half = thread % 2;
    const int n = n0 + stage_row;
    const long long weight_row = static_cast<long long>(tile.problem) * N + n;
    const T* from_x = x + (tile.has(stage_row) ? tile.x_row(stage_row) : 0) * K;  // past the rows: any, see above

    float total[MT][NT][4] = {};
    for (int begin = 0; begin < K; begin += chunk) {
        float sum[MT][NT][4] = {};
        for (int k = begin; k < min(begin + chunk, K); k += STAGE_K) {
            __syncthreads();  // the stage before has been read
            {
                std::uint32_t* weights_to = &staged[stage_row][8 * half];
                const float scale = n < N ? weights.scale(weight_row, k) : 0.0f;
                if (half == 0) row_scale[stage_row] = scale;
                if (n < N) {
                    weights.sixteen(weights_to, weight_row, k + 16 * half, scale);
                } else {
#pragma unroll
                    for (int i = 0; i < 8; ++i) weights_to[i] = 0;
                }
                const uint4* from = reinterpret_cast<const uint4*>(from_x + k + 16 * half);
                uint4* to = reinterpret_cast<uint4*>(&tokens[stage_row][8 * half]);
                to[0] = from[0];
                to[1] = from[1];
            }
            __syncthreads();
#pragma unroll
            for (int step = 0; step < STAGE_K / MMA_K; ++step) {
                const int word = step * MMA_K / 2 + t;
                std::uint32_t a[MT][4], b[NT][2];
#pragma unroll
                for (int i = 0; i < MT; ++i)
#pragma unroll
                    for (int r = 0; r < 4; ++r) a[i][r] = staged[warp_n + 16 * i + g + 8 * (r & 1)][word + 4 * (r >> 1)];
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
                output.write(tile, warp_m + 8 * j + 2 * t + r % 2, n0 + warp_n + 16 * i + g + 8 * (r / 2), total[i][j][r]);
}
