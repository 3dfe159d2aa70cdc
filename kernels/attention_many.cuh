// Many rows, as in prefill: a block of four warps owns 64 rows, a warp 16 of them with all keys of a chunk and all
// columns of the output.
#pragma once

#include "attention.cuh"

template <int DMAX, class Cache> struct ManyShared {
    Chunk<DMAX, Cache> chunk;
    std::uint32_t weights[WARPS][ROWS][P_PITCH];  // of a careful pass
    int broken;
};

// Weights p of 16 rows and a chunk's keys from their scores, and the base of either row. Element r of group j: row
// g + 8 (r / 2), key `first` + 8 j + r % 2; where not masked all are seen.
template <class T, bool masked>
__device__ inline void weigh(std::uint32_t (&p)[CHUNK / MMA_K][4], float (&top)[2], float (&s)[CHUNK / 8][4], const Scores& scores,
                             int first, const int (&low)[2], const int (&high)[2]) {
#pragma unroll
    for (int j = 0; j < CHUNK / 8; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int key = first + 8 * j + r % 2;
            if (scores.negative) s[j][r] = -s[j][r];
            if (masked && (key < low[r / 2] || key >= high[r / 2])) s[j][r] = -infinity();
            top[r / 2] = Larger()(top[r / 2], s[j][r]);
        }
#pragma unroll
    for (int half = 0; half < 2; ++half) top[half] = scores.base_of(warp_reduce<4>(top[half], Larger()));
    auto& z = reinterpret_cast<float (&)[CHUNK / 2]>(s);
    raise(z, scores.factor, top);
    weight_pairs<T>(reinterpret_cast<std::uint32_t (&)[CHUNK / 4]>(p), z);
}

// o of 16 rows joined by a chunk's weights times values; some: of the rows that see it, careful: values that are NaN or
// Inf left out of the products and added to the rows that see them.
template <int DMAX, class T, bool some, bool careful>
__device__ inline void add_chunk(float (&o)[DMAX / 8][4], const std::uint32_t (&p)[CHUNK / MMA_K][4],
                                 const std::uint32_t (*values)[pitch(DMAX)], const std::uint32_t (*weights)[P_PITCH],
                                 const Factors (&by)[2], const bool (&joins)[2], const int (&low)[2],
                                 const int (&high)[2], int first_key, int count) {
    constexpr int COLUMNS = DMAX / 8, SOME = 4;  // groups of 8 columns; at once
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int c = 0; c < COLUMNS; c += SOME) {
        if (8 * c >= count) break;
        float part[1][SOME][4] = {};
#pragma unroll
        for (int step = 0; step < CHUNK / MMA_K; ++step) {
            std::uint32_t columns[SOME][2];
#pragma unroll
            for (int j = 0; j < SOME; j += 2) {
                std::uint32_t four[4];
                load_transposed(four, [&](int from) {
                    return &values[step * MMA_K + from % 16][4 * (c + j) + from / 16 * 4];
                });
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    columns[j + r / 2][r % 2] = careful ? without_specials<T>(four[r]) : four[r];
            }
            mma_step(Fragments<T, 1, SOME>{part, reinterpret_cast<const std::uint32_t (&)[1][4]>(p[step]), columns});
        }
#pragma unroll
        for (int j = 0; j < SOME; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                float add = part[0][j][r];
                if constexpr (careful)
                    add = add_specials<T>(add, values[0], pitch(DMAX), weights[g + 8 * (r / 2)],
                                          8 * (c + j) + 2 * t + r % 2, low[r / 2] - first_key, high[r / 2] - first_key);
                const float both = joined(o[c + j][r], add, by[r / 2]);
                o[c + j][r] = !some || joins[r / 2] ? both : o[c + j][r];
            }
    }
}

