// Unquantised weights of few features, as a router's, and many rows: a block owns 32 features x 32 rows, so that there are
// blocks enough, and stages of 128 k of both arrive by asynchronous copies while others are multiplied.
//
// Four warps own 16 features x 16 rows each. Every thread of the block meets at one barrier a stage, whatever the data.
// Between the barriers of stages c and c + 1
//   read        stage c, which had arrived
//   written     stage c + NARROW_STAGES - 1, over that of c - 1
#pragma once

#include "async.cuh"
#include "gemm.cuh"
#include "matrix.cuh"

constexpr int NARROW_N = 32, NARROW_M = 32, NARROW_THREADS = 128, NARROW_K = 128, NARROW_STAGES = 3;
constexpr int NARROW_PIECES = NARROW_K / 8;  // of 16 bytes, of a row of a stage

// Where a piece of a row lies, in bytes: eight rows' pieces of the same number lie in different banks.
__device__ inline int narrow_place(int row, int piece) { return (row * NARROW_PIECES + (piece ^ (row & 7))) * 16; }

template <class T>
__device__ inline void multiply_narrow(const Output<T>& output, const T* __restrict__ x, const Dense<T>& weights, const Rows& rows) {
    constexpr int NT = 2, AT_ONCE = NARROW_THREADS / NARROW_PIECES, BLOCKS = NARROW_K / MX_BLOCK;
    constexpr bool scaled_blocks = Order<T>::chunk == MX_BLOCK;
    constexpr int CHUNK_BLOCKS = Order<T>::chunk / MX_BLOCK;
    static_assert(BLOCKS % CHUNK_BLOCKS == 0);
    __shared__ __align__(16) unsigned char stages[NARROW_STAGES][(NARROW_N + NARROW_M) * NARROW_PIECES * 16];
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP, g = lane / 4, t = lane % 4;
    const int n0 = blockIdx.x * NARROW_N, N = output.N, K = weights.K;
    const int warp_n = warp / 2 * 16, warp_m = warp % 2 * 16;
    Tile tile;
    if (!locate(tile, rows, NARROW_M)) return;
    const long long first_row = static_cast<long long>(tile.problem) * N;

    // A thread's pieces of a stage: the same 8 k of every AT_ONCE-th feature and row.
    const int piece = thread % NARROW_PIECES, row = thread / NARROW_PIECES;
    const T *weights_from[NARROW_N / AT_ONCE], *tokens_from[NARROW_M / AT_ONCE];
    bool there[NARROW_M / AT_ONCE];
#pragma unroll
    for (int i = 0; i < NARROW_N / AT_ONCE; ++i)
        weights_from[i] = weights.operands + (first_row + min(n0 + row + i * AT_ONCE, N - 1)) * K + 8 * piece;
#pragma unroll
    for (int i = 0; i < NARROW_M / AT_ONCE; ++i) {
        const int m = row + i * AT_ONCE;
        there[i] = tile.has(m);  // zeros past the rows, of which nothing is written
        tokens_from[i] = x + (there[i] ? tile.x_row(m) : 0) * K + 8 * piece;
    }
    const auto load = [&](int c) {
        const bool valid = c * NARROW_K + 8 * piece < K;
        unsigned char* const to = stages[c % NARROW_STAGES];
#pragma unroll
        for (int i = 0; i < NARROW_N / AT_ONCE; ++i)
            copy_async<16>(to + narrow_place(row + i * AT_ONCE, piece), weights_from[i] + c * NARROW_K, valid);
#pragma unroll
        for (int i = 0; i < NARROW_M / AT_ONCE; ++i)
            copy_async<16>(to + narrow_place(NARROW_N + row + i * AT_ONCE, piece), tokens_from[i] + c * NARROW_K,
                           valid && there[i]);
        commit_async();
    };
    const int chunks = (K + NARROW_K - 1) / NARROW_K;
#pragma unroll
    for (int c = 0; c < NARROW_STAGES - 1; ++c) load(c);

    float total[NT][4] = {}, sum[1][NT][4];
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
        wait_async<NARROW_STAGES - 2>();
        __syncthreads();  // the stage has arrived; the one before has been read
        load(c + NARROW_STAGES - 1);
        const unsigned char* const stage = stages[c % NARROW_STAGES];
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            const int k = c * NARROW_K + block * MX_BLOCK;
            if (scaled_blocks && k >= K) break;  // zeros, but their scale may be none
            std::uint32_t a[2][1][4], tokens[NT][4];
#pragma unroll
            for (int half = 0; half < 2; ++half)
                load_matrices(a[half][0], [&](int place) {
                    return stage + narrow_place(warp_n + place % 16, 4 * block + 2 * half + place / 16);
                });
#pragma unroll
            for (int j = 0; j < NT; ++j)
                load_matrices(tokens[j], [&](int place) {
                    return stage + narrow_place(NARROW_N + warp_m + 8 * j + place % 8, 4 * block + place / 8);
                });
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                std::uint32_t columns[NT][2];
#pragma unroll
                for (int j = 0; j < NT; ++j) columns[j][0] = tokens[j][2 * half], columns[j][1] = tokens[j][2 * half + 1];
#pragma unroll
                for (int e = 0; e < 4 * NT; ++e)
                    if (half == 0 && block % CHUNK_BLOCKS == 0) sum[0][e / 4][e % 4] = 0;
                mma_step(Fragments<T, 1, NT>{sum, a[half], columns});
            }
            if ((block + 1) % CHUNK_BLOCKS != 0) continue;
            float scales[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) scales[i] = weights.scale(first_row + min(n0 + warp_n + g + 8 * i, N - 1), k);
#pragma unroll
            for (int e = 0; e < 4 * NT; ++e) total[e / 4][e % 4] = add_chunk<T>(total[e / 4][e % 4], sum[0][e / 4][e % 4], scales[e % 4 / 2]);
        }
    }
    wait_async<0>();
#pragma unroll
    for (int e = 0; e < 4 * NT; ++e) {
        const int m = warp_m + e / 4 * 8 + 2 * t + e % 2, n = n0 + warp_n + g + e % 4 / 2 * 8;
        if (tile.has(m) && n < N) output.write(tile, tile.y_row(m), n, total[e / 4][e % 4]);
    }
}
