// The path for many rows on Hopper: warpgroup instructions, the same bits as the other paths (gemm.cuh).
//
// A block owns 64 MB features x TOKENS rows for each of two warpgroups. A third one loads stages of 128 k, several under
// way at once: the tokens as the tensor core reads them (wgmma.cuh), the codes with their bytes in the order of the lanes
// (gemm_stage.cuh). Rows that follow one another are brought by the copy engine (tensor_map.cuh), routed ones by the
// warpgroup's threads. Two warpgroups multiply, 64 MB features each: a lane decodes its part of 32 or 64 k into registers
// while the tensor core works on what it decoded before. Stages with extreme scales, which want more operations, go through a
// copy of the loop.
//
// TURNS, where such blocks are too few: both have the same 64 features and take the stages in turn. Of a chunk's sums a
// warpgroup leaves those of half of the rows to the other, so that each adds all chunks of its half in ascending order.
//
// Who loads stage n waits until the stage in whose place it comes has been used. Who multiplies stage c waits for stage
// c + 1 before it decodes what comes first in it, and tells that c has been used when the tensor core is done with it. Scales
// are brought for four stages at a time, two such groups ahead: they are there, and whether some are extreme is known, before
// the stage before them is. Where all threads of the block meet instead (wgmma.cuh), meeting c is the one in which stage c + 1
// has arrived and stage c - 1 has been used; by turns, in which chunk c - 1 has been left and stage c + 2 has arrived.
#pragma once

#include "gemm_stage.cuh"
#include "tensor_map.cuh"

constexpr int WIDE_GROUPS = 2, WIDE_THREADS = (WIDE_GROUPS + 1) * GROUP_THREADS, SCALE_GROUPS = 4;

template <int MB, int TOKENS, bool TURNS = false> struct WideShared {
    static constexpr int features = (TURNS ? 1 : WIDE_GROUPS) * MB * GROUP_ROWS, count = TURNS ? 8 : 4;
    Stage<features, TOKENS> stages[count];
    float4 left[TURNS ? WIDE_GROUPS : 1][TURNS ? TOKENS / 16 : 1][GROUP_THREADS];  // sums for the other, of a warpgroup's chunk
    uint4 scales[SCALE_GROUPS][features];  // of 512 k each
    uint4 token_rows[GROUP_THREADS];       // of loading threads, see Tokens
    long long written[TOKENS];             // rows of y
    Meeting there[count], used[count], left_there[WIDE_GROUPS], left_used[WIDE_GROUPS];
    int extreme[SCALE_GROUPS];  // which 512 k, of those that come to this place, had extreme scales last
};

template <class T, bool any_scale, int NT>
__device__ inline void add_chunks(float (&total)[NT][4], const float (&sum)[NT][4], const float (&scale)[2]) {
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) total[j][r] = join_chunk<T, !any_scale>(total[j][r], sum[j][r], scale[r / 2]);
}

