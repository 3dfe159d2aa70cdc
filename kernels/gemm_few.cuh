// Few rows: a block owns 16 features x 8 rows, its warps take the chunks of K in turn.
#pragma once

#include "gemm.cuh"

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
