// Many rows on Hopper, for heads of 64 or 128 and caches of 16 bits: a block of two warpgroups (heads of 64: three) owns 64
// rows for each of them, with all keys of a chunk and all columns of the output.
//
// When a warpgroup has the weights of chunk c, the tensor core multiplies the queries by the keys of c + 1 and then the weights
// by the values of c, while the scores of c + 1 become weights. What it still waits for the other warpgroups have to fill.
//
// Four chunks lie in shared memory; the warpgroups take turns to copy one. In chunk c, when it has the weights, every warp of
// the block arrives at a meeting and waits for the others to have arrived in chunk c - 1, so that the warpgroups may be up to a
// chunk apart. When all have arrived in chunk c
//   keys of c + 2 and values of c + 1 have been copied, and keys of c and values of c - 1 have been read
// and whoever has waited in chunk c reads keys of c + 1 and values of c, and writes keys of c + 3 and values of c + 2
// over keys of c - 1 and values of c - 2.
#pragma once

#include "attention.cuh"
#include "wgmma.cuh"

#include <utility>

constexpr int WIDE_STAGES = 4;
template <int D> constexpr int WIDE_GROUPS = D == 64 ? 3 : 2;  // as many as registers allow
constexpr int TILE_BYTES = CHUNK * 128;  // of 64 rows and 64 columns

template <int D> struct alignas(1024) WideShared {
    unsigned char queries[WIDE_GROUPS<D>][D / 64 * TILE_BYTES];
    unsigned char keys[WIDE_STAGES][D / 64 * TILE_BYTES], values[WIDE_STAGES][D / 64 * TILE_BYTES];
    std::uint32_t ones[8 * 32];                                 // of T, in pairs: 8 rows of a tile
    std::uint32_t weights[WIDE_GROUPS<D> * WARPS][ROWS][P_PITCH];  // of a careful pass
    Meeting meeting;
    int broken;
};

// Where the 16-byte piece of a row lies in tiles of 64 columns.
__device__ inline int place(int row, int piece) { return piece / 8 * TILE_BYTES + swizzled(row, piece % 8); }

// A thread's share of chunks of keys or values that its warpgroup copies to shared memory; zeros past the length.
template <int D, class T> struct Loader {
    static constexpr int PIECES = D / 8, STRIDE = GROUP_THREADS / PIECES;
    static_assert(STRIDE % 8 == 0);  // the rows of a thread have their piece at the same place
    const T* values;
    const T* first;  // this thread's first piece of chunk 0, where sequences are not in pages

    __device__ Loader(const T* from, const CacheRows& rows, const Tile& tile) : values(from), first(from) {
        const int thread = threadIdx.x % GROUP_THREADS;
        if (rows.table == nullptr) first += rows.at(tile.b, tile.head, thread / PIECES) * D + thread % PIECES * 8;
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
        const int piece = threadIdx.x % PIECES, row = chunk * CHUNK + threadIdx.x % GROUP_THREADS / PIECES;
#pragma unroll 1
        for (int i = 0; i < CHUNK; i += STRIDE) {
            const bool valid = row + i < tile.length;
            const long long at = valid ? rows.at(tile.b, tile.head, row + i) * D + piece * 8 : 0;
            copy_async<16>(to + i * 128, values + at, valid);
        }
    }
};

// Which keys of a chunk a row sees: bit 8 e + j for key `first` + 8 j + e.
__device__ inline std::uint32_t seen_of(int first, int low, int high) {
    std::uint32_t seen = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const auto below = [&](int limit) { return min(max((limit - first - e + 7) >> 3, 0), CHUNK / 8); };
        const int from = below(low), to = max(below(high), from);
        seen |= ((1u << to) - (1u << from)) << (8 * e);
    }
    return seen;
}