// One tile of up to TOKENS rows.
template <class T, int MB, int TOKENS, bool TURNS>
__device__ inline void multiply_wide_tile(const Output<T>& output, const T* __restrict__ x, const TensorMap& map, const Packed<T>& weights,
                                          const Tile& tile) {
    using Shared = WideShared<MB, TOKENS, TURNS>;
    constexpr int NT = TOKENS / 8, features = Shared::features, STAGES = Shared::count;
    constexpr int STEP = TURNS ? WIDE_GROUPS : 1, OWN = NT / STEP;  // from a warpgroup's chunk to its next; eights of rows it adds
    constexpr bool scaled_blocks = Order<T>::chunk == MX_BLOCK;
    static_assert(scaled_blocks ? !TURNS : Order<T>::chunk == STAGE_K);
    static_assert(!TURNS || MB == 1);
    constexpr int SPAN = scaled_blocks || MB > 1 ? 1 : 2, SPANS = STAGE_K / MX_BLOCK / SPAN;  // blocks that are decoded at once
    // Of a thread that multiplies; what is left of 3 x 168 is for one that loads.
    constexpr int registers = (MB + 1 + scaled_blocks) * 4 * NT > 160 ? 224 : 200;
    constexpr int ahead = MB == 1 && registers == 200 ? 2 : 1;  // stages whose codes are on their way to a thread
    SHARED_ARENA(arena, sizeof(Shared));
    Shared& shared = *reinterpret_cast<Shared*>(arena);
    const int thread = opaque(threadIdx.x), group = thread / GROUP_THREADS;
    const int n0 = blockIdx.x * features, N = output.N, K = weights.K;
    const int live = min(tile.count - tile.first, TOKENS), features_live = min(N - n0, features);
    const long long first_row = static_cast<long long>(tile.problem) * N + n0;
    if (thread < SCALE_GROUPS) shared.extreme[thread] = -1;
    constexpr int warps = GROUP_THREADS / WARP;
    if (thread < STAGES) {
        open_meeting(shared.there[thread], warps);
        open_meeting(shared.used[thread], TURNS ? warps : WIDE_GROUPS * warps);
        if (TURNS && thread < WIDE_GROUPS) {
            open_meeting(shared.left_there[thread], warps);
            open_meeting(shared.left_used[thread], warps);
        }
        publish_shared();
    }
    __syncthreads();  // the meetings are open

    const int chunks = (K + STAGE_K - 1) / STAGE_K;
    if (group == WIDE_GROUPS) {
        keep_registers<3 * 168 - WIDE_GROUPS * registers>();
        const std::uint8_t* const all_codes = weights.codes + first_row * (K / 2);
        CodesAhead<features, 1> codes[ahead];  // of stages that are on their way
        const auto read_codes = [&](CodesAhead<features, 1>& codes, int c) {
            codes.read(all_codes, min(c, chunks - 1), K, features_live);
        };
        const auto scales_from = [&](int c) {
#pragma unroll 1
            for (int n = thread % GROUP_THREADS; n < features; n += GROUP_THREADS)
                load_scales(&shared.scales[c / SCALES_OF % SCALE_GROUPS][n], weights, first_row + n, n < features_live, c * STAGE_K);
        };
        const auto look_at_scales = [&](int c) {  // each thread at what it brought
            const int left = K / MX_BLOCK - c * (STAGE_K / MX_BLOCK), at = c / SCALES_OF % SCALE_GROUPS;
#pragma unroll 1
            for (int n = thread % GROUP_THREADS; n < features_live; n += GROUP_THREADS)
                if (has_extreme<T>(shared.scales[at][n], left)) shared.extreme[at] = c / SCALES_OF;
        };
        scales_from(0);
        scales_from(SCALES_OF);
        commit_async();
#pragma unroll
        for (int c = 0; c < ahead; ++c) read_codes(codes[c], c);
        wait_async<0>();
        look_at_scales(0);
        look_at_scales(SCALES_OF);
        const auto load_all = [&](auto routed_rows) {
            constexpr bool routed = decltype(routed_rows)::value;
            const int first_token = tile.problem * tile.rows->x_step + tile.first;
            const Tokens<TOKENS, 4> tokens = {&shared.token_rows[thread % GROUP_THREADS]};
            if (routed) tokens.find(tile, live, K);
            const auto tell = [&](int n) {
                publish_shared();
                arrive(shared.there[n % STAGES]);
            };
            const auto load = [&](int n, CodesAhead<features, 1>& codes) {
                auto* stage = &shared.stages[n % STAGES];
                auto& there = shared.there[n % STAGES];
                const uint4* const all_tokens = reinterpret_cast<const uint4*>(x);
                if (n >= STAGES - 2) meet();
                if (n >= STAGES) await(shared.used[n % STAGES], n / STAGES - 1);
                if (!routed) bring_tiles<TOKENS>(stage->tokens, map, first_token, n * STAGE_K, there);
                else if ((n + 1) * STAGE_K <= K) tokens.template load<true, 1>(stage, all_tokens, n, K, live);
                else tokens.template load<false, 1>(stage, all_tokens, n, K, live);
                if (n > 0 && n % SCALES_OF == 0) scales_from(n + SCALES_OF);
                commit_async();
                codes.write(stage->codes, 0);
                if (!routed) arrive(there);  // the engine tells of the tokens
                read_codes(codes, n + ahead);
                wait_async<1>();  // the stage before has arrived
                if (n > 1 && n % SCALES_OF == 1) look_at_scales(n - 1 + SCALES_OF);
                if (routed && n > 0) tell(n - 1);
            };
#pragma unroll 1
            for (int n = 0; n < chunks; n += ahead)
#pragma unroll
                for (int i = 0; i < ahead; ++i)
                    if (i == 0 || n + i < chunks) load(n + i, codes[i]);
            wait_async<0>();
            if (routed) tell(chunks - 1);
        };
        if (tile.rows->offsets != nullptr) load_all(std::true_type());
        else load_all(std::false_type());
        for (int left = min(chunks, STAGES - 2); left > 0; --left) meet();
        __syncthreads();  // all stages have been used
        __syncthreads();
    } else {
        keep_registers<registers>();
        if (thread < live) shared.written[thread] = tile.y_row(thread);
        const int lane = thread % 32, g = lane / 4, t = lane % 4;
        const int place = thread % GROUP_THREADS, part = TURNS ? shuffle(group, 0) : 0;
        const int first_feature = (TURNS ? 0 : group * MB * GROUP_ROWS) + place / 32 * 16 + g;
        float total[MB][OWN][4] = {};  // by turns of the rows from 8 OWN part on
        Operand32<T> operands[2][SPAN];  // one for the tensor core, one that is being decoded
        std::uint32_t words[2], now[2];  // scale bytes of a stage, of this lane's two rows: of what is decoded, of what is multiplied
        float scales[2] = {1, 1};        // of the block whose sum joins the total next
        float sums[1 + scaled_blocks][NT][4];
        std::uint32_t codes[SPAN][2];    // what is decoded next
        const std::uint32_t codes_at = first_feature * (STAGE_K / 2) + lane_codes_at(g, t);
        const auto fetch = [&](int c, int at, int mb, int span) {
            const std::uint32_t row_at = opaque(codes_at);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = mb * GROUP_ROWS + 8 * i;
#pragma unroll
                for (int s = 0; s < SPAN; ++s)
                    codes[s][i] = read_now(shared.stages[at].codes[0] + (row_at ^ 16 * (span * SPAN + s)) + row * (STAGE_K / 2));
                if (span == 0)
                    words[i] = read_now(reinterpret_cast<const std::uint32_t*>(
                                            &shared.scales[c / SCALES_OF % SCALE_GROUPS][row_at / (STAGE_K / 2) + row]) +
                                        c % SCALES_OF);
            }
        };
        const auto extreme = [&](int c) { return shared.extreme[c / SCALES_OF % SCALE_GROUPS] == c / SCALES_OF; };
        bool careful;  // whether a stage or the next one, of which it decodes what comes first, has extreme scales
        const auto add_left = [&](int c) {  // the other's chunk c
            await(shared.left_there[1 - part], c / STEP);
            float4 sums_left[OWN];
#pragma unroll
            for (int j = 0; j < OWN; ++j) sums_left[j] = shared.left[1 - part][j][place];
            arrive(shared.left_used[1 - part]);
#pragma unroll
            for (int j = 0; j < OWN; ++j) {
                const float values[4] = {sums_left[j].x, sums_left[j].y, sums_left[j].z, sums_left[j].w};
#pragma unroll
                for (int r = 0; r < 4; ++r) total[0][j][r] = __fadd_rn(total[0][j][r], values[r]);
            }
        };
        const auto leave_and_add = [&](int c) {  // this warpgroup's, of which the other half is left
            if (c >= STEP) await(shared.left_used[part], c / STEP - 1);
#pragma unroll
            for (int half = 0; half < STEP; ++half)
#pragma unroll
                for (int j = 0; j < OWN; ++j) {
                    const float(&sum)[4] = sums[0][half * OWN + j];
                    if (half != part) shared.left[part][j][place] = make_float4(sum[0], sum[1], sum[2], sum[3]);
                    else
#pragma unroll
                        for (int r = 0; r < 4; ++r) total[0][j][r] = __fadd_rn(total[0][j][r], sum[r]);
                }
            arrive(shared.left_there[part]);
        };
        const auto multiply = [&](int c, auto any) {
            constexpr bool any_scale = decltype(any)::value;
            const int at = c % STAGES, next = min(c + STEP, chunks - 1), at_next = next % STAGES;
            const auto& stage = shared.stages[at];
            const Columns tokens[] = {columns_of(stage.tokens[0]), columns_of(stage.tokens[1])};
#pragma unroll
            for (int mb = 0; mb < MB; ++mb) {
#pragma unroll
                for (int span = 0; span < SPANS; ++span) {
                    auto& sum = sums[scaled_blocks && !any_scale ? span % 2 : 0];
                    // Past K there are zeros, which change no bit, and past the features nobody's rows; on the CPU both are left out.
                    const bool whose = TURNS || (group * MB + mb) * GROUP_ROWS < features_live;
                    if (span == 0) now[0] = words[0], now[1] = words[1];
                    group_fence();
#pragma unroll
                    for (int half = 0; half < 2 * SPAN; ++half) {
                        const int step = 2 * SPAN * span + half;
                        const bool first = half == 0 && (span == 0 || scaled_blocks), wanted = whose && c * STAGE_K + step * MMA_K < K;
                        group_step<T, NT>(sum, operands[span % 2][half / 2].a[half % 2], tokens[step / 4], step % 4, first, wanted ? live : 0);
                    }
                    group_commit();
                    if (mb == MB - 1 && span == SPANS - 2 && c + STEP < chunks) {
                        if (!TURNS) meet();
                        await(shared.there[at_next], next / STAGES);
                    }
                    if (mb == MB - 1 && span == SPANS - 1 && (c + 2 * STEP) % SCALES_OF < 2 * STEP)
                        careful = extreme(c + STEP) || extreme(c + 2 * STEP);
                    if (TURNS && span == SPANS - 1 && c > 0) add_left(c - 1);
                    if (any_scale) group_wait<0>(sum);
                    else group_wait<1>(sums[(span + 1) % 2 * scaled_blocks]);  // what was multiplied before is done
                    if constexpr (scaled_blocks && !any_scale) {
                        if (span > 0 || mb > 0) add_chunks<T, any_scale>(total[span > 0 ? mb : mb - 1], sums[(span + 1) % 2], scales);
                    }
                    if (scaled_blocks) {
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const std::uint32_t byte = Operand32<T>::byte_of(now[i], span);
                            scales[i] = any_scale ? decode_scale(byte) : plain_scale(byte);
                        }
                    }
                    if constexpr (scaled_blocks && any_scale) add_chunks<T, any_scale>(total[mb], sum, scales);
#pragma unroll
                    for (int s = 0; s < SPAN; ++s)
                        operands[(span + 1) % 2][s].template decode<any_scale>(codes[s], words, (span + 1) % SPANS * SPAN + s);
                    const int ahead_by = span + 2, from = mb + ahead_by / SPANS;
                    fetch(c + from / MB * STEP, from / MB > 0 ? at_next : at, from % MB, ahead_by % SPANS);
                }
                if (scaled_blocks && (any_scale || mb + 1 < MB)) continue;
                group_wait<0>(sums[scaled_blocks ? (SPANS - 1) % 2 : 0]);
                if (mb + 1 == MB) arrive(shared.used[at]);
                if constexpr (TURNS) leave_and_add(c);
                else add_chunks<T, any_scale>(total[mb], sums[scaled_blocks ? (SPANS - 1) % 2 : 0], scales);
            }
            if (scaled_blocks && any_scale) arrive(shared.used[at]);
        };
        const auto meet_after = [&](int c) {  // by turns
            if (TURNS && c < chunks - 1) meet();
        };
        meet();
        if (part > 0) meet_after(0);
        if (part < chunks) {
            await(shared.there[part], 0);
            fetch(part, part, 0, 0);
#pragma unroll
            for (int s = 0; s < SPAN; ++s) operands[0][s].template decode<true>(codes[s], words, s);
            fetch(part, part, 0, 1);
            careful = extreme(part);
        }
