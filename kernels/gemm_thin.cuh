// The path for up to 32 rows and many features: a block owns 16 WARPS features x TOKENS rows, a warp multiplies 16 of the
// features, and codes and tokens come to shared memory by asynchronous copies, some rounds ahead. The bits are those of
// the other paths (gemm.cuh).
//
// SPLIT 1: a warp has all of K, 256 of it in a round; several blocks on a multiprocessor take turns at waiting.
// SPLIT 4, where such blocks are too few: four warps take the chunks of K in turn, one each in a round of 512 k. They leave
// chunks' sums in shared memory; in the next round each of the four adds, in ascending order, those of its quarter of the
// numbers.
//
// Every thread of the block meets at one barrier a round, whatever the data. Between the barriers of rounds r and r + 1
//   read        the stage of round r, which had arrived; the sums of round r - 1
//   written     the stage of round r + STAGES - 1, over that of r - 1; the sums of round r, over those of r - 2
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "gemm_stage.cuh"
#include "matrix.cuh"
#include "out_of_line.cuh"

template <class T, int TOKENS, int WARPS, int SPLIT, int STAGES> struct ThinShared {
    static constexpr int features = 16 * WARPS, parts = SPLIT > 1 ? SPLIT : TOKENS > 32 ? 1 : 2;  // chunks of a round
    static constexpr int sums = STAGE_K / Order<T>::chunk, own = TOKENS / 2 / SPLIT;  // of a warp and round; numbers of a lane
    struct alignas(128) Part {
        unsigned char tokens[STAGE_K / SWIZZLE_K][TOKENS * 2 * SWIZZLE_K];  // as wgmma.cuh has them
        unsigned char codes[features][STAGE_K / 2];
    };
    struct alignas(own < 4 ? 4 * own : 16) Own {
        float of[own];
    };
    using Sums = Own[sums][SPLIT][WARPS * WARP];  // of a round and of a warp's share of K: by chunk and by who adds them

    Part stages[STAGES][parts];

    static constexpr std::size_t size = sizeof(Part[STAGES][parts]) + (SPLIT > 1 ? sizeof(Sums[2][SPLIT]) : 0);
    __device__ Sums& sums_of(int round, int share) {
        return reinterpret_cast<Sums*>(stages + STAGES)[round % 2 * SPLIT + share];
    }
};