// Weights of 16 rows a warp and 64 keys from their scores: word i of row g + 8 (i % 2), keys 8 (i / 2) + 2t and the next.
// seen: seen_of both rows; where not masked all are. top: the base of either row.
template <class T, bool masked>
__device__ inline void weigh_wide(std::uint32_t (&p)[CHUNK / 4], float (&top)[2], float (&s)[CHUNK / 8][4], const Scores& scores,
                                  const std::uint32_t (&seen)[2]) {
    constexpr int PARTS = 2;  // the largest of every second pair, so that fewer wait for one another
    float largest[2][PARTS] = {{-infinity(), -infinity()}, {-infinity(), -infinity()}};
    if (scores.negative) {
#pragma unroll
        for (int j = 0; j < CHUNK / 8; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) s[j][r] = -s[j][r];
    }
#pragma unroll
    for (int j = 0; j < CHUNK / 8; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            if (masked && (seen[r / 2] >> (8 * (r % 2) + j) & 1) == 0) s[j][r] = -infinity();
            largest[r / 2][j % PARTS] = Larger()(largest[r / 2][j % PARTS], s[j][r]);
        }
#pragma unroll
    for (int half = 0; half < 2; ++half)
        top[half] = scores.base_of(warp_reduce<4>(Larger()(largest[half][0], largest[half][1]), Larger()));
    auto& z = reinterpret_cast<float (&)[CHUNK / 2]>(s);
    raise(z, scores.factor, top);
    weight_pairs<T>(p, z);
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

// Pairs of numbers that are off by less than `off` units in the last place, rounded to T; sure: the exact ones would be rounded
// to the same.
#ifdef __CUDACC__
template <class T> struct Rounding;
template <> struct Rounding<__nv_bfloat16> {  // half-way lie those whose lower 16 bits are 0x8000
    std::uint32_t nearest = 0xffffffffu;      // of two halves: the smallest distance from there, counted from OFF before it
    __device__ std::uint32_t pair(float first, float second, std::uint32_t off) {
        const std::uint32_t lower = __byte_perm(__float_as_uint(first), __float_as_uint(second), 0x5410);
        nearest = __viaddmin_u16x2(lower, 0x80008000u + 0x10001u * off, nearest);
        return pack<__nv_bfloat16>(first, second);
    }
    __device__ bool sure(std::uint32_t off) const { return min(nearest & 0xffffu, nearest >> 16) > 2 * off; }
};
template <> struct Rounding<__half> {
    std::uint32_t differ = 0;
    __device__ std::uint32_t pair(float first, float second, std::uint32_t off) {
        const float by = static_cast<float>(off) * 1.2e-7f;
        const std::uint32_t high = pack<__half>(__fmaf_rn(first, by, first), __fmaf_rn(second, by, second));
        differ |= high ^ pack<__half>(__fmaf_rn(first, -by, first), __fmaf_rn(second, -by, second));
        return high;
    }
    __device__ bool sure(std::uint32_t) const { return differ == 0; }
};
#endif

template <int D, class T>
__device__ inline void attend_wide(T* __restrict__ y, const T* __restrict__ q, const Plain<T>& k, const Plain<T>& v,
                                   const CacheRows& rows, const Problem& problem) {
    constexpr int GROUPS = WIDE_GROUPS<D>, WIDE_ROWS = GROUPS * GROUP_ROWS;
    constexpr int PARTS = D / 64, COLUMNS = 8, STEPS = D / MMA_K;  // 64 columns of the output; groups of 8 of them; of 16
    constexpr std::uint32_t ONES = Ones<T>::pair;
    constexpr int STAGE_BYTES = sizeof(WideShared<D>::keys[0]);
    auto& shared = brought<WideShared<D>, sizeof(WideShared<128>)>();
    const int lane = threadIdx.x % WARP;
    const int warp = shuffle(static_cast<int>(threadIdx.x / WARP), 0), group = warp / WARPS;  // the compiler sees them uniform
    const int g = lane / 4, t = lane % 4;
    // The last rows see most keys: their blocks begin first.
    const Tile tile = tile_at(problem, rows, blockIdx.y, blockIdx.x, (gridDim.z - 1 - blockIdx.z) * WIDE_ROWS);
    const int first_of_group = tile.first + group * GROUP_ROWS, mine = first_of_group + warp % WARPS * ROWS;
    const Scores scores(problem);
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
    const int thread = threadIdx.x % GROUP_THREADS;
    unsigned char* const to = shared.keys[0] + place(thread / PIECES, thread % PIECES);
    const int whole = rows.table != nullptr ? 0 : min(tile.length / CHUNK, end);  // chunks that are copied without a look at their rows
    const auto load = [&](const Loader<D, T>& loader, int offset, int chunk) {
        if (chunk < whole) loader.load_whole(to + offset, chunk);
        else if (chunk < end) loader.load(to + offset, chunk, rows, tile);
    };
    const auto load_keys = [&](int chunk) { load(key_loader, chunk % WIDE_STAGES * STAGE_BYTES, chunk); };
    const auto load_values = [&](int chunk) { load(value_loader, (WIDE_STAGES + chunk % WIDE_STAGES) * STAGE_BYTES, chunk); };
    int since = group == 0 ? 0 : GROUPS - group;  // chunks since this warpgroup copied
    const auto meet = [&](int chunk) {
        if (since == 1) {
            wait_async<0>();
            publish_shared();
        }
        await(shared.meeting, chunk - begin);  // see above
        arrive(shared.meeting);
        if (since == 0) {
            load_keys(chunk + 3);
            load_values(chunk + 2);
            commit_async();
        }
        since = since == GROUPS - 1 ? 0 : since + 1;
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
    float part[PARTS][COLUMNS][4], sums[1][4];
    std::uint32_t p[CHUNK / MMA_K][4] = {};
    const std::uint32_t nothing = problem.T < 0;  // 0, which the compiler does not know
    const auto multiply_values = [&](const unsigned char* values) {
        group_fence();
        group_sums<T>(sums, p, columns_of(shared.ones));
#pragma unroll
        for (int n = 0; n < PARTS; ++n)
#pragma unroll
            for (int step = 0; step < CHUNK / MMA_K; ++step)
                group_step_across<T>(part[n], p[step], columns_across(values + n * TILE_BYTES, TILE_BYTES), step, step == 0);
        group_commit();
    };
    const auto all_see = [&](int chunk) { return all_low <= chunk * CHUNK && all_high >= (chunk + 1) * CHUNK; };
    const auto weigh = [&](float (&top)[2], std::uint32_t (&next)[CHUNK / 4], int chunk, bool careful) {
        const int first = chunk * CHUNK;
        std::uint32_t seen[2] = {};
        if (careful || !all_see(chunk)) {
#pragma unroll
            for (int half = 0; half < 2; ++half) seen[half] = seen_of(first + 2 * t, low[half], high[half]);
            weigh_wide<T, true>(next, top, s, scores, seen);
        } else {
            weigh_wide<T, false>(next, top, s, scores, seen);
        }
    };
    const auto joins = [&](bool (&to)[2], int chunk) {
#pragma unroll
        for (int half = 0; half < 2; ++half) to[half] = low[half] < (chunk + 1) * CHUNK && high[half] > chunk * CHUNK;
    };
    State state[2];
    float o[PARTS][COLUMNS][4];
    const auto start = [&] {
#pragma unroll
        for (int half = 0; half < 2; ++half) state[half] = start_state<T>(problem, tile, min(mine + g + 8 * half, tile.count - 1));
#pragma unroll
        for (int n = 0; n < PARTS; ++n)
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int r = 0; r < 4; ++r) o[n][c][r] = 0.0f;
    };
    Factors by[2];
    // Of both rows, those that see nothing of the chunk left as they are. Whether all rows of the warp see all of it and keep their
    // base.
    const auto join_bases = [&](const float (&top)[2], int chunk) {
        bool some[2] = {true, true};
        if (!all_see(chunk)) joins(some, chunk);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            by[half] = factors_of(state[half].m, top[half]);
            if (some[half]) state[half].m = Larger()(state[half].m, top[half]);
        }
        return all_see(chunk) && vote(by[0].kept != 1.0f || by[1].kept != 1.0f) == 0;
    };
    const auto join_outputs = [&](int chunk, bool kept) {
        if (kept) {
            state[0].l = __fmaf_rn(sums[0][0], by[0].joined, state[0].l);
            state[1].l = __fmaf_rn(sums[0][2], by[1].joined, state[1].l);
#pragma unroll
            for (int n = 0; n < PARTS; ++n)
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                    for (int r = 0; r < 4; ++r) o[n][c][r] = __fmaf_rn(part[n][c][r], by[r / 2].joined, o[n][c][r]);
            return;
        }
        bool some[2];
        joins(some, chunk);
        if (some[0]) state[0].l = joined(state[0].l, sums[0][0], by[0]);
        if (some[1]) state[1].l = joined(state[1].l, sums[0][2], by[1]);
#pragma unroll
        for (int n = 0; n < PARTS; ++n)
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int r = 0; r < 4; ++r) o[n][c][r] = some[r / 2] ? joined(o[n][c][r], part[n][c][r], by[r / 2]) : o[n][c][r];
    };
    if (threadIdx.x < 64) reinterpret_cast<uint4*>(shared.ones)[threadIdx.x] = make_uint4(ONES, ONES, ONES, ONES);
    if (threadIdx.x == 0) {
        open_meeting(shared.meeting, GROUPS * WARPS);
        shared.broken = 0;
    }
    if (group == 0) load_keys(begin);
    const T* const first_query = q + static_cast<long long>(tile.b) * problem.T * problem.q_stride + tile.head * tile.G * D;
