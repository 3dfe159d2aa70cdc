// The path for many rows on Hopper: warpgroup instructions, the same bits as the other paths (gemm.cuh).
//
// A block owns 128 MB features x TOKENS rows. One warpgroup loads stages of 128 k, four under way at once: the tokens as
// the tensor core reads them (wgmma.cuh), the codes as they are. Two multiply, 64 MB features each: a lane decodes its
// part of 32 k into registers while the tensor core works on the 32 before.
#pragma once

#include "async.cuh"
#include "operand.cuh"
#include "wgmma.cuh"

#ifdef __CUDACC__
#define SHARED_ARENA(name, size) extern __shared__ __align__(1024) unsigned char name[]
#else
#define SHARED_ARENA(name, size) __shared__ __align__(1024) unsigned char name[size]
#endif

constexpr int WIDE_GROUPS = 2, WIDE_THREADS = (WIDE_GROUPS + 1) * GROUP_THREADS, WIDE_STAGES = 4;
constexpr int WIDE_K = 128;                                            // of a stage
constexpr int SCALES = sizeof(uint4), SCALES_OF = SCALES * MX_BLOCK / WIDE_K;  // scale bytes read at once; stages they cover

template <int MB, int TOKENS> struct alignas(1024) WideStage {
    static constexpr int features = WIDE_GROUPS * MB * GROUP_ROWS;
    unsigned char tokens[WIDE_K / SWIZZLE_K][TOKENS * 2 * SWIZZLE_K];
    unsigned char codes[features][WIDE_K / 2];
};
template <int MB, int TOKENS> struct WideShared {
    WideStage<MB, TOKENS> stages[WIDE_STAGES];
    uint4 scales[2][WideStage<MB, TOKENS>::features];  // of 512 k each: what is at work, and what comes next
    std::uint32_t token_rows[8][TOKENS / 8];           // where row 8 j + i of the tokens begins: [i][j], in pieces of 16 bytes
    int extreme[2];                                    // which 512 k, of those with an even and an odd number, had extreme scales last
};

// A thread's share of what the loading warpgroup brings of a stage: 16-byte pieces of tokens and of codes. A piece past
// the rows or K arrives as zeros, and nothing is read.
template <class T, int MB, int TOKENS>
__device__ inline void load_stage(WideShared<MB, TOKENS>& shared, int c, const uint4* __restrict__ tokens, const uint4* __restrict__ codes,
                                  int K, int live, int features) {
    using Stage = WideStage<MB, TOKENS>;
    constexpr int token_pieces = WIDE_K / 8, code_pieces = WIDE_K / 2 / 16;  // of a row
    constexpr int apart = GROUP_THREADS / token_pieces, codes_apart = GROUP_THREADS / code_pieces;
    Stage& stage = shared.stages[c % WIDE_STAGES];
    const int thread = threadIdx.x % GROUP_THREADS, begin = c * WIDE_K;
    {
        const int m = thread / token_pieces, at = thread % token_pieces, rows = begin + 8 * at < K ? live - m : 0;
        unsigned char* to = stage.tokens[at / 8] + swizzled(m, at % 8);
        const uint4* from = tokens + begin / 8 + at;
#pragma unroll
        for (int i = 0; i < TOKENS / apart; i += 4) {
            const uint4 four = *reinterpret_cast<const uint4*>(&shared.token_rows[m][i]);
            const std::uint32_t row[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) copy_async<16>(to + (i + j) * apart * 128, from + row[j], (i + j) * apart < rows);
        }
    }
    const int n = thread / code_pieces, at = thread % code_pieces, rows = begin + 32 * at < K ? features - n : 0;
    const uint4* from = codes + n * static_cast<long long>(K / 32) + begin / 32 + at;
#pragma unroll
    for (int i = 0; i < Stage::features / codes_apart; ++i, from += codes_apart * (K / 32))
        copy_async<16>(stage.codes[n + i * codes_apart] + 16 * at, from, i * codes_apart < rows);
}

// One feature's 16 scale bytes from k = `begin` on to shared memory, zeros past K. A row of them begins anywhere: the widest
// reads that its length allows.
template <class T>
__device__ inline void load_scales(uint4* to, const Packed<T>& weights, long long row, bool valid, int begin) {
    const int blocks = weights.K / MX_BLOCK, first = begin / MX_BLOCK, left = valid ? blocks - first : 0;
    const std::uint8_t* from = weights.scales + row * blocks + first;
    const auto address = reinterpret_cast<std::uintptr_t>(weights.scales) | blocks;  // what divides both divides every row's
    if (address % SCALES == 0) {
        copy_async<SCALES>(to, from, left > 0);
    } else if (address % 2 == 0) {
        std::uint16_t pairs[SCALES / 2];
#pragma unroll
        for (int i = 0; i < SCALES / 2; ++i) pairs[i] = 2 * i < left ? reinterpret_cast<const std::uint16_t*>(from)[i] : 0;
#pragma unroll
        for (int i = 0; i < SCALES / 2; ++i) reinterpret_cast<std::uint16_t*>(to)[i] = pairs[i];
    } else {
#pragma unroll 4
        for (int i = 0; i < SCALES; ++i) reinterpret_cast<std::uint8_t*>(to)[i] = i < left ? from[i] : 0;
    }
}

