// The path for many rows on Hopper: warpgroup instructions, the same bits as the other paths (gemm.cuh).
//
// A block owns 128 MB features x TOKENS rows. One warpgroup loads stages of 128 k, up to four under way at once: the tokens
// as the tensor core reads them (wgmma.cuh), the codes with their bytes in the order of the lanes (gemm_stage.cuh). Two
// multiply, 64 MB features each: a lane decodes its part of 32 k into registers while the tensor core works on the 32
// before. Stages with extreme scales, which want more operations, go through a copy of the loop.
//
// Every thread of the block meets at the same barriers, 4 and one a stage, whatever the data. Barrier c, of stage c:
//   the loading warpgroup      before: stages c and c + 1 have arrived, and whether scales of stage c + 4 are extreme is
//                              known where c % 4 is 2.   after: codes of stage c + 2 and tokens of c + 3 are written over
//                              stages c - 2 and c - 1; where c % 4 is 0, scales of stages c + 4 to c + 7 over c - 4 to c - 1
//   the multiplying ones       before: all of stage c - 1 has been read.   after, until barrier c + 1: the rest of stage
//                              c, the beginning of stage c + 1, and the scales of both
// These two come to barrier c at different places of stage c, half a chunk apart, so that while one adds a chunk to its
// totals, which it must have to itself, the tensor core has work of the other.
#pragma once

#include "gemm_stage.cuh"

constexpr int WIDE_GROUPS = 2, WIDE_THREADS = (WIDE_GROUPS + 1) * GROUP_THREADS, WIDE_STAGES = 4;

template <int MB, int TOKENS> struct WideShared {
    static constexpr int features = WIDE_GROUPS * MB * GROUP_ROWS;
    Stage<features, TOKENS> stages[WIDE_STAGES];
    uint4 scales[2][features];        // of 512 k each: what is at work, and what comes next
    uint4 token_rows[GROUP_THREADS];  // of loading threads, see Tokens
    long long written[TOKENS];        // rows of y
    int extreme[2];                   // which 512 k, of those with an even and an odd number, had extreme scales last
};

template <class T, bool any_scale, int NT>
__device__ inline void add_chunks(float (&total)[NT][4], const float (&sum)[NT][4], const float (&scale)[2]) {
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) total[j][r] = join_chunk<T, !any_scale>(total[j][r], sum[j][r], scale[r / 2]);
}