#pragma unroll
    for (int i = 0; i < GROUP_ROWS; i += GROUP_THREADS / PIECES) {  // the queries; zeros for rows that do not exist
        const int row = i + thread / PIECES, piece = thread % PIECES, r = first_of_group + row;
        const bool exists = r < tile.count;
        const int query = exists ? tile.query(r) : 0, head = exists ? r - query * tile.G : 0;
        const T* at = first_query + static_cast<long long>(query) * problem.q_stride + (head * D + piece * 8);
        copy_async<16>(shared.queries[group] + place(row, piece), at, exists);
    }
    commit_async();
    if (group == 1) {
        load_keys(begin + 1);
        load_values(begin);
    }
    commit_async();
    if (group == GROUPS - 1) {
        load_keys(begin + 2);
        load_values(begin + 1);
    }
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
        float top[2];
        std::uint32_t next[CHUNK / 4];
        multiply_keys(group_begin);
        group_wait<0>(s);
        weigh(top, next, group_begin, false);
#pragma unroll 1
        for (int chunk = group_begin; chunk < group_end; ++chunk) {
            const bool kept = join_bases(top, chunk);
            meet(chunk);
            keep_from_here(p, next, nothing);
            multiply_keys(chunk + 1);
            multiply_values(shared.values[chunk % WIDE_STAGES]);
            group_wait<1>(s);  // the products with the values are under way
            belongs(s);
            if (chunk + 1 < group_end) weigh(top, next, chunk + 1, false);
            group_wait<0>(sums);
#pragma unroll
            for (int n = 0; n < PARTS; ++n) belongs(part[n]);
            keep_until_here(p, nothing);
            join_outputs(chunk, kept);
        }
    }
    for (int chunk = max(group_end, begin); chunk < end; ++chunk) meet(chunk);

    // A value that is NaN or Inf would reach rows that do not see it, as 0 times it. If a result may hold such a sum, all
    // are made again with such values left out of the products and added to the rows that do see them.
    float least = infinity(), most = 0.0f;  // of all magnitudes
