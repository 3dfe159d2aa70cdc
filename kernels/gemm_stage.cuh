// What the two paths for many rows on Hopper share (gemm_wide.cuh, gemm_split.cuh): stages of 128 k in shared memory and
// how a warpgroup brings them, scales of 512 k, and the writing of results.
#pragma once

#include "activation.cuh"
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

// The same number, of which the compiler knows nothing: what follows from it is computed where it is wanted, and takes no
// register before. A spilled one comes back slowly here, where codes run through the little first-level cache that is left.
__device__ inline std::uint32_t opaque(std::uint32_t value) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(value));
#endif
    return value;
}

// Pieces of 16 bytes further on, in two instructions: the compiler would add 64-bit indices first.
__device__ inline const uint4* pieces_on(const uint4* from, std::uint32_t pieces) {
#ifdef __CUDACC__
    const uint4* to;
    asm("mad.wide.u32 %0, %1, 16, %2;" : "=l"(to) : "r"(pieces), "l"(from));
    return to;
#else
    return from + pieces;
#endif
}

// Of a row of codes. What is left of a line of 128 bytes comes into the second-level cache with it; it is wanted next.
__device__ inline uint4 read_ahead(const uint4* from) {
#ifdef __CUDACC__
    uint4 to;
    asm volatile("ld.global.nc.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
                 : "l"(from));
    return to;
#else
    return *from;
#endif
}

// Of shared memory, read here: the compiler would wait until it is wanted.
__device__ inline std::uint32_t read_now(const void* shared) {
#ifdef __CUDACC__
    std::uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))));
    return word;
#else
    return *static_cast<const std::uint32_t*>(shared);
#endif
}

// A loading thread's share of the tokens: of rows that lie `apart`, every LANES-th of a stage's 16 pieces of 16 bytes. LANES
// neighbouring lanes take neighbouring pieces of a row: 4 for few addresses, 16 for whole lines of memory. Eight lanes in
// turn write to different banks.
template <int TOKENS, int LANES> struct Tokens {
    static constexpr int pieces = STAGE_K / 8, apart = GROUP_THREADS / LANES, count = TOKENS / apart;
    static_assert(count <= 4 && (LANES == 4 || LANES == pieces));
    uint4* rows;  // this thread's, in shared memory: where they begin in x, in pieces

    static __device__ int row(int thread) {
        const int m = thread % GROUP_THREADS / LANES;
        return LANES == 4 ? m / 8 * 8 + m % 8 / 2 + m % 2 * 4 : m;
    }
    __device__ void find(const Tile& tile, int live, int K) const {
        std::uint32_t at[4] = {};
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const int m = row(threadIdx.x) + i * apart;
            at[i] = (m < live ? static_cast<std::uint32_t>(tile.x_row(m)) : 0) * (K / 8) + threadIdx.x % LANES;
        }
        *rows = make_uint4(at[0], at[1], at[2], at[3]);
    }
    // To PARTS neighbouring stages, of which c is the first; whole: all below K. A piece past the rows or K arrives as
    // zeros, and nothing is read.
    template <bool whole, int PARTS, int FEATURES>
    __device__ void load(Stage<FEATURES, TOKENS>* stages, const uint4* __restrict__ x, int c, int K, int live) const {
        constexpr int tile = sizeof stages->tokens[0];
        const uint4 four = *rows;
        const std::uint32_t at[] = {four.x, four.y, four.z, four.w};
        const int thread = opaque(threadIdx.x), piece = thread % LANES, m = row(thread);
        const int place = piece / 8 * tile + swizzled(m, piece % 8);
        unsigned char* const to[] = {stages->tokens[0] + place, stages->tokens[0] + (place ^ 64)};
        const auto copy = [&](int i, bool valid) {
            const uint4* from = pieces_on(x + c * pieces, at[i]);
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                if (!whole && (c + part) * STAGE_K >= K) break;  // what nobody reads is left out
#pragma unroll
                for (int p = 0; p < pieces; p += LANES)
                    copy_async<16>(to[p / 4 % 2] + part * sizeof *stages + p / 8 * tile + i * apart * 128, from + part * pieces + p,
                                   valid && (whole || (c + part) * STAGE_K + 8 * (piece + p) < K));
            }
        };
        if (live == TOKENS) {
#pragma unroll
            for (int i = 0; i < count; ++i) copy(i, true);
        } else {
#pragma unroll
            for (int i = 0; i < count; ++i) copy(i, m + i * apart < live);
        }
    }
};

// Which piece of a feature's row holds a block of codes: eight neighbouring rows' pieces of a block lie in different banks.
__device__ inline int piece_of(int feature, int block) { return block ^ (feature >> 1 & 3); }

// Where in a feature's row the codes lie that lane t decodes of block 0; of another block, at this number ^ 16 block. g: the
// feature's number modulo 8.
__device__ inline std::uint32_t lane_codes_at(int g, int t) { return 16 * piece_of(g, 0) + 4 * t; }

