// What a warp of attention_wide.cuh does with the scores of its 16 rows.
#pragma once

#include "attention.cuh"
#include "wgmma.cuh"

// Of 64 columns: a warpgroup's rows of queries, and the rows of a chunk of keys or values.
constexpr int QUERY_TILE = GROUP_ROWS * 128, TILE_BYTES = CHUNK * 128;

// Where the 16-byte piece of a row lies in such tiles.
template <int tile_bytes> __device__ inline int place(int row, int piece) { return piece / 8 * tile_bytes + swizzled(row, piece % 8); }

// Which keys of a chunk a row sees: bit 16 e + j for key `first` + 8 j + e.
__device__ inline std::uint32_t seen_of(int first, int low, int high) {
    std::uint32_t seen = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const auto below = [&](int limit) { return min(max((limit - first - e + 7) >> 3, 0), CHUNK / 8); };
        const int from = below(low), to = max(below(high), from);
        seen |= ((1u << to) - (1u << from)) << (CHUNK / 8 * e);
    }
    return seen;
}

// The bases of 16 rows a warp from their scores of a chunk. seen: seen_of both rows; where not masked all are. Scores of what a
// row does not see become -Inf.
template <bool masked>
__device__ inline void find_bases(float (&top)[2], float (&s)[CHUNK / 8][4], const Scores& scores, const std::uint32_t (&seen)[2]) {
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
            if (masked && (seen[r / 2] >> (CHUNK / 8 * (r % 2) + j) & 1) == 0) s[j][r] = -infinity();
            largest[r / 2][j % PARTS] = Larger()(largest[r / 2][j % PARTS], s[j][r]);
        }
#pragma unroll
    for (int half = 0; half < 2; ++half)
        top[half] = scores.base_of(warp_reduce<4>(Larger()(largest[half][0], largest[half][1]), Larger()));
}

// add_specials of values in tiles.
template <class T>
__device__ OUT_OF_LINE float add_specials_wide(float sum, const unsigned char* values, const std::uint32_t* weights, int column,
                                               int low, int high) {
    for (int n = max(low, 0); n < min(high, CHUNK); ++n) {
        const T value = reinterpret_cast<const T*>(values + place<TILE_BYTES>(n, column / 8))[column % 8];
        if (!special<T>(*reinterpret_cast<const std::uint16_t*>(&value))) continue;
        sum = __fadd_rn(sum, __fmul_rn(widen(reinterpret_cast<const T*>(weights)[n]), widen(value)));
    }
    return sum;
}
