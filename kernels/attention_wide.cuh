// Many rows on Hopper, for heads of 64 or 128 and caches of 16 bits: a block of two warpgroups owns 128 rows, a warpgroup
// 64 of them with all keys of a chunk and all columns of the output.
//
// While a warpgroup turns the scores of chunk c into weights the tensor core multiplies those of c - 1 by their values;
// while it joins that to the output, queries by the keys of c + 1. All threads copy: four chunks lie in shared memory. In
// chunk c, between its weights and the next scores, every warp of the block arrives at a meeting and waits for the others
// to have arrived in chunk c - 1, so that the warpgroups may be up to a chunk apart. Whoever has arrived in chunk c
//   has copied keys of c + 2 and values of c + 1, and read keys of c and values of c - 1
// and whoever has waited in chunk c reads keys of c + 1 and values of c, and writes keys of c + 3 and values of c + 2
// over keys of c - 1 and values of c - 2.
#pragma once

#include "attention.cuh"
#include "wgmma.cuh"

#include <utility>

constexpr int WIDE_GROUPS = 2, WIDE_THREADS = WIDE_GROUPS * GROUP_THREADS, WIDE_ROWS = WIDE_GROUPS * GROUP_ROWS;
constexpr int WIDE_STAGES = 4;
constexpr int TILE_BYTES = CHUNK * 128;  // of 64 rows and 64 columns

template <int D> struct alignas(1024) WideShared {
    unsigned char queries[WIDE_GROUPS][D / 64 * TILE_BYTES];
    unsigned char keys[WIDE_STAGES][D / 64 * TILE_BYTES], values[WIDE_STAGES][D / 64 * TILE_BYTES];
    std::uint32_t weights[WIDE_GROUPS * WARPS][ROWS][P_PITCH];  // of a careful pass
    Meeting meeting;
    int broken;
};

// Where the 16-byte piece of a row lies in tiles of 64 columns.
__device__ inline int place(int row, int piece) { return piece / 8 * TILE_BYTES + swizzled(row, piece % 8); }

// A thread's share of chunks of keys or values on their way to shared memory; zeros past the length.
template <int D, class T> struct Loader {
    static constexpr int PIECES = D / 8, STRIDE = WIDE_THREADS / PIECES;
    static_assert(STRIDE % 8 == 0);  // the rows of a thread have their piece at the same place
    const T* values;
    const T* first;  // this thread's first piece of chunk 0, where sequences are not in pages

    __device__ Loader(const T* from, const CacheRows& rows, const Tile& tile) : values(from), first(from) {
        if (rows.table == nullptr) first += rows.at(tile.b, tile.head, threadIdx.x / PIECES) * D + threadIdx.x % PIECES * 8;
    }
    // to: where this thread's first piece goes
    template <int... i> __device__ void load_whole(unsigned char* to, int chunk, std::integer_sequence<int, i...>) const {
        const T* at = first + static_cast<long long>(chunk) * (CHUNK * D);
        (copy_async_at<i * STRIDE * 128, i * STRIDE * D * static_cast<int>(sizeof(T))>(to, at), ...);
    }
    __device__ void load_whole(unsigned char* to, int chunk) const {
        load_whole(to, chunk, std::make_integer_sequence<int, CHUNK / STRIDE>());
    }
    __device__ void load(unsigned char* to, int chunk, const CacheRows& rows, const Tile& tile) const {
        const int piece = threadIdx.x % PIECES, row = chunk * CHUNK + threadIdx.x / PIECES;
#pragma unroll 1
        for (int i = 0; i < CHUNK; i += STRIDE) {
            const bool valid = row + i < tile.length;
            const long long at = valid ? rows.at(tile.b, tile.head, row + i) * D + piece * 8 : 0;
            copy_async<16>(to + i * 128, values + at, valid);
        }
    }
};