// One tile of up to TOKENS rows.
template <class T, int TOKENS, int WARPS, int SPLIT, int STAGES>
__device__ inline void multiply_thin_tile(const Output<T>& output, const T* __restrict__ x, const Packed<T>& weights, const Tile& tile) {
    using Shared = ThinShared<T, TOKENS, WARPS, SPLIT, STAGES>;
    using Part = typename Shared::Part;
    using Own = typename Shared::Own;
    constexpr int NT = TOKENS / 8, features = Shared::features, blocks_of = STAGE_K / MX_BLOCK, THREADS = WARPS * SPLIT * WARP;
    constexpr int PARTS = Shared::parts, CHUNKS = PARTS / SPLIT, OWN = Shared::own;
    constexpr bool scaled_blocks = Order<T>::chunk == MX_BLOCK, together = TOKENS == 64;
    static_assert(!together || (WARPS == 4 && SPLIT == 1 && !scaled_blocks));
    SHARED_ARENA(arena, Shared::size);
    Shared& shared = *reinterpret_cast<Shared*>(arena);
    const int thread = threadIdx.x, lane = thread % WARP, g = lane / 4, t = lane % 4;
    const int warp = shuffle(thread / WARP, 0), mine = warp % WARPS, share = warp / WARPS, row = 16 * mine + g;
    const int n0 = blockIdx.x * features, N = output.N, K = weights.K, blocks = K / MX_BLOCK;
    const int live = min(tile.count - tile.first, TOKENS), features_live = min(N - n0, features);
    const long long first_row = static_cast<long long>(tile.problem) * N + n0;
    const int chunks = (K + STAGE_K - 1) / STAGE_K, rounds = (chunks + PARTS - 1) / PARTS;

    // A thread's pieces of 16 bytes of a stage: of every code_rows-th feature the same block, of every token_rows-th row the
    // same 8 k. Past the features, the rows and K there are zeros.
    constexpr int code_pieces = PARTS * blocks_of, code_rows = THREADS / code_pieces, all_rows = THREADS / (2 * 8 * PARTS);
    constexpr int token_pieces = PARTS * STAGE_K / 8, token_rows = all_rows < TOKENS ? all_rows : TOKENS;
    static_assert(code_rows % 8 == 0 && features % code_rows == 0 && token_rows % 4 == 0 && TOKENS % token_rows == 0);
    static_assert((token_rows * token_pieces == THREADS));
    const int block = thread % code_pieces, feature = thread / code_pieces;
    const int piece = thread % token_pieces, token = thread / token_pieces;
    const uint4* codes_from = reinterpret_cast<const uint4*>(weights.codes) + (first_row + feature) * blocks + block;
    const uint4* tokens_from = reinterpret_cast<const uint4*>(x) + piece;
    std::uint32_t token_at[TOKENS / token_rows];
#pragma unroll
    for (int i = 0; i < TOKENS / token_rows; ++i) {
        const int m = token + i * token_rows;
        token_at[i] = (m < live ? static_cast<std::uint32_t>(tile.x_row(m)) : 0) * (K / 8);
    }
    constexpr int stage_bytes = sizeof shared.stages[0];
    const int codes_to = block / blocks_of * sizeof(Part) + offsetof(Part, codes) + feature * (STAGE_K / 2) +
                         16 * piece_of(feature, block % blocks_of);
    const int tokens_to = piece / 16 * sizeof(Part) + piece % 16 / 8 * sizeof shared.stages[0][0].tokens[0] + swizzled(token, piece % 8);
    int blocks_left = blocks - block, pieces_left = K / 8 - piece, to_stage = 0;
    const auto load = [&]() {
        unsigned char* stage = arena + to_stage;
#pragma unroll
        for (int i = 0; i < features / code_rows; ++i)
            copy_async<16>(stage + codes_to + i * code_rows * (STAGE_K / 2), codes_from + static_cast<std::uint32_t>(i * code_rows * blocks),
                           blocks_left > 0 && feature + i * code_rows < features_live);
#pragma unroll
        for (int i = 0; i < TOKENS / token_rows; ++i)  // a row 4 further on has its pieces in the other half of a line
            copy_async<16>(stage + (i * token_rows % 8 == 0 ? tokens_to : tokens_to ^ 64) + i * token_rows * 128,
                           pieces_on(tokens_from, token_at[i]), pieces_left > 0 && token + i * token_rows < live);
        commit_async();
        codes_from += code_pieces, blocks_left -= code_pieces;
        tokens_from += token_pieces, pieces_left -= token_pieces;
        to_stage = to_stage == (STAGES - 1) * stage_bytes ? 0 : to_stage + stage_bytes;
    };

    // Scale bytes of this lane's two features: lane t of four reads CHUNKS of every round, two rounds before they are wanted.
    const bool pairs = opaque(static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(weights.scales)) | blocks) % 2 == 0;
    const std::uint8_t* scales_from[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
        scales_from[i] = weights.scales + (first_row + min(row + 8 * i, features_live - 1)) * blocks + share * blocks_of + CHUNKS * t;
    int scales_left = blocks - share * blocks_of - CHUNKS * t;
    std::uint32_t ahead[2][2];
    const auto read_scales = [&](std::uint32_t (&to)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            to[i] = 0x7f7f;  // past K there are zeros to multiply, and a scale that is not extreme
            if (CHUNKS == 2 && pairs && scales_left > 0) to[i] = *reinterpret_cast<const std::uint16_t*>(scales_from[i]);
            else if (scales_left > 0) to[i] = scales_from[i][0] | (CHUNKS == 2 && scales_left > 1 ? scales_from[i][1] : 0x7f) << 8;
            if (CHUNKS == 1) to[i] &= 0xff;
            scales_from[i] += PARTS * blocks_of;
        }
        scales_left -= PARTS * blocks_of;
    };
    read_scales(ahead[0]);
    read_scales(ahead[1]);
