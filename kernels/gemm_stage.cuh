// What the two paths for many rows on Hopper share (gemm_wide.cuh, gemm_split.cuh): stages of 128 k in shared memory and
// how a warpgroup brings them, scales of 512 k, and the writing of results.
#pragma once

#include "async.cuh"
#include "operand.cuh"
#include "wgmma.cuh"

#ifdef __CUDACC__
#define SHARED_ARENA(name, size) extern __shared__ __align__(1024) unsigned char name[]
#else
#define SHARED_ARENA(name, size) __shared__ __align__(1024) unsigned char name[size]
#endif

constexpr int STAGE_K = 128;
constexpr int SCALES = sizeof(uint4), SCALES_OF = SCALES * MX_BLOCK / STAGE_K;  // scale bytes read at once; stages they cover

template <int FEATURES, int TOKENS> struct alignas(1024) Stage {
    unsigned char tokens[STAGE_K / SWIZZLE_K][TOKENS * 2 * SWIZZLE_K];
    unsigned char codes[FEATURES][STAGE_K / 2];
};

// Where the rows of a tile begin in x, in pieces of 16 bytes: row 8 j + i at [i][j].
template <int TOKENS> struct TokenRows {
    std::uint32_t at[8][TOKENS / 8];

    __device__ void find(const Tile& tile, int live, int K) {
        for (int m = threadIdx.x; m < TOKENS; m += blockDim.x)
            at[m % 8][m / 8] = (m < live ? static_cast<std::uint32_t>(tile.x_row(m)) : 0) * (K / 8);
    }
};

// A thread's share of a stage's tokens, in pieces of 16 bytes. A piece past the rows or K arrives as zeros, and nothing is
// read.
template <int FEATURES, int TOKENS>
__device__ inline void load_tokens(Stage<FEATURES, TOKENS>& stage, const TokenRows<TOKENS>& token_rows, int c,
                                   const uint4* __restrict__ tokens, int K, int live) {
    constexpr int pieces = STAGE_K / 8, apart = GROUP_THREADS / pieces;  // of a row; rows that a thread's pieces lie apart
    const int thread = threadIdx.x % GROUP_THREADS, begin = c * STAGE_K;
    const int m = thread / pieces, at = thread % pieces, rows = begin + 8 * at < K ? live - m : 0;
    unsigned char* to = stage.tokens[at / 8] + swizzled(m, at % 8);
    const uint4* from = tokens + begin / 8 + at;
#pragma unroll
    for (int i = 0; i < TOKENS / apart; i += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(&token_rows.at[m][i]);
        const std::uint32_t row[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) copy_async<16>(to + (i + j) * apart * 128, from + row[j], (i + j) * apart < rows);
    }
}

// Which piece of a feature's row holds a block of codes: eight neighbouring rows' pieces of a block lie in different banks.
__device__ inline int piece_of(int feature, int block) { return block ^ (feature >> 1 & 3); }

// Of a block of codes of a feature, those that lane t decodes. g: the feature's number modulo 8.
__device__ inline std::uint32_t lane_codes(const unsigned char* row, int g, int block, int t) {
    return *reinterpret_cast<const std::uint32_t*>(row + 16 * piece_of(g, block) + 4 * t);
}

// A thread's share of a stage's codes, on its way through registers: a block is four words, whose bytes change places so
// that word t has byte t of each, which are the codes that lane t of four decodes (operand.cuh). Zeros past K or the
// features.
template <int FEATURES> struct CodesAhead {
    static constexpr int pieces = STAGE_K / MX_BLOCK, apart = GROUP_THREADS / pieces;
    uint4 held[FEATURES / apart];

    __device__ void read(const uint4* __restrict__ codes, int c, int K, int features) {
        const int n = threadIdx.x % GROUP_THREADS / pieces, block = threadIdx.x % pieces, k = c * STAGE_K + block * MX_BLOCK;
        const int rows = k < K ? features - n : 0;
        const uint4* from = codes + n * static_cast<long long>(K / MX_BLOCK) + k / MX_BLOCK;
#pragma unroll
        for (int i = 0; i < FEATURES / apart; ++i, from += apart * (K / MX_BLOCK)) {
            held[i] = make_uint4(0, 0, 0, 0);
            if (i * apart < rows) held[i] = *from;
        }
    }
    __device__ void write(unsigned char (&to)[FEATURES][STAGE_K / 2]) const {
        const int n = threadIdx.x % GROUP_THREADS / pieces, block = threadIdx.x % pieces;
#pragma unroll
        for (int i = 0; i < FEATURES / apart; ++i) {
            const uint4 codes = held[i];
            const std::uint32_t ab[2] = {__byte_perm(codes.x, codes.y, 0x5140), __byte_perm(codes.x, codes.y, 0x7362)};
            const std::uint32_t cd[2] = {__byte_perm(codes.z, codes.w, 0x5140), __byte_perm(codes.z, codes.w, 0x7362)};
            *reinterpret_cast<uint4*>(to[n + i * apart] + 16 * piece_of(n, block)) =
                make_uint4(__byte_perm(ab[0], cd[0], 0x5410), __byte_perm(ab[0], cd[0], 0x7632),
                           __byte_perm(ab[1], cd[1], 0x5410), __byte_perm(ab[1], cd[1], 0x7632));
        }
    }
};

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

// Whether one of the first `left` of a feature's 16 scale bytes is extreme.
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