template <int DMAX, class T, class Cache>
__device__ inline void attend_many(T* __restrict__ y, const T* __restrict__ q, const Cache& k, const Cache& v,
                                   const CacheRows& rows, const Problem& problem) {
    constexpr int STEPS = DMAX / MMA_K, COLUMNS = DMAX / 8;  // groups of 8 columns
    auto& [brought_chunk, weights, broken] = brought<ManyShared<DMAX, Cache>>();
    const auto keys = brought_chunk.keys(), values = brought_chunk.values();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4, D = problem.D;
    // The last rows see most keys: their blocks begin first.
    const int first_row = (gridDim.x - 1 - blockIdx.x) * WARPS * ROWS;
    const Tile tile = tile_at(problem, rows, blockIdx.z, blockIdx.y, first_row);
    const int begin = tile.begin(), end = tile.end(WARPS * ROWS), mine = tile.first + warp * ROWS;
    const bool idle = mine >= tile.count;
    const int last = min(mine + ROWS, tile.count) - 1;
    // Keys that all rows of the warp see, and those that any does.
    const int all_low = tile.low(last), all_high = mine + ROWS > tile.count ? 0 : tile.high(mine);
    const int any_low = tile.low(mine), any_high = idle ? 0 : tile.high(last);

    const Scores scores(problem);
    std::uint32_t a[STEPS][1][4];
    load_queries<DMAX>(a, q, tile, mine);
    int low[2], high[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        low[half] = tile.low(mine + g + 8 * half);
        high[half] = tile.high(mine + g + 8 * half);
    }
    State state[2];
    float o[COLUMNS][4];
    // A value that is NaN or Inf would reach rows that do not see it, as 0 times it. If a result may hold such a sum,
    // all are made again with such values left out of the products and added to the rows that do see them.
    for (bool careful = false;; careful = true) {
        if (threadIdx.x == 0) broken = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int r = mine + g + 8 * half;
            state[half] = start_state<T>(problem, tile, min(r, tile.count - 1));
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int r = 0; r < 4; ++r) o[c][r] = 0.0f;
        Chunks<DMAX, Cache> chunks(brought_chunk, k, v, rows, tile, begin, end);
        for (int chunk = begin; chunk < end; ++chunk) {
            const int first_key = chunk * CHUNK;
            const bool takes_part = any_low < first_key + CHUNK && any_high > first_key;
            const bool masked = all_low > first_key || all_high < first_key + CHUNK;
            chunks.keys(chunk);
            std::uint32_t p[CHUNK / MMA_K][4];
            float top[2] = {-infinity(), -infinity()}, sum[2];
            float s[1][CHUNK / 8][4];
            if (takes_part) {
#pragma unroll
                for (int j = 0; j < CHUNK / 8; ++j)
#pragma unroll
                    for (int r = 0; r < 4; ++r) s[0][j][r] = 0.0f;
#pragma unroll
                for (int step = 0; step < STEPS; ++step) {
                    if (step * MMA_K >= columns_of<DMAX>(D)) break;
                    constexpr int SOME = 4;  // groups of 8 keys at once
#pragma unroll
                    for (int c = 0; c < CHUNK / 8; c += SOME) {
                        std::uint32_t columns[SOME][2];
#pragma unroll
                        for (int j = 0; j < SOME; j += 2) {
                            std::uint32_t four[4];
                            load_matrices(four, [&](int from) {
                                return &keys[8 * (c + j + from / 16) + from % 8][step * MMA_K / 2 + from / 8 % 2 * 4];
                            });
#pragma unroll
                            for (int r = 0; r < 4; ++r) columns[j + r / 2][r % 2] = four[r];
                        }
                        mma_step(Fragments<T, 1, SOME>{reinterpret_cast<float (&)[1][SOME][4]>(s[0][c]), a[step], columns});
                    }
                }
            }
            chunks.values(chunk);
            if (takes_part) {
                if (masked || careful)
                    weigh<T, true>(p, top, s[0], scores, first_key + 2 * t, low, high);
                else
                    weigh<T, false>(p, top, s[0], scores, 0, low, high);
                row_sums<T>(sum, p);
            }
            if (careful && takes_part)
#pragma unroll
                for (int i = 0; i < CHUNK / 4; ++i) weights[warp][g + 8 * (i % 2)][4 * (i / 2) + t] = p[i / 4][i % 4];
            chunks.weights();
            if (!takes_part) continue;
            const int count = columns_of<DMAX>(D);
            Factors by[2] = {};
            bool joins[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                joins[half] = low[half] < first_key + CHUNK && high[half] > first_key;
                if (joins[half]) by[half] = join(state[half], top[half], sum[half]);
            }
            if (careful)
                add_chunk<DMAX, T, true, true>(o, p, values, weights[warp], by, joins, low, high, first_key, count);
            else if (masked)
                add_chunk<DMAX, T, true, false>(o, p, values, weights[warp], by, joins, low, high, first_key, count);
            else
                add_chunk<DMAX, T, false, false>(o, p, values, weights[warp], by, joins, low, high, first_key, count);
        }
        if (careful) break;
        bool all_finite = true;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int r = 0; r < 4; ++r) all_finite = all_finite && (8 * c >= D || finite(o[c][r]));
        __syncthreads();
        if (!all_finite) broken = 1;
        __syncthreads();
        if (broken == 0) break;
        __syncthreads();
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int r = mine + g + 8 * half;
        if (r >= tile.count) continue;
        const float inverse = inverse_of(state[half].l, low[half] < high[half]);
        T* out = y + (tile.token(r) * problem.H + tile.query_head(r)) * D;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            const int column = 8 * c + 2 * t;
            if (column >= D) break;
            *reinterpret_cast<std::uint32_t*>(out + column) =
                pack<T>(__fmul_rn(o[c][2 * half], inverse), __fmul_rn(o[c][2 * half + 1], inverse));
        }
    }
}