#pragma unroll
    for (int n = 0; n < PARTS; ++n)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                least = fminf(least, fabsf(o[n][c][r]));
                most = Larger()(most, fabsf(o[n][c][r]));
            }
    wait_async<0>();
    if (!finite(most)) shared.broken = 1;
    __syncthreads();
    if (shared.broken != 0) {
        most = infinity();
        start();
#pragma unroll 1
        for (int chunk = begin; chunk < end; ++chunk) {
            unsigned char *values = shared.values[0], *without = shared.values[1];
            __syncthreads();  // the chunk before has been used
            if (group == 0) load_keys(chunk);
            if (group == 1) value_loader.load(to + WIDE_STAGES * STAGE_BYTES, chunk, rows, tile);
            commit_async();
            wait_async<0>();
            __syncthreads();  // the chunk is there
            for (int i = threadIdx.x; i < D / 64 * TILE_BYTES / 4; i += GROUPS * GROUP_THREADS)
                reinterpret_cast<std::uint32_t*>(without)[i] =
                    without_specials<T>(reinterpret_cast<const std::uint32_t*>(values)[i]);
            publish_shared();
            __syncthreads();  // the values without specials are there
            const bool takes_part = chunk >= group_begin && chunk < group_end;
            float top[2];
            if (takes_part) {
                multiply_keys(chunk);
                group_wait<0>(s);
                std::uint32_t next[CHUNK / 4];
                weigh(top, next, chunk, true);
#pragma unroll
                for (int i = 0; i < CHUNK / 4; ++i) {
                    p[i / 4][i % 4] = next[i];
                    shared.weights[warp][g + 8 * (i % 2)][4 * (i / 2) + t] = next[i];
                }
            }
            __syncthreads();  // the weights are there
            if (!takes_part) continue;
            join_bases(top, chunk);
            multiply_values(without);
            group_wait<0>(sums);
            keep_until_here(p, nothing);
#pragma unroll
            for (int n = 0; n < PARTS; ++n) {
                belongs(part[n]);
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        const int column = 64 * n + 8 * c + 2 * t + r % 2;
                        part[n][c][r] = add_specials_wide<T>(part[n][c][r], values, shared.weights[warp][g + 8 * (r / 2)], column,
                                                             low[r / 2] - chunk * CHUNK, high[r / 2] - chunk * CHUNK);
                    }
            }
            join_outputs(chunk, false);
        }
    }

    // The outputs of this warp's rows, over its queries, which nobody reads any more.
    const auto word = [&](int half, int n, int c) -> std::uint32_t& {
        return *reinterpret_cast<std::uint32_t*>(shared.queries[group] + place(warp % WARPS * ROWS + g + 8 * half, 8 * n + c) + 4 * t);
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float l = state[half].l;
        const auto write = [&](auto round) {
#pragma unroll
            for (int n = 0; n < PARTS; ++n)
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) word(half, n, c) = round(o[n][c][2 * half], o[n][c][2 * half + 1]);
        };