#pragma unroll 1
    for (int r = 0; r < STAGES - 1; ++r) load();

    float total[4 * NT / SPLIT] = {};  // of a lane's numbers 4 j + i (mma.cuh), from share x OWN on
    const auto add = [&](int r, int shares) {
#pragma unroll
        for (int from = 0; from < SPLIT; ++from) {
            if (from >= shares) break;
#pragma unroll
            for (int c = 0; c < Shared::sums; ++c) {
                const Own sum = shared.sums_of(r, from)[c][share][mine * WARP + lane];
#pragma unroll
                for (int i = 0; i < OWN; ++i) total[i] = __fadd_rn(total[i], sum.of[i]);
            }
        }
    };
    // One chunk of 128 k by the warpgroup that the block is; words: its scale bytes, which may be extreme if `careful`.
    const auto multiply_together = [&](const auto& part, const std::uint32_t (&words)[2], int left, bool careful) {
        Operand32<T> operands[2];  // one for the tensor core, one that is being decoded
        float sum[NT][4];
#pragma unroll
        for (int b = 0; b < blocks_of; ++b) {
            uint4 codes[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) codes[i] = *reinterpret_cast<const uint4*>(part.codes[row + 8 * i] + 16 * piece_of(g, b));
            const std::uint32_t lanes[2] = {lane_codes(codes[0], t), lane_codes(codes[1], t)};
            if (careful) operands[b % 2].template decode<true>(lanes, words, b);
            else operands[b % 2].template decode<false>(lanes, words, b);
            const Columns tokens = columns_of(part.tokens[b / 2]);
            group_fence();
#pragma unroll
            for (int half = 0; half < 2; ++half)  // past K there are zeros, which change no bit; on the CPU they are left out
                group_step<T, NT>(sum, operands[b % 2].a[half], tokens, b % 2 * 2 + half, b + half == 0, b < left ? live : 0);
            group_commit();
            if (b + 1 < blocks_of) group_wait<1>(sum);  // the block before is done
        }
        group_wait<0>(sum);
#pragma unroll
        for (int e = 0; e < 4 * NT; ++e) total[e] = __fadd_rn(total[e], sum[e / 4][e % 4]);
    };
    // The same by a warp; any_scale: they may be extreme.
    const auto multiply = [&](int r, const Part& part, const std::uint32_t (&words)[2], auto any) {
        constexpr bool any_scale = decltype(any)::value;
        float sum[1][NT][4];
        uint4 codes[2][2];  // of what is decoded and of the block after it
        const auto fetch = [&](int b) {
#pragma unroll
            for (int i = 0; i < 2; ++i) codes[b % 2][i] = *reinterpret_cast<const uint4*>(part.codes[row + 8 * i] + 16 * piece_of(g, b));
        };
        fetch(0);
#pragma unroll
        for (int b = 0; b < blocks_of; ++b) {
            if (b + 1 < blocks_of) fetch(b + 1);
            const std::uint32_t lanes[2] = {lane_codes(codes[b % 2][0], t), lane_codes(codes[b % 2][1], t)};
            Operand32<T> operand;
            operand.template decode<any_scale>(lanes, words, b);
            std::uint32_t tokens[NT][4];
#pragma unroll
            for (int j = 0; j < NT; ++j)
                load_matrices(tokens[j], [&](int place) { return part.tokens[b / 2] + swizzled(8 * j + place % 8, b % 2 * 4 + place / 8); });
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                std::uint32_t a[1][4], columns[NT][2];
#pragma unroll
                for (int i = 0; i < 4; ++i) a[0][i] = operand.a[half][i];
#pragma unroll
                for (int j = 0; j < NT; ++j) columns[j][0] = tokens[j][2 * half], columns[j][1] = tokens[j][2 * half + 1];
#pragma unroll
                for (int e = 0; e < 4 * NT; ++e)
                    if (half == 0 && (scaled_blocks || b == 0)) sum[0][e / 4][e % 4] = 0;
                mma_step(Fragments<T, 1, NT>{sum, a, columns});
            }
            if (!scaled_blocks && b + 1 < blocks_of) continue;
            float scales[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const std::uint32_t byte = Operand32<T>::byte_of(words[i], b);
                scales[i] = any_scale ? decode_scale(byte) : plain_scale(byte);
            }
            if constexpr (SPLIT == 1) {
#pragma unroll
                for (int e = 0; e < 4 * NT; ++e) total[e] = join_chunk<T, !any_scale>(total[e], sum[0][e / 4][e % 4], scales[e % 4 / 2]);
            } else {
#pragma unroll
                for (int owner = 0; owner < SPLIT; ++owner) {
                    Own own;
#pragma unroll
                    for (int i = 0; i < OWN; ++i) {
                        const int e = owner * OWN + i;
                        own.of[i] = Order<T>::scale_operand ? sum[0][e / 4][e % 4] : __fmul_rn(sum[0][e / 4][e % 4], scales[e % 4 / 2]);
                    }
                    shared.sums_of(r, share)[scaled_blocks ? b : 0][owner][mine * WARP + lane] = own;
                }
            }
        }
    };

    int from_stage = 0;
#pragma unroll 1
    for (int r = 0; r < rounds; ++r) {
        wait_async<STAGES - 2>();
        std::uint32_t words[CHUNKS][2], found = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            std::uint32_t lanes[4];
            quad_gather(lanes, ahead[0][i]);
            ahead[0][i] = ahead[1][i];
#pragma unroll
            for (int j = 0; j < CHUNKS; ++j) {
                words[j][i] = CHUNKS == 2 ? lanes[2 * j] | lanes[2 * j + 1] << 16
                                          : (lanes[0] | lanes[1] << 8) | (lanes[2] | lanes[3] << 8) << 16;
                found |= extreme_scales<T>(words[j][i], 0xffffffffu);
            }
        }
        const bool careful = vote(found != 0) != 0;
        if (together) publish_shared();
        __syncthreads();  // the stage has arrived; the one before has been read
        load();
        read_scales(ahead[1]);
        const Part* const parts = reinterpret_cast<const Part*>(arena + from_stage) + share;
        from_stage = from_stage == (STAGES - 1) * stage_bytes ? 0 : from_stage + stage_bytes;
