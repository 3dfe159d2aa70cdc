// Few rows, as in decoding: a block of four warps owns 16 rows and a run of chunks. Of a chunk's scores a warp owns 32
// keys, of its output every fourth group of 8 columns. With several blocks for one tile of rows the first joins its
// chunks to the state and leaves that in slot 0, the others leave every chunk in a slot of its own, and attention_join
// joins these in ascending order.
#pragma once

#include "attention.cuh"

#include <algorithm>
#include <cstddef>

// For every row of the launch, `slots` outputs of D floats; then for every one of these its (m, l).
struct Parts {
    float* outputs;
    long long rows;
    int slots, D;

    __device__ float* output(long long row, int slot) const { return outputs + (row * slots + slot) * D; }
    __device__ float2& state(long long row, int slot) const {
        return reinterpret_cast<float2*>(outputs + rows * slots * D)[row * slots + slot];
    }
};

template <int DMAX, class Cache> struct FewShared {
    Chunk<DMAX, Cache> chunk;
    std::uint32_t weights[ROWS][P_PITCH];
    float top_of[WARPS][ROWS];
};

// Bytes of shared memory of a launch. Two blocks of large heads share one of an H100's multiprocessors: with three the last
// ones of a batch are too few to keep the memory busy.
constexpr std::size_t TWO_SHARE = 80 * 1024;
template <int DMAX, class Cache>
constexpr unsigned FEW_BYTES = std::max(sizeof(FewShared<DMAX, Cache>), DMAX == 128 && COPIED<Cache> ? TWO_SHARE : 0);

// A chunk's weights as A fragments.
__device__ inline void load_weights(std::uint32_t (&p)[CHUNK / MMA_K][4], const std::uint32_t (*weights)[P_PITCH]) {
#pragma unroll
    for (int step = 0; step < CHUNK / MMA_K; ++step)
        load_matrices(p[step], [&](int from) { return &weights[from % 16][step * MMA_K / 2 + from / 16 * 4]; });
}

// The products of a chunk's weights and values in this warp's columns; careful: of values that are no NaN or Inf.
template <int DMAX, class T, bool careful>
__device__ inline void outputs(float (&part)[DMAX / 8 / WARPS][4], const std::uint32_t (&p)[CHUNK / MMA_K][4],
                               const std::uint32_t (*values)[pitch(DMAX)], int count) {
    constexpr int COLUMNS = DMAX / 8 / WARPS;
    const int warp = threadIdx.x / WARP;
    float sums[1][COLUMNS][4] = {};
#pragma unroll
    for (int step = 0; step < CHUNK / MMA_K; ++step) {
        if (8 * warp >= count) break;
        std::uint32_t columns[COLUMNS][2];
#pragma unroll
        for (int c = 0; c < COLUMNS; c += 2) {
            std::uint32_t four[4];
            load_transposed(four, [&](int from) {
                return &values[step * MMA_K + from % 16][4 * (warp + WARPS * (c + from / 16))];
            });
#pragma unroll
            for (int r = 0; r < 4; ++r) columns[c + r / 2][r % 2] = careful ? without_specials<T>(four[r]) : four[r];
        }
        mma_step(Fragments<T, 1, COLUMNS>{sums, reinterpret_cast<const std::uint32_t (&)[1][4]>(p[step]), columns});
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int r = 0; r < 4; ++r) part[c][r] = sums[0][c][r];
}

