// Many rows on Hopper, for heads of 64 or 128 and caches of 16 bits: a block owns tiles of 64 rows for each of two
// warpgroups (heads of 64: three), one tile after another, with all keys of a chunk and all columns of the output. One more
// warpgroup brings what they multiply (attention_wide_tiles.cuh).
//
// When a warpgroup has the weights of chunk c, the tensor core multiplies them by half of the columns of c's values, then the
// queries by the keys of c + 1, while the first products join the outputs, then the weights by the other columns, while the bases
// of c + 1 are found; then its scores become weights, which is for the other warpgroup to fill. Heads of 64 have no other half, and
// one after the other the three warpgroups fill each other's pauses. A tile's last chunk is followed by the next tile's first one in
// the same way, if the next step has it and this warpgroup sees some of it.
#pragma once

#include "attention_wide_tiles.cuh"

template <int D, class T>
__device__ inline void attend_wide(T* __restrict__ y, const T* __restrict__ q, const Plain<T>& k, const Plain<T>& v,
                                   const CacheRows& rows, const Problem& problem, int batch, int heads_at_once) {
    constexpr int GROUPS = WIDE_GROUPS<D>, STEPS = D / MMA_K;
    constexpr int PARTS = D / 64, COLUMNS = 8;  // 64 columns of the output; groups of 8 of them
    constexpr int REGISTERS = D == 64 ? 152 : 224, LAUNCHED = D == 64 ? 128 : 168;  // of a thread that multiplies; at the start
    constexpr std::uint32_t ONES = Ones<T>::pair;
    auto& shared = brought<WideShared<D>, sizeof(WideShared<128>)>();
    const int warp = shuffle(static_cast<int>(threadIdx.x / WARP), 0), group = warp / WARPS;  // the compiler sees them uniform
    const Walk<D> walk{problem, rows, batch * rows.heads, heads_at_once};
    if (group == GROUPS) {
        keep_registers<(GROUPS + 1) * LAUNCHED - GROUPS * REGISTERS, LAUNCHED>();  // what is left
        Bringer<D, T> bringer(shared, q, k.values, v.values, walk);
        bringer.begin();
        __syncthreads();  // the meetings are open
        bringer.run();
        for (int n = 0; walk.has(n); ++n)
            if (shared.broken[n] != 0) bringer.run_carefully(n);
        return;
    }
    keep_registers<REGISTERS, LAUNCHED>();
    if (threadIdx.x < 64) reinterpret_cast<uint4*>(shared.ones)[threadIdx.x] = make_uint4(ONES, ONES, ONES, ONES);
    for (int n = threadIdx.x; n < MOST_TILES; n += GROUPS * GROUP_THREADS) shared.broken[n] = 0;
    if (threadIdx.x < STAGES) {
        open_meeting(shared.keys_there[threadIdx.x], WARPS);
        open_meeting(shared.values_there[threadIdx.x], WARPS);
        open_meeting(shared.keys_used[threadIdx.x], GROUPS * WARPS);
        open_meeting(shared.values_used[threadIdx.x], GROUPS * WARPS);
    }
    __syncthreads();  // the meetings are open
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int first_row = group * GROUP_ROWS + warp % WARPS * ROWS;  // of this warp in a tile
    const Scores scores(problem);
    int low[2], high[2], all_low, all_high;  // keys that this thread's rows see, g and g + 8 of the warp's; and all of them
    const auto take = [&](const WideTile<D>& tile) {
        const WideRow* const rows = tile.rows + first_row;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            low[half] = rows[g + 8 * half].low;
            high[half] = rows[g + 8 * half].high;
        }
        all_low = rows[ROWS - 1].low;
        all_high = rows[ROWS - 1].high == 0 ? 0 : rows[0].high;
    };
    // Scores of the keys of a step; none for the tensor core of the CPU where nobody wants them.
    float s[CHUNK / 8][4];
    const auto multiply_keys = [&](int number, int step, bool wanted) {
        const unsigned char *queries = shared.queries[number % 2][group], *keys = shared.keys[step % STAGES];
        group_fence();
#pragma unroll
        for (int i = 0; i < STEPS; ++i)
            group_step_shared<T>(s, columns_of(queries + i / 4 * QUERY_TILE), columns_of(keys + i / 4 * TILE_BYTES), i % 4,
                                 i == 0, wanted ? CHUNK : 0);
        group_commit();
    };
    float part[COLUMNS][4], sums[1][4];
    std::uint32_t p[CHUNK / MMA_K][4] = {};
    const std::uint32_t nothing = problem.T < 0;  // 0, which the compiler does not know
    // Of 64 columns; with the first ones the sums of the weights.
    const auto multiply_values = [&](const unsigned char* values, int n) {
        group_fence();
        if (n == 0) group_sums<T>(sums, p, columns_of(shared.ones));
#pragma unroll
        for (int step = 0; step < CHUNK / MMA_K; ++step)
            group_step_across<T>(part, p[step], columns_across(values + n * TILE_BYTES, TILE_BYTES), step, step == 0);
        group_commit();
    };
    const auto all_see = [&](int chunk) { return all_low <= chunk * CHUNK && all_high >= (chunk + 1) * CHUNK; };
    const auto look = [&](float (&top)[2], int chunk, bool careful) {
        const int first = chunk * CHUNK;
        std::uint32_t seen[2] = {};
        if (careful || !all_see(chunk)) {
#pragma unroll
            for (int half = 0; half < 2; ++half) seen[half] = seen_of(first + 2 * t, low[half], high[half]);
            find_bases<true>(top, s, scores, seen);
        } else {
            find_bases<false>(top, s, scores, seen);
        }
    };
    // Word i % 4 of step i / 4: of row g + 8 (i % 2), keys 8 (i / 2) + 2t and the next.
    const auto weigh = [&](const float (&top)[2]) {
        auto& z = reinterpret_cast<float (&)[CHUNK / 2]>(s);
        raise(z, scores.factor, top);
        weight_pairs<T>(reinterpret_cast<std::uint32_t (&)[CHUNK / 4]>(p), z);
    };
    // Which rows see something of the chunk that is joined.
    bool some[2];
    State state[2];
    float o[PARTS][COLUMNS][4];
    const auto start = [&](const WideTile<D>& tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            state[half] = start_state<T>(problem.sinks != nullptr, tile.rows[first_row + g + 8 * half].sink);
#pragma unroll
        for (int n = 0; n < PARTS; ++n)
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int r = 0; r < 4; ++r) o[n][c][r] = 0.0f;
    };
    Factors by[2];
    // Of both rows, those that see nothing of the chunk left as they are. Whether all rows of the warp see all of it and keep
    // their base, or have none yet: then there is nothing to keep.
    const auto join_bases = [&](const float (&top)[2], int chunk) {
        const bool all = all_see(chunk);
        bool kept = true;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            some[half] = all || (low[half] < (chunk + 1) * CHUNK && high[half] > chunk * CHUNK);
            by[half] = factors_of(state[half].m, top[half]);
            kept = kept && (by[half].kept == 1.0f || state[half].m == -infinity());
            if (some[half]) state[half].m = Larger()(state[half].m, top[half]);
        }
        return all && vote(!kept) == 0;
    };
    // Of 64 columns.
    const auto join_outputs = [&](int n, bool kept) {
        if (kept) {
            if (n == 0) {
                state[0].l = __fmaf_rn(sums[0][0], by[0].joined, state[0].l);
                state[1].l = __fmaf_rn(sums[0][2], by[1].joined, state[1].l);
            }
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int r = 0; r < 4; ++r) o[n][c][r] = __fmaf_rn(part[c][r], by[r / 2].joined, o[n][c][r]);
            return;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (!some[half]) continue;
            if (n == 0) state[half].l = joined(state[half].l, sums[0][2 * half], by[half]);
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int r = 2 * half; r < 2 * half + 2; ++r) o[n][c][r] = joined(o[n][c][r], part[c][r], by[half]);
        }
    };
    // The outputs of this warp's rows, each lane's 8 columns at a time. False where one may be NaN or Inf.
    const auto write_outputs = [&](const WideTile<D>& tile) {
        float sum = 0.0f;  // of all magnitudes
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const WideRow& row = tile.rows[first_row + g + 8 * half];
            const float inverse = inverse_of(state[half].l, row.low < row.high);
            std::uint32_t words[PARTS * COLUMNS / 4][4];  // of columns 8 (4 i + j) + 2t and the next
#pragma unroll
            for (int n = 0; n < PARTS; ++n)
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    const float first = __fmul_rn(o[n][c][2 * half], inverse), second = __fmul_rn(o[n][c][2 * half + 1], inverse);
                    sum = __fadd_rn(sum, __fadd_rn(fabsf(first), fabsf(second)));
                    words[2 * n + c / 4][c % 4] = pack<T>(first, second);
                }
            T* const out = y + tile.first_output + static_cast<long long>(row.at) * D;