#pragma unroll
        for (int j = 0; j < CHUNKS; ++j) {
            if (r * PARTS + share + j >= chunks) break;
            if constexpr (together) multiply_together(parts[j], words[j], blocks - (r * PARTS + j) * blocks_of, careful);
            else if (careful) multiply(r, parts[j], words[j], std::true_type());
            else multiply(r, parts[j], words[j], std::false_type());
        }
        if (SPLIT > 1 && r > 0) add(r - 1, SPLIT);
    }
    wait_async<0>();
    __syncthreads();
    if (SPLIT > 1) add(rounds - 1, chunks - (rounds - 1) * SPLIT);

    // Results go through shared memory so that neighbours are written together.
    constexpr int pitch = features + 4;
    float* results = reinterpret_cast<float*>(arena);
    static_assert(sizeof shared.stages >= sizeof(float) * pitch * TOKENS);
#pragma unroll
    for (int i = 0; i < 4 * NT / SPLIT; ++i) {
        const int e = SPLIT > 1 ? share * OWN + i : i;
        results[(e / 4 * 8 + 2 * t + e % 2) * pitch + row + e % 4 / 2 * 8] = total[i];
    }
    __syncthreads();
    write_rows<features, THREADS>(output, tile, n0, live, results, pitch, thread, [&](int m) { return tile.y_row(m); });
}

// A tile that is not full takes no more columns than it needs: of TOKENS rows, the next fewer; 0: there are none.
template <int TOKENS, int SPLIT> constexpr int THIN_FEWER = SPLIT > 1 ? 0 : TOKENS == 64 ? 40 : TOKENS - 8;

template <class T, int TOKENS, int WARPS, int SPLIT, int STAGES> constexpr std::size_t thin_shared() {
    constexpr std::size_t own = ThinShared<T, TOKENS, WARPS, SPLIT, STAGES>::size;
    if constexpr (THIN_FEWER<TOKENS, SPLIT> == 0) return own;
    else return std::max(own, thin_shared<T, THIN_FEWER<TOKENS, SPLIT>, WARPS, SPLIT, STAGES>());
}

template <class T, int TOKENS, int WARPS, int SPLIT, int STAGES>
__device__ inline void multiply_thin_rows(const Output<T>& output, const T* __restrict__ x, const Packed<T>& weights, const Tile& tile);

// Half takes all registers there are: inlined, copies for fewer columns made the one for all of them keep some in memory.
// bfloat16 has enough, and a call costs a tile of few columns 3 to 6 % of its time.
template <class T, int TOKENS, int WARPS, int SPLIT, int STAGES>
__device__ OUT_OF_LINE void multiply_thin_apart(Output<T> output, const T* __restrict__ x, Packed<T> weights, Tile tile) {
    multiply_thin_rows<T, TOKENS, WARPS, SPLIT, STAGES>(output, x, weights, tile);
}

template <class T, int TOKENS, int WARPS, int SPLIT, int STAGES>
__device__ inline void multiply_thin_rows(const Output<T>& output, const T* __restrict__ x, const Packed<T>& weights, const Tile& tile) {
    constexpr int FEWER = THIN_FEWER<TOKENS, SPLIT>;
    if constexpr (FEWER > 0) {
        if (tile.count - tile.first <= FEWER) {
            if constexpr (std::is_same_v<T, __half>)
                return multiply_thin_apart<T, FEWER, WARPS, SPLIT, STAGES>(output, x, weights, tile);
            else
                return multiply_thin_rows<T, FEWER, WARPS, SPLIT, STAGES>(output, x, weights, tile);
        }
    }
    multiply_thin_tile<T, TOKENS, WARPS, SPLIT, STAGES>(output, x, weights, tile);
}

template <class T, int TOKENS, int WARPS, int SPLIT, int STAGES>
__device__ inline void multiply_thin(const Output<T>& output, const T* __restrict__ x, const Packed<T>& weights, const Rows& rows) {
    Tile tile;
    if (locate(tile, rows, TOKENS)) multiply_thin_rows<T, TOKENS, WARPS, SPLIT, STAGES>(output, x, weights, tile);
}