template <int DMAX, class T, class Cache>
__device__ inline void attend_few(T* __restrict__ y, const Parts& parts, const T* __restrict__ q, const Cache& k,
                                  const Cache& v, const CacheRows& rows, const Problem& problem, int splits) {
    constexpr int COLUMNS = DMAX / 8 / WARPS;  // groups of 8 columns a warp owns
    constexpr int OWN = CHUNK / WARPS;         // keys of a warp
    auto& shared = brought<FewShared<DMAX, Cache>>();
    const auto keys = shared.chunk.keys(), values = shared.chunk.values();
    auto& weights = shared.weights;
    auto& top_of = shared.top_of;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4, D = problem.D;
    const Scores scores(problem);
    const int split = blockIdx.x % splits;
    const Tile tile = tile_at(problem, rows, blockIdx.z, blockIdx.y, blockIdx.x / splits * ROWS);
    const int begin = tile.begin(), end = tile.end(ROWS), per_split = (end - begin + splits - 1) / splits;
    const int from = begin + split * per_split, to = min(from + per_split, end);
    if (split > 0 && from >= to) return;

    std::uint32_t a[DMAX / MMA_K][1][4];
    load_queries<DMAX>(a, q, tile, tile.first);
    int low[2], high[2];
    State state[2];
    float o[COLUMNS][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int r = tile.first + g + 8 * half;
        low[half] = tile.low(r);
        high[half] = tile.high(r);
        state[half] = start_state<T>(problem, tile, r);
    }
    Chunks<DMAX, Cache> chunks(shared.chunk, k, v, rows, tile, from, to);
    for (int chunk = from; chunk < to; ++chunk) {
        chunks.keys(chunk);
        float s[1][OWN / 8][4] = {};
#pragma unroll
        for (int step = 0; step < DMAX / MMA_K; ++step) {
            if (step * MMA_K >= columns_of<DMAX>(D)) break;
            std::uint32_t both[OWN / 8][2];
#pragma unroll
            for (int j = 0; j < OWN / 8; j += 2) {
                std::uint32_t four[4];
                load_matrices(four, [&](int from) {
                    return &keys[OWN * warp + 8 * (j + from / 16) + from % 8][step * MMA_K / 2 + from / 8 % 2 * 4];
                });
#pragma unroll
                for (int r = 0; r < 4; ++r) both[j + r / 2][r % 2] = four[r];
            }
            mma_step(Fragments<T, 1, OWN / 8>{s, a[step], both});
        }
        // Element r of group j: row g + 8 (r / 2), key first_key + 8 j + r % 2.
        const int first_key = chunk * CHUNK + OWN * warp + 2 * t;
        float top[2] = {-infinity(), -infinity()};
#pragma unroll
        for (int j = 0; j < OWN / 8; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int key = first_key + 8 * j + r % 2;
                if (scores.negative) s[0][j][r] = -s[0][j][r];
                if (key < low[r / 2] || key >= high[r / 2]) s[0][j][r] = -infinity();
                top[r / 2] = Larger()(top[r / 2], s[0][j][r]);
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            top[half] = warp_reduce<4>(top[half], Larger());
            if (t == 0) top_of[warp][g + 8 * half] = top[half];
        }
        chunks.values(chunk);  // all maxima are there

#pragma unroll
        for (int half = 0; half < 2; ++half) {
            top[half] = top_of[0][g + 8 * half];
#pragma unroll
            for (int w = 1; w < WARPS; ++w) top[half] = Larger()(top[half], top_of[w][g + 8 * half]);
            top[half] = scores.base_of(top[half]);
        }
        auto& z = reinterpret_cast<float (&)[OWN / 2]>(s);
        raise(z, scores.factor, top);
        std::uint32_t mine[OWN / 4];  // of group i / 2, row g + 8 (i % 2)
        weight_pairs<T>(mine, z);
#pragma unroll
        for (int i = 0; i < OWN / 4; ++i) weights[g + 8 * (i % 2)][OWN / 2 * warp + 4 * (i / 2) + t] = mine[i];
        chunks.weights();  // all of them are there

        // A value that is NaN or Inf would reach rows that do not see it, as 0 times it. Where such a value may have
        // done so the sums are made again without them, and they are added to the rows that do see them.
        std::uint32_t p[CHUNK / MMA_K][4];
        load_weights(p, weights);
        float part[COLUMNS][4], sum[2];
        row_sums<T>(sum, p);
        outputs<DMAX, T, false>(part, p, values, columns_of<DMAX>(D));
        bool broken = false;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int r = 0; r < 4; ++r) broken = broken || !finite(part[c][r]);
        if (vote(broken) != 0) {
            outputs<DMAX, T, true>(part, p, values, columns_of<DMAX>(D));
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const int column = 8 * (warp + WARPS * c) + 2 * t + r % 2, row = g + 8 * (r / 2);
                    if (column >= D) continue;
                    part[c][r] = add_specials<T>(part[c][r], values[0], pitch(DMAX), weights[row], column,
                                                 low[r / 2] - chunk * CHUNK, high[r / 2] - chunk * CHUNK);
                }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int r = tile.first + g + 8 * half;
            if (low[half] >= (chunk + 1) * CHUNK || high[half] <= chunk * CHUNK) continue;  // the row sees none of it
            if (split > 0) {
                const long long row = tile.row(r, rows.heads);
                float* out = parts.output(row, chunk - begin);
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    const int column = 8 * (warp + WARPS * c) + 2 * t;
                    if (column >= D) continue;
                    *reinterpret_cast<float2*>(out + column) = make_float2(part[c][2 * half], part[c][2 * half + 1]);
                }
                if (warp == 0 && t == 0) parts.state(row, chunk - begin) = make_float2(top[half], sum[half]);
                continue;
            }
            const Factors by = join(state[half], top[half], sum[half]);
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) o[c][i] = joined(o[c][i], part[c][i], by);
        }
    }
    if (split > 0) return;

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int r = tile.first + g + 8 * half;
        if (r >= tile.count) continue;
        const float inverse = inverse_of(state[half].l, low[half] < high[half]);
        const long long row = tile.row(r, rows.heads);
        T* out = y + (tile.token(r) * problem.H + tile.query_head(r)) * D;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            const int column = 8 * (warp + WARPS * c) + 2 * t;
            if (column >= D) continue;
            const float first = o[c][2 * half], second = o[c][2 * half + 1];
            if (splits > 1) {
                *reinterpret_cast<float2*>(parts.output(row, 0) + column) = make_float2(first, second);
            } else {
                *reinterpret_cast<std::uint32_t*>(out + column) =
                    pack<T>(__fmul_rn(first, inverse), __fmul_rn(second, inverse));
            }
        }
        if (splits > 1 && warp == 0 && t == 0) parts.state(row, 0) = make_float2(state[half].m, state[half].l);
    }
}