#ifdef __CUDACC__
        // Products with the inverse are off by less than OFF units where nothing is so small or large that it loses bits.
        constexpr std::uint32_t OFF = 3;
        const float inverse = __fdiv_rn(1.0f, l);
        Rounding<T> all;
        write([&](float a, float b) { return all.pair(__fmul_rn(a, inverse), __fmul_rn(b, inverse), OFF); });
        if (least >= 7.9e-31f && most <= 1.2e30f && l >= 6e-8f && l <= 1.6e7f && all.sure(OFF)) continue;
#endif
        const bool nothing = low[half] >= high[half] && l == 0.0f;
        write([&](float a, float b) { return nothing ? 0 : pack<T>(__fdiv_rn(a, l), __fdiv_rn(b, l)); });
    }
    __syncthreads();  // the outputs are there
    T* const first_output = y + (static_cast<long long>(tile.b) * problem.T * problem.H + tile.head * tile.G) * D;
#pragma unroll
    for (int i = lane; i < ROWS * PIECES; i += WARP) {
        const int row = i / PIECES, piece = i % PIECES, r = mine + row;
        if (r >= tile.count) continue;
        const int query = tile.query(r), head = r - query * tile.G;
        T* const out = first_output + static_cast<long long>(query) * (problem.H * D) + (head * D + piece * 8);
        *reinterpret_cast<uint4*>(out) =
            *reinterpret_cast<const uint4*>(shared.queries[group] + place(warp % WARPS * ROWS + row, piece));
    }
}