// Weights of 16 rows a warp and 64 keys from their scores: word i of row g + 8 (i % 2), keys 8 (i / 2) + 2t and the next.
// first: the key of s[0][0]; where not masked all are seen. top: the largest score of either row.
template <class T, bool masked>
__device__ inline void weigh_wide(std::uint32_t (&p)[CHUNK / 4], float (&top)[2], float (&s)[CHUNK / 8][4], float scale,
                                  int first, const int (&low)[2], const int (&high)[2]) {
    std::uint32_t seen = 0;  // bit 4 j + r
    if (masked) {
#pragma unroll
        for (int j = 0; j < CHUNK / 8; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int key = first + 8 * j + r % 2;
                if (key >= low[r / 2] && key < high[r / 2]) seen |= 1u << (4 * j + r);
            }
    }
    const auto sees = [&](int j, int r) { return !masked || (seen >> (4 * j + r) & 1) != 0; };
    top[0] = top[1] = -infinity();
#pragma unroll
    for (int j = 0; j < CHUNK / 8; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            s[j][r] = __fmul_rn(s[j][r], scale);
            if (sees(j, r)) top[r / 2] = Larger()(top[r / 2], s[j][r]);
        }
    float zero[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        top[half] = warp_reduce<4>(top[half], Larger());
        zero[half] = base(top[half]);
    }
#pragma unroll
    for (int j = 0; j < CHUNK / 8; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            s[j][r] = __fsub_rn(s[j][r], zero[r / 2]);
            if (masked) s[j][r] = sees(j, r) ? Larger()(s[j][r], -1000.0f) : 0.0f;
        }
    exp_pairs<T>(p, reinterpret_cast<const float (&)[CHUNK / 2]>(s));
    if (masked) {
#pragma unroll
        for (int i = 0; i < CHUNK / 4; ++i)
            p[i] &= (seen >> (2 * i) & 1 ? 0xffffu : 0) | (seen >> (2 * i + 1) & 1 ? 0xffff0000u : 0);
    }
}

// The sum of the weights of one row in the declared order: lanes of t below 2 of a quad for row g, the others for g + 8.
template <class T> __device__ inline float add_up_wide(const std::uint32_t (&p)[CHUNK / 4]) {
    const int lane = threadIdx.x % WARP;
    const bool second = lane & 2;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < CHUNK / 16; ++w) {
        float each[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const std::uint32_t one = p[4 * w + half], two = p[4 * w + 2 + half];
            each[half] = __fadd_rn(__fadd_rn(low_of<T>(one), high_of<T>(one)), __fadd_rn(low_of<T>(two), high_of<T>(two)));
        }
        float mine = second ? each[1] : each[0];
        mine = __fadd_rn(mine, shuffle(second ? each[0] : each[1], lane ^ 2));
        mine = __fadd_rn(mine, shuffle(mine, lane ^ 1));
        total = w == 0 ? mine : __fadd_rn(total, mine);
    }
    return total;
}

// add_specials of values in tiles.
template <class T>
__device__ OUT_OF_LINE float add_specials_wide(float sum, const unsigned char* values, const std::uint32_t* weights, int column,
                                               int low, int high) {
    for (int n = max(low, 0); n < min(high, CHUNK); ++n) {
        const T value = reinterpret_cast<const T*>(values + place(n, column / 8))[column % 8];
        if (!special<T>(*reinterpret_cast<const std::uint16_t*>(&value))) continue;
        sum = __fadd_rn(sum, __fmul_rn(widen(reinterpret_cast<const T*>(weights)[n]), widen(value)));
    }
    return sum;
}

