// Many rows: a block owns 64 features x 64 rows and stages 32 k at a time in shared memory.
#pragma once

#include "gemm.cuh"

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
            for (int r = 0; r < 4; ++r) {
                const int m = warp_m + 8 * j + 2 * t + r % 2, feature = n0 + warp_n + 16 * i + g + 8 * (r / 2);
                if (tile.has(m) && feature < N) output.write(tile, tile.y_row(m), feature, total[i][j][r]);
            }
}
