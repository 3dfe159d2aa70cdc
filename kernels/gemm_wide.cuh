// The path for many rows on Hopper: warpgroup instructions, the same bits as the other paths (gemm.cuh).
//
// A block owns 128 MB features x TOKENS rows. One warpgroup loads stages of 128 k, four under way at once: the tokens as
// the tensor core reads them (wgmma.cuh), the codes as they are. Two multiply, 64 MB features each: a lane decodes its
// part of 32 k into registers while the tensor core works on the 32 before.
#pragma once

#include "async.cuh"
#include "gemm.cuh"
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
};

// A code's sign and three other bits, put where T has its sign and its lowest exponent and highest mantissa bits, are
// code / 2^14 (half) or code / 2^126 (bfloat16): codes 0 and 0.5 are subnormal there as they are in E2M1. A product with
// `unit` makes them the code; every product here is exact or past the range, which is Inf.
template <class T> struct Placed;
template <> struct Placed<__nv_bfloat16> {
    static constexpr int shift = 6;
    static constexpr std::uint32_t mask = 0x01c001c0u, unit = 0x7e807e80u;
};
template <> struct Placed<__half> {
    static constexpr int shift = 3;
    static constexpr std::uint32_t mask = 0x0e000e00u, unit = 0x74007400u;
};

// Byte t of a word of codes, a nibble at the top of either half; below them whatever was there.
__device__ inline std::uint32_t nibbles_up(std::uint32_t word, int t) { return __byte_perm(word << 4, word, t * 0x1111 + 0x4400); }
template <class T> __device__ inline std::uint32_t placed(std::uint32_t nibbles) {
    return (nibbles & 0x80008000u) | (nibbles >> Placed<T>::shift & Placed<T>::mask);
}

// 2^(byte - 127) as a pair of bfloat16; subnormal for byte 0, NaN for 255.
__device__ inline std::uint32_t scale_pair_of(std::uint32_t byte) {
    const std::uint32_t half = byte == 0 ? 0x0040u : byte == 255 ? 0x7fffu : byte << 7;
    return half * 0x00010001u;
}

// The same where the scale byte is 128 or more: rare, and one factor would not do.
template <class T> __device__ inline std::uint32_t decode_large(std::uint32_t word, int t, std::uint32_t byte) {
    if constexpr (!Order<T>::scale_operand) return operand<T>(word >> 8 * t & 0xff, decode_scale(byte));
    return multiply_pairs(multiply_pairs(placed<T>(nibbles_up(word, t)), Placed<T>::unit, T()), scale_pair_of(byte), T());
}