// Which of 512 k's scales are extreme: said of number `q` if any of the `left` bytes of a feature is.
template <class T> __device__ inline bool has_extreme(const uint4& scales, int left) {
    const std::uint32_t words[4] = {scales.x, scales.y, scales.z, scales.w};
    std::uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int mine = min(max(left - 4 * i, 0), 4);
        found |= extreme_scales<T>(words[i], mine == 4 ? 0xffffffffu : (1u << 8 * mine) - 1);
    }
    return found != 0;
}

// Chunks' sums times their scales join the totals. Where no scale is extreme the product of a half chunk's sum is exact (a
// multiple of 2^-25 below 2^24 before), so that one fused operation has the same bits.
template <class T, bool any_scale, int NT>
__device__ inline void add_chunks(float (&total)[NT][4], const float (&sum)[NT][4], const float (&scale)[2]) {
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            if (Order<T>::scale_operand || any_scale) total[j][r] = add_chunk<T>(total[j][r], sum[j][r], scale[r / 2]);
            else total[j][r] = __fmaf_rn(sum[j][r], scale[r / 2], total[j][r]);
        }
}

// Eight neighbouring features from n on, n a multiple of 8; as one piece where y's rows allow it.
template <class T> __device__ inline void write_eight(const Output<T>& output, const Tile& tile, int m, int n, const float* totals) {
    const int N = output.N;
    if (output.float_output || n + 8 > N || N % 8 != 0 || reinterpret_cast<std::uintptr_t>(output.y) % sizeof(uint4) != 0) {
#pragma unroll
        for (int i = 0; i < 8; ++i) output.write(tile, m, n + i, totals[i]);
        return;
    }
    union {
        uint4 words;
        T values[8];
    } piece;
#pragma unroll
    for (int i = 0; i < 8; ++i) narrow(piece.values + i, output.with_bias(tile, n + i, totals[i]));
    *reinterpret_cast<uint4*>(static_cast<T*>(output.y) + tile.y_row(m) * N + n) = piece.words;
}