// The state of rows g and g + 8: m of both, l of the row that add_up_wide sums in this lane.
struct WideState {
    float m[2], l;
};
// `join` of both rows, those that see nothing of the chunk left as they are; the quad shares its exponentials.
__device__ inline void join_wide(WideState& state, Factors (&by)[2], const float (&top)[2], float sum, const bool (&joins)[2]) {
    const int lane = threadIdx.x % WARP;
    const bool second = lane & 2;
    float difference[2], same[2];
    bool keeps[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float largest = Larger()(state.m[half], top[half]), rest = __fsub_rn(largest, base(largest));
        keeps[half] = state.m[half] == largest;
        same[half] = rest == 0.0f ? 1.0f : rest < 0.0f ? 0.0f : rest;  // exp32 of 0, -inf and NaN
        difference[half] = __fsub_rn(keeps[half] ? top[half] : state.m[half], base(largest));
        if (joins[half]) state.m[half] = largest;
    }
    const float mine = exp32(second ? difference[1] : difference[0]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float moved = shuffle(mine, (lane & ~3) + 2 * half);
        by[half] = {keeps[half] ? same[half] : moved, keeps[half] ? moved : same[half]};
    }
    const float l = __fadd_rn(__fmul_rn(state.l, second ? by[1].kept : by[0].kept),
                              __fmul_rn(sum, second ? by[1].joined : by[0].joined));
    if (second ? joins[1] : joins[0]) state.l = l;
}

template <int D, class T>
__device__ inline void attend_wide(T* __restrict__ y, const T* __restrict__ q, const Plain<T>& k, const Plain<T>& v,
                                   const CacheRows& rows, const Problem& problem) {
    constexpr int COLUMNS = D / 8, STEPS = D / MMA_K;  // groups of 8 columns; of 16
    constexpr int STAGE_BYTES = sizeof(WideShared<D>::keys[0]);
    auto& shared = brought<WideShared<D>, sizeof(WideShared<128>)>();
    const int lane = threadIdx.x % WARP;
    const int warp = shuffle(static_cast<int>(threadIdx.x / WARP), 0), group = warp / WARPS;  // the compiler sees them uniform
    const int g = lane / 4, t = lane % 4;
    // The last rows see most keys: their blocks begin first.
    const Tile tile = tile_at(problem, rows, blockIdx.y, blockIdx.x, (gridDim.z - 1 - blockIdx.z) * WIDE_ROWS);
    const int first_of_group = tile.first + group * GROUP_ROWS, mine = first_of_group + warp % WARPS * ROWS;
    // Chunks that some row of the block sees, and of this warpgroup.
    const int begin = tile.begin(), end = tile.end(WIDE_ROWS);
    const bool none = first_of_group >= tile.count;
    const int group_last = min(first_of_group + GROUP_ROWS, tile.count) - 1;
    const int group_begin = none ? begin : tile.low(first_of_group) / CHUNK;
    const int group_end = none ? begin : (tile.high(group_last) + CHUNK - 1) / CHUNK;
    // Keys that all rows of the warp see.
    const int last = min(mine + ROWS, tile.count) - 1;
    const int all_low = tile.low(last), all_high = mine + ROWS > tile.count ? 0 : tile.high(mine);
    int low[2], high[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        low[half] = tile.low(mine + g + 8 * half);
        high[half] = tile.high(mine + g + 8 * half);
    }
    const Loader<D, T> key_loader(k.values, rows, tile), value_loader(v.values, rows, tile);
    constexpr int PIECES = Loader<D, T>::PIECES;
    unsigned char* const to = shared.keys[0] + place(threadIdx.x / PIECES, threadIdx.x % PIECES);
    const int whole = rows.table != nullptr ? 0 : min(tile.length / CHUNK, end);  // chunks that are copied without a look at their rows
    const auto load = [&](const Loader<D, T>& loader, int offset, int chunk) {
        if (chunk < whole) loader.load_whole(to + offset, chunk);
        else if (chunk < end) loader.load(to + offset, chunk, rows, tile);
    };
    const auto load_keys = [&](int chunk) { load(key_loader, chunk % WIDE_STAGES * STAGE_BYTES, chunk); };
    const auto load_values = [&](int chunk) { load(value_loader, (WIDE_STAGES + chunk % WIDE_STAGES) * STAGE_BYTES, chunk); };
    const auto meet = [&](int chunk) {
        wait_async<0>();
        publish_shared();
        await(shared.meeting, chunk - begin);  // see above
        arrive(shared.meeting);
        load_keys(chunk + 3);
        load_values(chunk + 2);
        commit_async();
    };
    // Scores of a chunk; none for the tensor core of the CPU where there is no such chunk.
    float s[CHUNK / 8][4];
    const auto multiply_keys = [&](int chunk) {
        group_fence();
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            group_step_shared<T>(s, columns_of(shared.queries[group] + step / 4 * TILE_BYTES),
                                 columns_of(shared.keys[chunk % WIDE_STAGES] + step / 4 * TILE_BYTES), step % 4, step == 0,
                                 chunk < group_end ? CHUNK : 0);
        group_commit();
    };
    float part[COLUMNS][4];
    std::uint32_t p[CHUNK / MMA_K][4] = {};
    const std::uint32_t nothing = problem.T < 0;  // 0, which the compiler does not know
    const auto multiply_values = [&](const unsigned char* values) {
        group_fence();
#pragma unroll
        for (int step = 0; step < CHUNK / MMA_K; ++step)
            group_step_across<T>(part, p[step], columns_across(values, TILE_BYTES), step, step == 0);
        group_commit();
    };
    const auto weigh = [&](float (&top)[2], std::uint32_t (&next)[CHUNK / 4], int chunk, bool careful) {
        const int first = chunk * CHUNK;
        if (careful || all_low > first || all_high < first + CHUNK)
            weigh_wide<T, true>(next, top, s, problem.scale, first + 2 * t, low, high);
        else
            weigh_wide<T, false>(next, top, s, problem.scale, 0, low, high);
    };
    const auto joins = [&](bool (&to)[2], int chunk) {
#pragma unroll
        for (int half = 0; half < 2; ++half) to[half] = low[half] < (chunk + 1) * CHUNK && high[half] > chunk * CHUNK;
    };
    WideState state;
    float o[COLUMNS][4];
    const auto start = [&] {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const State one = start_state(problem, tile, min(mine + g + 8 * half, tile.count - 1));
            state.m[half] = one.m;
            state.l = one.l;  // the same for all rows
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int r = 0; r < 4; ++r) o[c][r] = 0.0f;
    };
    Factors by[2];
    const auto join_outputs = [&](int chunk) {
        bool some[2];
        joins(some, chunk);
        if (all_low >= (chunk + 1) * CHUNK || all_high <= chunk * CHUNK) {
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int r = 0; r < 4; ++r) o[c][r] = some[r / 2] ? joined(o[c][r], part[c][r], by[r / 2]) : o[c][r];
        } else {
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int r = 0; r < 4; ++r) o[c][r] = joined(o[c][r], part[c][r], by[r / 2]);
        }
    };

    if (threadIdx.x == 0) {
        open_meeting(shared.meeting, WIDE_THREADS / WARP);
        shared.broken = 0;
    }
    load_keys(begin);