// The parts of one row, a thread a column; grid (rows of the launch). Each warp by itself: 32 chunks at a time, of each
// of which a lane holds the maximum, the sum and what they are multiplied by.
template <class T>
__device__ inline void join_parts(T* __restrict__ y, const Parts& parts, const CacheRows& rows, const Problem& problem,
                                  int splits) {
    const int D = problem.D, G = problem.H / rows.heads, count = problem.T * G;
    const int column = threadIdx.x, lane = threadIdx.x % WARP;
    const long long row = blockIdx.x;
    const int r = static_cast<int>(row % count), head = static_cast<int>(row / count % rows.heads);
    const Tile tile = tile_at(problem, rows, static_cast<int>(row / count / rows.heads), head, r / ROWS * ROWS);
    const int begin = tile.begin(), chunks = tile.end(ROWS) - begin, per_split = (chunks + splits - 1) / splits;
    const int low = tile.low(r), high = tile.high(r);
    // Of the chunks that the row sees: those before and after are none of its sums.
    const int first = max(per_split, low / CHUNK - begin), end = min(chunks, (high + CHUNK - 1) / CHUNK - begin);
    const bool exists = column < D;
    State state = {parts.state(row, 0).x, parts.state(row, 0).y};
    float o = exists ? parts.output(row, 0)[column] : 0.0f;
    for (int at = first; at < end; at += WARP) {
        const int here = min(end - at, WARP);
        const auto slot = [&](int i) { return at + i; };
        float part[WARP];
#pragma unroll
        for (int i = 0; i < WARP; ++i) part[i] = exists && i < here ? parts.output(row, slot(i))[column] : 0.0f;
        float2 mine = make_float2(-infinity(), 0.0f);
        if (lane < here) mine = parts.state(row, slot(lane));
        // The largest of all chunks up to a lane's own.
        float top = mine.x;
#pragma unroll
        for (int distance = 1; distance < WARP; distance *= 2) {
            const float other = shuffle(top, max(lane - distance, 0));
            if (lane >= distance) top = Larger()(other, top);
        }
        const float before = shuffle(top, max(lane - 1, 0));
        const Factors by = factors_of(lane > 0 ? Larger()(state.m, before) : state.m, mine.x);
        state.m = Larger()(state.m, shuffle(top, WARP - 1));
#pragma unroll
        for (int i = 0; i < WARP; ++i) {
            const Factors now = {shuffle(by.kept, i), shuffle(by.joined, i)};
            const float sum = shuffle(mine.y, i);
            if (i < here) {
                o = joined(o, part[i], now);
                state.l = joined(state.l, sum, now);
            }
        }
    }
    if (!exists) return;
    const float inverse = inverse_of(state.l, low < high);
    narrow(y + (tile.token(r) * problem.H + tile.query_head(r)) * D + column, __fmul_rn(o, inverse));
}