// One tile of up to TOKENS rows.
template <class T, int MB, int TOKENS>
__device__ inline void multiply_wide_tile(const Output<T>& output, const T* __restrict__ x, const Packed<T>& weights, const Tile& tile) {
    using Shared = WideShared<MB, TOKENS>;
    constexpr int NT = TOKENS / 8, features = Shared::features, blocks = STAGE_K / MX_BLOCK;
    constexpr bool scaled_blocks = Order<T>::chunk == MX_BLOCK;
    static_assert(scaled_blocks || Order<T>::chunk == STAGE_K);
    // Of a thread that multiplies; what is left of 3 x 168 is for one that loads. With more it brings codes further ahead.
    constexpr int registers = (MB + 1 + scaled_blocks) * 4 * NT > 160 ? 224 : 200, ahead = registers == 200 ? 2 : 1;
    SHARED_ARENA(arena, sizeof(Shared));
    Shared& shared = *reinterpret_cast<Shared*>(arena);
    const int thread = opaque(threadIdx.x), group = thread / GROUP_THREADS;
    const int n0 = blockIdx.x * features, N = output.N, K = weights.K;
    const int live = min(tile.count - tile.first, TOKENS), features_live = min(N - n0, features);
    const long long first_row = static_cast<long long>(tile.problem) * N + n0;
    if (thread < 2) shared.extreme[thread] = -1;
    __syncthreads();

    const int chunks = (K + STAGE_K - 1) / STAGE_K;
    if (group == WIDE_GROUPS) {
        keep_registers<3 * 168 - WIDE_GROUPS * registers>();
        const uint4* const all_codes = reinterpret_cast<const uint4*>(weights.codes) + first_row * (K / MX_BLOCK);
        const uint4* const all_tokens = reinterpret_cast<const uint4*>(x);
        CodesAhead<features, 1> codes[ahead];  // of stages that are on their way
        const auto read_codes = [&](CodesAhead<features, 1>& codes, int c) {
            if ((c + 1) * STAGE_K <= K) codes.template read<true>(all_codes, c, K, features_live);
            else codes.template read<false>(all_codes, min(c, chunks - 1), K, features_live);
        };
        const Tokens<TOKENS, 4> tokens = {&shared.token_rows[thread % GROUP_THREADS]};
        tokens.find(tile, live, K);
        const auto load = [&](int c) {
            auto* stage = &shared.stages[c % WIDE_STAGES];
            if ((c + 1) * STAGE_K <= K) tokens.template load<true, 1>(stage, all_tokens, c, K, live);
            else if (c < chunks) tokens.template load<false, 1>(stage, all_tokens, c, K, live);
        };
        const auto scales_from = [&](int c) {
#pragma unroll 1
            for (int n = thread % GROUP_THREADS; n < features; n += GROUP_THREADS)
                load_scales(&shared.scales[c / SCALES_OF % 2][n], weights, first_row + n, n < features_live, c * STAGE_K);
        };
        const auto look_at_scales = [&](int c) {  // each thread at what it brought
            const int left = K / MX_BLOCK - c * (STAGE_K / MX_BLOCK);
#pragma unroll 1
            for (int n = thread % GROUP_THREADS; n < features_live; n += GROUP_THREADS)
                if (has_extreme<T>(shared.scales[c / SCALES_OF % 2][n], left)) shared.extreme[c / SCALES_OF % 2] = c / SCALES_OF;
        };
#pragma unroll
        for (int c = 0; c < ahead; ++c) read_codes(codes[c], c);
        scales_from(0);
#pragma unroll 1
        for (int c = 0; c < WIDE_STAGES - 1; ++c) {
            load(c);
            commit_async();
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            codes[c % ahead].write(shared.stages[c].codes, 0);
            read_codes(codes[c % ahead], c + ahead);
        }
        wait_async<WIDE_STAGES - 2>();
        look_at_scales(0);
        publish_shared();
        __syncthreads();  // the first stage has arrived
        const auto bring = [&](int c, CodesAhead<features, 1>& codes) {
            wait_async<WIDE_STAGES - 3>();
            if (c % SCALES_OF == 2) look_at_scales(c + 2);
            publish_shared();
            __syncthreads();  // this stage and the next have arrived; the one before has been read
            if (c % SCALES_OF == 0) scales_from(c + SCALES_OF);
            codes.write(shared.stages[(c + 2) % WIDE_STAGES].codes, 0);
            load(c + WIDE_STAGES - 1);
            commit_async();
            read_codes(codes, c + 2 + ahead);
        };
#pragma unroll 1
        for (int c = 0; c < chunks; c += ahead)
#pragma unroll
            for (int i = 0; i < ahead; ++i)
                if (i == 0 || c + i < chunks) bring(c + i, codes[i]);
        wait_async<0>();
        __syncthreads();
        __syncthreads();
    } else {
        keep_registers<registers>();
        if (thread < live) shared.written[thread] = tile.y_row(thread);
        const int lane = thread % 32, g = lane / 4, t = lane % 4;
        const int first_feature = group * MB * GROUP_ROWS + thread % GROUP_THREADS / 32 * 16 + g;
        const int meets = 2 * group;  // in which block of a stage: the other's pause for additions lies half a chunk away
        float total[MB][NT][4] = {};
        Operand32<T> operands[2];        // one for the tensor core, one that is being decoded
        std::uint32_t words[2], now[2];  // scale bytes of a stage, of this lane's two rows: of what is decoded, of what is multiplied
        float scales[2] = {1, 1};        // of the block whose sum joins the total next
        float sums[1 + scaled_blocks][NT][4];
        std::uint32_t codes[2];          // what is decoded next
        const std::uint32_t codes_at = first_feature * (STAGE_K / 2) + lane_codes_at(g, t);
        const auto fetch = [&](int c, int mb, int block) {
            const std::uint32_t at = opaque(codes_at);
            const unsigned char* from = shared.stages[c % WIDE_STAGES].codes[0] + (at ^ 16 * block);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = mb * GROUP_ROWS + 8 * i;
                codes[i] = *reinterpret_cast<const std::uint32_t*>(from + row * (STAGE_K / 2));
                if (block == 0)
                    words[i] = reinterpret_cast<const std::uint32_t*>(
                        &shared.scales[c / SCALES_OF % 2][at / (STAGE_K / 2) + row])[c % SCALES_OF];
            }
        };
        const auto extreme = [&](int c) { return shared.extreme[c / SCALES_OF % 2] == c / SCALES_OF; };
        bool careful;  // whether a stage or the one after it, of which it decodes the first 32 k, has extreme scales
        const auto multiply = [&](int c, auto any) {
            constexpr bool any_scale = decltype(any)::value;
            const auto& stage = shared.stages[c % WIDE_STAGES];
            const Columns tokens[] = {columns_of(stage.tokens[0]), columns_of(stage.tokens[1])};
#pragma unroll
            for (int mb = 0; mb < MB; ++mb) {
#pragma unroll
                for (int block = 0; block < blocks; ++block) {
                    auto& sum = sums[scaled_blocks && !any_scale ? block % 2 : 0];
                    // Past K there are zeros, which change no bit, and past the features nobody's rows; on the CPU both are left out.
                    const bool wanted = c * STAGE_K + block * MX_BLOCK < K && (group * MB + mb) * GROUP_ROWS < features_live;
                    const int columns = wanted ? live : 0;
                    if (block == 0) now[0] = words[0], now[1] = words[1];
                    group_fence();
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int step = 2 * block + half;
                        const bool first = half == 0 && (block == 0 || scaled_blocks);
                        group_step<T, NT>(sum, operands[block % 2].a[half], tokens[step / 4], step % 4, first, columns);
                    }
                    group_commit();
                    if (mb == 0 && block % 2 == 0 && block == meets) __syncthreads();  // see above
                    if (mb == MB - 1 && block == 3 && (c + 2) % SCALES_OF < 2) careful = extreme(c + 1) || extreme(c + 2);
                    if (any_scale) group_wait<0>(sum);
                    else group_wait<1>(sums[(block + 1) % 2 * scaled_blocks]);  // the block before is done
                    if (scaled_blocks && !any_scale && (block > 0 || mb > 0))
                        add_chunks<T, any_scale>(total[block > 0 ? mb : mb - 1], sums[(block + 1) % 2], scales);
                    if (scaled_blocks) {
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const std::uint32_t byte = Operand32<T>::byte_of(now[i], block);
                            scales[i] = any_scale ? decode_scale(byte) : plain_scale(byte);
                        }
                    }
                    if (scaled_blocks && any_scale) add_chunks<T, any_scale>(total[mb], sum, scales);
                    operands[(block + 1) % 2].template decode<any_scale>(codes, words, (block + 1) % blocks);
                    const int next = block + 2, part = mb + next / blocks;
                    fetch(c + part / MB, part % MB, next % blocks);
                }
                if (scaled_blocks && (any_scale || mb + 1 < MB)) continue;
                group_wait<0>(sums[scaled_blocks ? (blocks - 1) % 2 : 0]);
                add_chunks<T, any_scale>(total[mb], sums[scaled_blocks ? (blocks - 1) % 2 : 0], scales);
            }
        };
        __syncthreads();  // the first stage has arrived
        fetch(0, 0, 0);
        operands[0].template decode<true>(codes, words, 0);
        fetch(0, 0, 1);
        careful = extreme(0);