// A lane's operand for 32 k: two rows, two steps.
template <class T> struct Operand32 {
    std::uint32_t a[2][4];

    // codes: of either row; words: its scale bytes, of which `block` counts. Element by element in stages: a lane's
    // arithmetic overlaps.
    __device__ void decode(const uint4 (&codes)[2], const std::uint32_t (&words)[2], int block, int t) {
        const std::uint32_t word[2][4] = {{codes[0].x, codes[0].y, codes[0].z, codes[0].w},
                                          {codes[1].x, codes[1].y, codes[1].z, codes[1].w}};
        std::uint32_t byte[2], factor[2], value[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            byte[i] = words[i] >> 8 * block & 0xff;
            // Up to byte 128, unit and scale in one: 2^(byte - 1).
            factor[i] = Order<T>::scale_operand ? byte[i] * 0x00800080u + 126 * 0x00800080u : Placed<T>::unit;
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) value[e % 2][e / 2] = nibbles_up(word[e % 2][e / 2], t);
#pragma unroll
        for (int e = 0; e < 8; ++e) value[e % 2][e / 2] = placed<T>(value[e % 2][e / 2]);
#pragma unroll
        for (int e = 0; e < 8; ++e) a[e / 4][e % 4] = multiply_pairs(value[e % 2][e / 2], factor[e % 2], T());
        if ((byte[0] | byte[1]) >= 128) {
#pragma unroll
            for (int e = 0; e < 8; ++e)
                if (byte[e % 2] >= 128) a[e / 4][e % 4] = decode_large<T>(word[e % 2][e / 2], t, byte[e % 2]);
        }
    }
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

// Chunks' sums times their scales join the totals. Where no scale is extreme the product of a half chunk's sum is exact
// (a multiple of 2^-25 below 2^24 before), so that one fused operation has the same bits.
template <class T, int NT>
__device__ inline void add_chunks(float (&total)[NT][4], const float (&sum)[NT][4], const float (&scale)[2]) {
    if (!Order<T>::scale_operand && fminf(scale[0], scale[1]) >= 0x1p-77f && fmaxf(scale[0], scale[1]) <= 0x1p103f) {
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) total[j][r] = __fmaf_rn(sum[j][r], scale[r / 2], total[j][r]);
    } else {
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) total[j][r] = add_chunk<T>(total[j][r], sum[j][r], scale[r / 2]);
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
        scales_from(0);
#pragma unroll 1
        for (int c = 0; c < WIDE_STAGES - 1; ++c) {
            load(c);
            commit_async();
        }
#pragma unroll 1
        for (int c = 0; c < chunks; ++c) {
            wait_async<WIDE_STAGES - 3>();
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
        float total[MB][NT][4] = {};
        Operand32<T> operands[2];  // one for the tensor core, one that is being decoded
        std::uint32_t words[2], now[2];  // scale bytes of a stage, of this lane's two rows: of what is decoded, of what is multiplied
        float scales[2] = {1, 1};        // of the block whose sum joins the total next
        float sums[1 + scaled_blocks][NT][4];
        uint4 codes[2];
        const auto fetch = [&](int c, int row, int block) {
            const Stage& stage = shared.stages[c % WIDE_STAGES];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                codes[i] = *reinterpret_cast<const uint4*>(stage.codes[row + 8 * i] + 16 * block);
                if (block == 0)
                    words[i] = reinterpret_cast<const std::uint32_t*>(&shared.scales[c / SCALES_OF % 2][row + 8 * i])[c % SCALES_OF];
            }
        };
#pragma unroll 1
        for (int c = 0; c < chunks; ++c) {
            __syncthreads();  // see above
            const Stage& stage = shared.stages[c % WIDE_STAGES];
            if (c == 0) {
                fetch(0, first_feature, 0);
                operands[0].decode(codes, words, 0, t);
                now[0] = words[0], now[1] = words[1];
            }
#pragma unroll
            for (int mb = 0; mb < MB; ++mb) {
                const int row = first_feature + mb * GROUP_ROWS;
#pragma unroll
                for (int block = 0; block < blocks; ++block) {
                    auto& sum = sums[scaled_blocks ? block % 2 : 0];
                    // Past K there are zeros, which change no bit; on the CPU they are left out.
                    const int columns = c * WIDE_K + block * MX_BLOCK < K ? live : 0;
                    group_fence();
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int step = 2 * block + half;
                        const bool first = half == 0 && (block == 0 || scaled_blocks);
                        group_step<T, NT>(sum, operands[block % 2].a[half], stage.tokens[step / 4], step % 4, first, columns);
                    }
                    group_commit();
                    if (block + 1 < blocks) fetch(c, row, block + 1);
                    else if (mb + 1 < MB) fetch(c, row + GROUP_ROWS, 0);
                    else fetch(c + 1, first_feature, 0);
                    group_wait<1>(sums[(block + 1) % 2 * scaled_blocks]);  // the block before is done
                    if (scaled_blocks && (block > 0 || mb > 0)) add_chunks<T, NT>(total[block > 0 ? mb : mb - 1], sums[(block + 1) % 2], scales);
                    if (scaled_blocks) {
#pragma unroll
                        for (int i = 0; i < 2; ++i) scales[i] = decode_scale(now[i] >> 8 * block & 0xff);
                    }
                    operands[(block + 1) % 2].decode(codes, words, (block + 1) % blocks, t);
                    if (block + 1 == blocks) {
#pragma unroll
                        for (int i = 0; i < 2; ++i) now[i] = words[i];
                    }
                }
                if (!scaled_blocks || mb + 1 == MB) {
                    group_wait<0>(sums[scaled_blocks ? (blocks - 1) % 2 : 0]);
                    add_chunks<T, NT>(total[mb], sums[scaled_blocks ? (blocks - 1) % 2 : 0], scales);
                }
            }
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