#pragma unroll 1
        for (int c = part; c < chunks; c += STEP) {
            if (careful) multiply(c, std::true_type());
            else multiply(c, std::false_type());
            meet_after(c);
            meet_after(c + 1);
        }

        // Results go through shared memory so that neighbours are written together.
        constexpr int pitch = features + 4;
        float* results = reinterpret_cast<float*>(arena);
        static_assert(sizeof shared.stages >= sizeof(float) * pitch * TOKENS);
        __syncthreads();  // all stages have been used
        if (TURNS && (chunks - 1) % STEP != part) add_left(chunks - 1);
#pragma unroll
        for (int mb = 0; mb < MB; ++mb)
#pragma unroll
            for (int j = 0; j < OWN; ++j)
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    results[(8 * (part * OWN + j) + 2 * t + r % 2) * pitch + first_feature + mb * GROUP_ROWS + 8 * (r / 2)] = total[mb][j][r];
        __syncthreads();
        write_rows<features, WIDE_GROUPS * GROUP_THREADS>(output, tile, n0, live, results, pitch, thread,
                                                          [&](int m) { return shared.written[m]; });
    }
}

// A tile that is not full takes no more columns than it needs, in steps; where rows follow one another, only if all do.
template <class T, int MB, int TOKENS, bool TURNS>
__device__ inline void multiply_wide_rows(const Output<T>& output, const T* __restrict__ x, const TensorMap& map, const Packed<T>& weights,
                                          const Tile& tile) {
    constexpr int FEWER = TOKENS - 32;
    if constexpr (FEWER > 0) {
        if (tile.count - (tile.rows->offsets != nullptr ? tile.first : 0) <= FEWER) return multiply_wide_rows<T, MB, FEWER, TURNS>(output, x, map, weights, tile);
    }
    multiply_wide_tile<T, MB, TOKENS, TURNS>(output, x, map, weights, tile);
}

template <class T, int MB, int TOKENS, bool TURNS = false>
__device__ inline void multiply_wide(const Output<T>& output, const T* __restrict__ x, const TensorMap& map, const Packed<T>& weights,
                                     const Rows& rows) {
    Tile tile;
    if (locate(tile, rows, TOKENS)) multiply_wide_rows<T, MB, TOKENS, TURNS>(output, x, map, weights, tile);
}