#pragma unroll
            for (int i = 0; i < PARTS * COLUMNS / 4; ++i) {
                quad_transpose(words[i]);
                const uint4 eight = make_uint4(words[i][0], words[i][1], words[i][2], words[i][3]);
                if (row.at >= 0) *reinterpret_cast<uint4*>(out + (4 * i + t) * 8) = eight;
            }
        }
        return finite(sum);
    };

    const auto keys_there = [&](int step) { await(shared.keys_there[step % STAGES], step / STAGES); };
    const auto values_there = [&](int step) { await(shared.values_there[step % STAGES], step / STAGES); };
    const auto keys_used = [&](int step) { arrive(shared.keys_used[step % STAGES]); };
    const auto values_used = [&](int step) { arrive(shared.values_used[step % STAGES]); };
    const auto skip_values = [&](int step) {
        meet();
        values_there(step);
        values_used(step);
    };
    __syncthreads();  // the first queries and keys are there
    int time = 0;     // steps of all tiles so far
    float top[2];
    bool weighed = false;  // the tile's first chunk, while the last one of the tile before was joined
    bool last_tile = false;
#pragma unroll 1
    for (int number = 0; !last_tile; ++number) {
        const WideTile<D>&tile = shared.tiles[number % KNOWN], &after = shared.tiles[(number + 1) % KNOWN];
        const int end = shuffle(tile.end[group], 0), until = time + shuffle(tile.steps, 0);
        int chunk = shuffle(tile.begin[group], 0);
        last_tile = shuffle(tile.last, 0) != 0;
        if (!weighed) {
            for (int i = shuffle(tile.first_chunk, 0); i < chunk && chunk < end; ++i) {
                keys_there(time);
                keys_used(time);
                skip_values(time++);
            }
            keys_there(time);
            if (chunk < end) {
                take(tile);
                multiply_keys(number, time, true);
                group_wait<0>(s);
                look(top, chunk, false);
                weigh(top);
            }
            keys_used(time);
        }
        weighed = false;
        start(tile);
#pragma unroll 1
        for (; chunk < end; ++chunk, ++time) {
            const bool kept = join_bases(top, chunk), last = chunk + 1 == end, ends = time + 1 == until;
            meet();
            values_there(time);
            const unsigned char* const values = shared.values[time % STAGES];
            multiply_values(values, 0);
            if (PARTS == 1) {
                group_wait<0>(part);
                belongs(sums);
                join_outputs(0, kept);
                values_used(time);
            }
            keys_there(time + 1);
            if (last && ends && !last_tile)
                weighed = shuffle(after.begin[group] == after.first_chunk && after.first_chunk < after.end[group], 0) != 0;
            const bool more = !last || weighed;
            multiply_keys(weighed ? number + 1 : number, time + 1, more);
            if (PARTS == 2) {
                group_wait<1>(part);  // the scores are under way
                belongs(part);
                belongs(sums);
                join_outputs(0, kept);
                multiply_values(values, 1);
                group_wait<1>(s);  // the products with the last columns are under way
                belongs(s);
            } else {
                group_wait<0>(s);
            }
            if (!ends || weighed) keys_used(time + 1);
            if (weighed) take(after);
            if (more) look(top, weighed ? after.first_chunk : chunk + 1, false);
            if (PARTS == 2) {
                group_wait<0>(part);
                values_used(time);
                join_outputs(1, kept);
            }
            keep_until_here(p, nothing);
            if (more) weigh(top);
        }
        if (!write_outputs(tile)) shared.broken[number] = 1;
        for (int step = time; step < until; ++step) {
            skip_values(step);
            if (step + 1 == until) break;
            keys_there(step + 1);
            keys_used(step + 1);
        }
        time = until;
    }
    __syncthreads();  // all tiles have been multiplied

    // A value that is NaN or Inf would reach rows that do not see it, as 0 times it. Tiles in which a result may hold such a
    // sum are made again with such values left out of the products and added to the rows that do see them.
    for (int number = 0; walk.has(number); ++number) {
        if (shared.broken[number] == 0) continue;
        const WideTile<D>& tile = shared.tiles[0];
        const Tile whole = walk(number);
        __syncthreads();  // the tile before has been written
#pragma unroll 1
        for (int chunk = whole.begin(); chunk < whole.end(WIDE_ROWS<D>); ++chunk) {
            unsigned char *values = shared.values[0], *without = shared.values[1];
            __syncthreads();  // the chunk before has been used
            __syncthreads();  // the chunk is there
            if (chunk == whole.begin()) {
                take(tile);
                start(tile);
            }
            for (int i = threadIdx.x; i < D / 64 * TILE_BYTES / 4; i += GROUPS * GROUP_THREADS)
                reinterpret_cast<std::uint32_t*>(without)[i] =
                    without_specials<T>(reinterpret_cast<const std::uint32_t*>(values)[i]);
            publish_shared();
            __syncthreads();  // the values without specials are there
            const bool takes_part = chunk >= tile.begin[group] && chunk < tile.end[group];
            if (takes_part) {
                multiply_keys(0, 0, true);
                group_wait<0>(s);
                look(top, chunk, true);
                weigh(top);
#pragma unroll
                for (int i = 0; i < CHUNK / 4; ++i) shared.weights()[warp][g + 8 * (i % 2)][4 * (i / 2) + t] = p[i / 4][i % 4];
            }
            __syncthreads();  // the weights are there
            if (!takes_part) continue;
            join_bases(top, chunk);
#pragma unroll
            for (int n = 0; n < PARTS; ++n) {
                multiply_values(without, n);
                group_wait<0>(part);
                belongs(sums);
                keep_until_here(p, nothing);
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        const int column = 64 * n + 8 * c + 2 * t + r % 2;
                        const std::uint32_t* const weights = shared.weights()[warp][g + 8 * (r / 2)];
                        part[c][r] = add_specials_wide<T>(part[c][r], values, weights, column, low[r / 2] - chunk * CHUNK,
                                                          high[r / 2] - chunk * CHUNK);
                    }
                join_outputs(n, false);
            }
        }
        __syncthreads();  // the last chunk has been used
        write_outputs(tile);
    }
}
