// MXFP4 codes as the tensor core's row operand, decoded by the lanes that hold it (wgmma.cuh). Lane 4 g + t wants byte t
// of every word of eight codes of its two rows, which is k 2t and 2t + 1 of either half of a step; here these bytes of the
// four words of a block come as one word.
//
// A pair of codes takes five operations, two of them on the logic unit. One permutation brings each nibble to the top of a
// byte and its sign, eight times over, to the byte above; one shift puts the three other bits astride the boundary of
// exponent and mantissa; a mask keeps these and one of the signs. The result is the number code / 2^126 (bfloat16) or
// code / 2^14 (half), also for the codes 0 and 0.5, which are subnormal there as they are in E2M1. One product with a
// power of two makes it the operand. Every product here is exact, or past the range, which is Inf.
#pragma once

#include "gemm.cuh"

// Byte t of every word of a block.
__device__ inline std::uint32_t lane_codes(const uint4& codes, int t) {
    const std::uint32_t which = t * 0x11 + 0x40;
    return __byte_perm(__byte_perm(codes.x, codes.y, which), __byte_perm(codes.z, codes.w, which), 0x5410);
}

template <class T> struct Placed;
template <> struct Placed<__nv_bfloat16> {
    static constexpr int shift = 2;
    static constexpr std::uint32_t mask = 0x81c081c0u, unit = 0x7e807e80u;
};
template <> struct Placed<__half> {
    static constexpr int shift = 5;
    static constexpr std::uint32_t mask = 0x8e008e00u, unit = 0x74007400u;
};

// The two codes of byte i of a word, one a half: s s s s s s s s s e e m, and four bits of whatever was there.
#ifdef __CUDACC__
__device__ inline std::uint32_t spread(std::uint32_t word, int i) {
    const std::uint32_t which = i * 0x1111 + 0xc480;  // of (word << 4, word): byte i and its sign, eight times over, of each
    std::uint32_t pair;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(pair) : "r"(word << 4), "r"(word), "r"(which));
    return pair;
}
#else
inline std::uint32_t spread(std::uint32_t word, int i) {
    const auto widened = [&](std::uint32_t bytes) {
        return static_cast<std::uint32_t>(static_cast<std::int8_t>(bytes >> 8 * i)) & 0xffff;
    };
    return widened(word << 4) | widened(word) << 16;
}
#endif
template <class T> __device__ inline std::uint32_t placed(std::uint32_t spread) { return spread << Placed<T>::shift & Placed<T>::mask; }

// 2^(byte - 127) as a pair of bfloat16, byte 1 to 254; NaN for 255.
__device__ inline std::uint32_t scale_pair_of(std::uint32_t byte) {
    const std::uint32_t half = byte == 255 ? 0x7fffu : byte << 7;
    return half * 0x00010001u;
}

// Scale bytes as the plain way of decoding takes them: bytes below 128, in half not below 3 either. Bit 7 of a byte of the
// result tells of a byte that is not; `mine`: the bytes that count.
template <class T> __device__ inline std::uint32_t extreme_scales(std::uint32_t bytes, std::uint32_t mine) {
    std::uint32_t found = bytes;
    if (!Order<T>::scale_operand) found |= ((bytes | 0x80808080u) - 0x03030303u) ^ 0x80808080u;
    return found & mine & 0x80808080u;
}

// 2^(byte - 127), byte 1 to 254.
__device__ inline float plain_scale(std::uint32_t byte) { return __uint_as_float(byte << 23); }

// A lane's operand for 32 k: two rows, two steps.
template <class T> struct Operand32 {
    std::uint32_t a[2][4];

    // codes: of either row; words: its scale bytes, of which `block` counts. any_scale: bytes may be extreme. Element by
    // element in stages: a lane's arithmetic overlaps.
    template <bool any_scale>
    __device__ void decode(const std::uint32_t (&codes)[2], const std::uint32_t (&words)[2], int block) {
        std::uint32_t factor[2], value[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i)  // up to byte 128, unit and scale in one: 2^(byte - 1)
            factor[i] = Order<T>::scale_operand ? byte_of(words[i], block) * 0x00800080u + 126 * 0x00800080u : Placed<T>::unit;
#pragma unroll
        for (int e = 0; e < 8; ++e) value[e % 2][e / 2] = spread(codes[e % 2], e / 2);
#pragma unroll
        for (int e = 0; e < 8; ++e) value[e % 2][e / 2] = placed<T>(value[e % 2][e / 2]);
#pragma unroll
        for (int e = 0; e < 8; ++e) a[e / 4][e % 4] = multiply_pairs(value[e % 2][e / 2], factor[e % 2], T());
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const std::uint32_t byte = any_scale ? byte_of(words[e % 2], block) : 0;
            if (byte < 128) continue;
            if (Order<T>::scale_operand)
                a[e / 4][e % 4] = multiply_pairs(multiply_pairs(value[e % 2][e / 2], Placed<T>::unit, T()), scale_pair_of(byte), T());
            else
                a[e / 4][e % 4] = operand<T>(codes[e % 2] >> 8 * (e / 2) & 0xff, decode_scale(byte));
        }
    }
    static __device__ std::uint32_t byte_of(std::uint32_t word, int block) { return __byte_perm(word, 0, 0x4440 + block); }
};