#pragma unroll 1
        for (int c = 0; c < chunks; ++c) {
            if (careful) multiply(c, std::true_type());
            else multiply(c, std::false_type());
        }

        // Results go through shared memory so that neighbours are written together.
        constexpr int pitch = features + 4;
        float* results = reinterpret_cast<float*>(arena);
        static_assert(sizeof shared.stages >= sizeof(float) * pitch * TOKENS);
        __syncthreads();
#pragma unroll
        for (int mb = 0; mb < MB; ++mb)
#pragma unroll
            for (int j = 0; j < NT; ++j)
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    results[(8 * j + 2 * t + r % 2) * pitch + first_feature + mb * GROUP_ROWS + 8 * (r / 2)] = total[mb][j][r];
        __syncthreads();
        write_rows<features, WIDE_GROUPS * GROUP_THREADS>(output, tile, n0, live, results, pitch, thread,
                                                          [&](int m) { return shared.written[m]; });
    }
}

// A tile that is not full takes no more columns than it needs, in steps.
template <class T, int MB, int TOKENS>
__device__ inline void multiply_wide_rows(const Output<T>& output, const T* __restrict__ x, const Packed<T>& weights, const Tile& tile) {
    constexpr int FEWER = TOKENS - 32;
    if constexpr (FEWER > 0) {
        if (tile.count - tile.first <= FEWER) return multiply_wide_rows<T, MB, FEWER>(output, x, weights, tile);
    }
    multiply_wide_tile<T, MB, TOKENS>(output, x, weights, tile);
}

template <class T, int MB, int TOKENS>
__device__ inline void multiply_wide(const Output<T>& output, const T* __restrict__ x, const Packed<T>& weights, const Rows& rows) {
    Tile tile;
    if (locate(tile, rows, TOKENS)) multiply_wide_rows<T, MB, TOKENS>(output, x, weights, tile);
}