template <class T, int MB, int TOKENS>
__device__ inline void multiply_wide(const Output<T>& output, const T* __restrict__ x, const Packed<T>& weights, const Rows& rows) {
    using Shared = WideShared<MB, TOKENS>;
    using Stage = WideStage<MB, TOKENS>;
    constexpr int NT = TOKENS / 8, features = Stage::features, blocks = WIDE_K / MX_BLOCK;
    constexpr bool scaled_blocks = Order<T>::chunk == MX_BLOCK;
    static_assert(scaled_blocks || Order<T>::chunk == WIDE_K);
    SHARED_ARENA(arena, sizeof(Shared));
    Shared& shared = *reinterpret_cast<Shared*>(arena);
    const int thread = threadIdx.x, group = thread / GROUP_THREADS;
    const int n0 = blockIdx.x * features, N = output.N, K = weights.K;
    Tile tile;
    if (!locate(tile, rows, TOKENS)) return;
    const int live = min(tile.count - tile.first, TOKENS), features_live = min(N - n0, features);
    const long long first_row = static_cast<long long>(tile.problem) * N + n0;
    for (int m = thread; m < TOKENS; m += WIDE_THREADS)
        shared.token_rows[m % 8][m / 8] = (m < live ? static_cast<std::uint32_t>(tile.x_row(m)) : 0) * (K / 8);
    if (thread < 2) shared.extreme[thread] = -1;
    __syncthreads();

    const int chunks = (K + WIDE_K - 1) / WIDE_K;
    if (group == WIDE_GROUPS) {
        keep_registers<40>();
        const auto load = [&](int c) {
            load_stage<T, MB, TOKENS>(shared, c, reinterpret_cast<const uint4*>(x),
                                      reinterpret_cast<const uint4*>(weights.codes) + first_row * (K / 32), K, live, features_live);
        };
        const auto scales_from = [&](int c) {
#pragma unroll 1
            for (int n = thread % GROUP_THREADS; n < features; n += GROUP_THREADS)
                load_scales(&shared.scales[c / SCALES_OF % 2][n], weights, first_row + n, n < features_live, c * WIDE_K);
        };
        const auto look_at_scales = [&](int c) {  // each thread at what it brought
            const int left = K / MX_BLOCK - c * (WIDE_K / MX_BLOCK);
#pragma unroll 1
            for (int n = thread % GROUP_THREADS; n < features_live; n += GROUP_THREADS)
                if (has_extreme<T>(shared.scales[c / SCALES_OF % 2][n], left)) shared.extreme[c / SCALES_OF % 2] = c / SCALES_OF;
        };
        scales_from(0);
#pragma unroll 1
        for (int c = 0; c < WIDE_STAGES - 1; ++c) {
            load(c);
            commit_async();
        }
        wait_async<WIDE_STAGES - 2>();
        look_at_scales(0);
        publish_shared();
        __syncthreads();  // the first stage has arrived
#pragma unroll 1
        for (int c = 0; c < chunks; ++c) {
            wait_async<WIDE_STAGES - 3>();
            if (c % SCALES_OF == 2) look_at_scales(c + 2);
            publish_shared();
            __syncthreads();  // this stage and the next have arrived; the one before has been read
            if (c % SCALES_OF == 0) scales_from(c + SCALES_OF);
            load(c + WIDE_STAGES - 1);
            commit_async();
        }
        wait_async<0>();
        __syncthreads();
        __syncthreads();
    } else {
        keep_registers<232>();
        const int lane = thread % 32, g = lane / 4, t = lane % 4;
        const int first_feature = group * MB * GROUP_ROWS + thread % GROUP_THREADS / 32 * 16 + g;
        const std::uint32_t by = spread_by(t);
        const int meets = 2 * group;  // in which block of a stage: the other's pause for additions lies half a chunk away
        float total[MB][NT][4] = {};
        Operand32<T> operands[2];        // one for the tensor core, one that is being decoded
        std::uint32_t words[2], now[2];  // scale bytes of a stage, of this lane's two rows: of what is decoded, of what is multiplied
        float scales[2] = {1, 1};        // of the block whose sum joins the total next
        float sums[1 + scaled_blocks][NT][4];
        uint4 codes[2];  // what is decoded next
        const auto fetch = [&](int c, int row, int block) {
            const Stage& stage = shared.stages[c % WIDE_STAGES];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                codes[i] = *reinterpret_cast<const uint4*>(stage.codes[row + 8 * i] + 16 * block);
                if (block == 0)
                    words[i] = reinterpret_cast<const std::uint32_t*>(&shared.scales[c / SCALES_OF % 2][row + 8 * i])[c % SCALES_OF];
            }
        };
        const auto multiply = [&](int c, auto extreme) {
            constexpr bool any_scale = decltype(extreme)::value;
            Stage& stage = shared.stages[c % WIDE_STAGES];
            const Columns tokens[] = {columns_of(stage.tokens[0]), columns_of(stage.tokens[1])};
#pragma unroll
            for (int mb = 0; mb < MB; ++mb) {
                const int row = first_feature + mb * GROUP_ROWS;
#pragma unroll
                for (int block = 0; block < blocks; ++block) {
                    auto& sum = sums[scaled_blocks && !any_scale ? block % 2 : 0];
                    // Past K there are zeros, which change no bit; on the CPU they are left out.
                    const int columns = c * WIDE_K + block * MX_BLOCK < K ? live : 0;
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
                    operands[(block + 1) % 2].template decode<any_scale>(codes, words, (block + 1) % blocks, by);
                    const int next = block + 2;
                    if (next < blocks) fetch(c, row, next);
                    else if (mb + 1 < MB) fetch(c, row + GROUP_ROWS, next % blocks);
                    else fetch(c + 1, first_feature, next % blocks);
                }
                if (scaled_blocks && (any_scale || mb + 1 < MB)) continue;
                group_wait<0>(sums[scaled_blocks ? (blocks - 1) % 2 : 0]);
                add_chunks<T, any_scale>(total[mb], sums[scaled_blocks ? (blocks - 1) % 2 : 0], scales);
            }
        };
        const auto extreme = [&](int c) { return shared.extreme[c / SCALES_OF % 2] == c / SCALES_OF; };
        __syncthreads();  // the first stage has arrived
        fetch(0, first_feature, 0);
        operands[0].template decode<true>(codes, words, 0, by);
        fetch(0, first_feature, 1);
#pragma unroll 1
        for (int c = 0; c < chunks; ++c) {
            if (extreme(c) || extreme(c + 1)) multiply(c, std::true_type());
            else multiply(c, std::false_type());
        }

        // Results go through shared memory so that neighbours are written together.
        constexpr int pitch = features + 4;
        float* results = reinterpret_cast<float*>(arena);
        static_assert(sizeof(Stage) * WIDE_STAGES >= sizeof(float) * pitch * TOKENS);
        __syncthreads();
#pragma unroll
        for (int mb = 0; mb < MB; ++mb)
#pragma unroll
            for (int j = 0; j < NT; ++j)
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    results[(8 * j + 2 * t + r % 2) * pitch + first_feature + mb * GROUP_ROWS + 8 * (r / 2)] = total[mb][j][r];
        __syncthreads();
        for (int i = thread; i < live * (features / 8); i += WIDE_GROUPS * GROUP_THREADS) {
            const int m = i / (features / 8), n = i % (features / 8) * 8;
            write_eight(output, tile, m, n0 + n, results + m * pitch + n);
        }
    }
}