#pragma unroll
    for (int i = 0; i < WIDE_ROWS; i += WIDE_THREADS / PIECES) {  // the queries; zeros for rows that do not exist
        const int row = i + threadIdx.x / PIECES, piece = threadIdx.x % PIECES, r = tile.first + row;
        const bool exists = r < tile.count;
        const T* at = q + (exists ? tile.token(r) * problem.q_stride + tile.query_head(r) * D + piece * 8 : 0);
        copy_async<16>(shared.queries[row / GROUP_ROWS] + place(row % GROUP_ROWS, piece), at, exists);
    }
    commit_async();
    load_keys(begin + 1);
    load_values(begin);
    commit_async();
    load_keys(begin + 2);
    load_values(begin + 1);
    commit_async();
    start();
    wait_async<2>();
    publish_shared();
    __syncthreads();  // the queries and the first keys are there
    wait_async<1>();
    publish_shared();
    arrive(shared.meeting);
    const int idle_until = min(group_begin, end);
    for (int chunk = begin; chunk < idle_until; ++chunk) meet(chunk);
    if (group_begin < group_end) {
        multiply_keys(group_begin);
        group_wait<0>(s);
    }
#pragma unroll 1
    for (int chunk = group_begin; chunk < group_end; ++chunk) {
        float top[2];
        std::uint32_t next[CHUNK / 4];
        weigh(top, next, chunk, false);
        group_wait<0>(part);
        keep_until_here(p, nothing);
        meet(chunk);
        multiply_keys(chunk + 1);
        const float sum = add_up_wide<T>(next);
        if (chunk > group_begin) join_outputs(chunk - 1);
        keep_from_here(p, next, nothing);
        multiply_values(shared.values[chunk % WIDE_STAGES]);
        bool some[2];
        joins(some, chunk);
        join_wide(state, by, top, sum, some);
        group_wait<1>(s);  // the values are under way
        belongs(s);
    }
    group_wait<0>(part);
    keep_until_here(p, nothing);
    if (group_begin < group_end) join_outputs(group_end - 1);
    for (int chunk = max(group_end, begin); chunk < end; ++chunk) meet(chunk);

    // A value that is NaN or Inf would reach rows that do not see it, as 0 times it. If a result may hold such a sum, all
    // are made again with such values left out of the products and added to the rows that do see them.
    bool all_finite = true;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int r = 0; r < 4; ++r) all_finite = all_finite && finite(o[c][r]);
    wait_async<0>();
    if (!all_finite) shared.broken = 1;
    __syncthreads();
    if (shared.broken != 0) {
        start();
#pragma unroll 1
        for (int chunk = begin; chunk < end; ++chunk) {
            unsigned char *values = shared.values[0], *without = shared.values[1];
            __syncthreads();  // the chunk before has been used
            load_keys(chunk);
            value_loader.load(to + WIDE_STAGES * STAGE_BYTES, chunk, rows, tile);
            commit_async();
            wait_async<0>();
            __syncthreads();  // the chunk is there
            for (int i = threadIdx.x; i < D / 64 * TILE_BYTES / 4; i += WIDE_THREADS)
                reinterpret_cast<std::uint32_t*>(without)[i] =
                    without_specials<T>(reinterpret_cast<const std::uint32_t*>(values)[i]);
            publish_shared();
            __syncthreads();  // the values without specials are there
            const bool takes_part = chunk >= group_begin && chunk < group_end;
            float top[2], sum;
            if (takes_part) {
                multiply_keys(chunk);
                group_wait<0>(s);
                std::uint32_t next[CHUNK / 4];
                weigh(top, next, chunk, true);
                sum = add_up_wide<T>(next);
#pragma unroll
                for (int i = 0; i < CHUNK / 4; ++i) {
                    p[i / 4][i % 4] = next[i];
                    shared.weights[warp][g + 8 * (i % 2)][4 * (i / 2) + t] = next[i];
                }
            }
            __syncthreads();  // the weights are there
            if (!takes_part) continue;
            multiply_values(without);
            bool some[2];
            joins(some, chunk);
            group_wait<0>(part);
            keep_until_here(p, nothing);
            join_wide(state, by, top, sum, some);
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const int column = 8 * c + 2 * t + r % 2;
                    const float add = add_specials_wide<T>(part[c][r], values, shared.weights[warp][g + 8 * (r / 2)], column,
                                                           low[r / 2] - chunk * CHUNK, high[r / 2] - chunk * CHUNK);
                    o[c][r] = some[r / 2] ? joined(o[c][r], add, by[r / 2]) : o[c][r];
                }
        }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int r = mine + g + 8 * half;
        const float l = shuffle(state.l, (lane & ~3) + 2 * half);
        const bool nothing = low[half] >= high[half] && problem.sinks == nullptr;
        T* out = y + (tile.token(r) * problem.H + tile.query_head(r)) * D;
#pragma unroll
        for (int c = 0; c < COLUMNS; c += 4) {
            std::uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                words[i] = nothing ? 0 : pack<T>(__fdiv_rn(o[c + i][2 * half], l), __fdiv_rn(o[c + i][2 * half + 1], l));
            quad_transpose(words);  // the four words of group c + t
            if (r < tile.count)
                *reinterpret_cast<uint4*>(out + 8 * (c + t)) = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}