// A thread's share of a stage's codes, on its way through registers: a block is four words, whose bytes change places so
// that word t has byte t of each, which are the codes that lane t of four decodes (operand.cuh). Past the features and K
// there is whatever another row or block has: rows that are nobody's, and products with tokens that are zero.
template <int FEATURES, int PARTS> struct CodesAhead {
    static constexpr int pieces = STAGE_K / MX_BLOCK, apart = GROUP_THREADS / pieces;
    uint4 held[FEATURES / apart][PARTS];

    // Of PARTS neighbouring stages, of which c is the first and begins below K.
    __device__ void read(const std::uint8_t* __restrict__ codes, int c, int K, int features) {
        const std::uint32_t thread = opaque(threadIdx.x), n = thread % GROUP_THREADS / pieces, row = K / 2;
        const std::uint32_t at = c * (STAGE_K / 2) + thread % pieces * sizeof(uint4);
#pragma unroll
        for (int i = 0; i < FEATURES / apart; ++i)
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                held[i][part] = read_ahead(reinterpret_cast<const uint4*>(
                    codes + (min(n + i * apart, features - 1u) * row + min(at + part * (STAGE_K / 2), row - 16u))));
    }
    __device__ void write(unsigned char (&to)[FEATURES][STAGE_K / 2], int part) const {
        const int thread = opaque(threadIdx.x), block = thread % pieces, n = thread % GROUP_THREADS / pieces;
#pragma unroll
        for (int i = 0; i < FEATURES / apart; ++i) {
            const uint4 codes = held[i][part];
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
    if (left >= SCALES) {
#pragma unroll
        for (int i = 0; i < 4; ++i) found |= extreme_scales<T>(words[i], 0xffffffffu);
        return found != 0;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int mine = min(max(left - 4 * i, 0), 4);
        found |= extreme_scales<T>(words[i], mine == 4 ? 0xffffffffu : (1u << 8 * mine) - 1);
    }
    return found != 0;
}

// A tile's `live` rows of FEATURES totals from n0 on, which lie `pitch` apart in shared memory, to y; row_of(m): y's row of the
// tile's row m. A thread of THREADS has the same eight neighbouring features of every row that is its turn, and writes them as
// one piece or two where y's rows allow it, as SWIGLU demands.
template <int FEATURES, int THREADS, class T, class RowOf>
__device__ inline void write_rows(const Output<T>& output, const Tile& tile, int n0, int live, const float* totals, int pitch, int thread,
                                  RowOf row_of) {
    constexpr int LANES = FEATURES / 8, ROWS = THREADS / LANES;
    static_assert(THREADS % LANES == 0);
    const int at = thread % LANES * 8, n = n0 + at, N = output.N;
    if (n >= N) return;
    const auto addresses = reinterpret_cast<std::uintptr_t>(output.y) | reinterpret_cast<std::uintptr_t>(output.bias);
    if (N % 8 != 0 || addresses % sizeof(uint4) != 0) {
        for (int m = thread / LANES; m < live; m += ROWS)
            for (int i = 0; i < min(8, N - n); ++i) output.write(tile, row_of(m), n + i, totals[m * pitch + at + i]);
        return;
    }
    float4 more[2] = {};
    if (output.bias != nullptr) {
        const float4* const bias = reinterpret_cast<const float4*>(output.bias_of(tile) + n);
        more[0] = bias[0], more[1] = bias[1];
    }
#pragma unroll 2
    for (int m = thread / LANES; m < live; m += ROWS) {
        const float4* const from = reinterpret_cast<const float4*>(totals + m * pitch + at);
        const long long to = row_of(m) * N + n;
        float4 piece[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            piece[i] = make_float4(output.with_bias(from[i].x, more[i].x), output.with_bias(from[i].y, more[i].y),
                                   output.with_bias(from[i].z, more[i].z), output.with_bias(from[i].w, more[i].w));
        if (output.form == FLOAT32) {
            float4* const four = reinterpret_cast<float4*>(static_cast<float*>(output.y) + to);
            four[0] = piece[0], four[1] = piece[1];
            continue;
        }
        union {
            uint4 words;
            T values[8];
        } made = {make_uint4(pack<T>(piece[0].x, piece[0].y), pack<T>(piece[0].z, piece[0].w), pack<T>(piece[1].x, piece[1].y),
                             pack<T>(piece[1].z, piece[1].w))};
        if (output.form == SAME) {
            *reinterpret_cast<uint4*>(static_cast<T*>(output.y) + to) = made.words;
            continue;
        }
        float gate[4], up[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) gate[i] = widen(made.values[2 * i]), up[i] = widen(made.values[2 * i + 1]);
        std::uint32_t pairs[2];
        swiglu_pairs<T>(pairs, gate, up, output.alpha, output.limit);
        *reinterpret_cast<uint2*>(static_cast<T*>(output.y) + to / 2) = make_uint2(pairs[0], pairs[1]);
    }
}
