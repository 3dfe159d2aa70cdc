// What a warp of attention_wide.cuh does with the scores of its 16 rows.
#pragma once

#include "attention.cuh"
#include "wgmma.cuh"

constexpr int TILE_BYTES = CHUNK * 128;  // of 64 rows and 64 columns

// Where the 16-byte piece of a row lies in tiles of 64 columns.
__device__ inline int place(int row, int piece) { return piece / 8 * TILE_BYTES + swizzled(row, piece % 8); }

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

// A division that is rare; of many columns, so that it is not inlined.
__device__ OUT_OF_LINE float divided(float a, float b) { return __fdiv_rn(a, b); }

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
