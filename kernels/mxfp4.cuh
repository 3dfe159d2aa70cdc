// MXFP4 (OCP Microscaling Formats 1.0): the project's one decoder and one encoder.
//
// A block is 32 E2M1 codes (sign, 2 exponent bits, 1 mantissa bit) and one E8M0 byte s, value 2^(s - 127);
// s = 255 is NaN. Codes are packed two a byte, low nibble first ("linear"): codes (rows, K/2), scales (rows, K/32).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

constexpr int MX_BLOCK = 32;

// Type-generic views of a pair of 16-bit values in one register, element 0 in the low half.
template <class T> struct Pair;

// The magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6 as bfloat16 and half, split into tables of their low and high bytes.
template <> struct Pair<__nv_bfloat16> {
    static constexpr unsigned low[2] = {0xC0800000u, 0xC0804000u}, high[2] = {0x3F3F3F00u, 0x40404040u};
};
template <> struct Pair<__half> {
    static constexpr unsigned low[2] = {0, 0}, high[2] = {0x3E3C3800u, 0x46444240u};
};

// The two codes of one byte, low nibble first, as a pair of T: exact, -0 kept.
template <class T> __device__ inline std::uint32_t decode_byte(std::uint32_t byte) {
    const std::uint32_t first = byte & 7, second = (byte >> 4) & 7;
    const std::uint32_t low = __byte_perm(Pair<T>::low[0], Pair<T>::low[1], first | (second << 8));
    const std::uint32_t high = __byte_perm(Pair<T>::high[0], Pair<T>::high[1], (first << 4) | (second << 12));
    return low | high | ((byte & 0x08) << 12) | ((byte & 0x80) << 24);
}

// Pairs by pairs. Used where the products are numbers of the type, so that there is no rounding.
#ifdef __CUDACC__
template <class Two> __device__ inline std::uint32_t multiply_as(std::uint32_t a, std::uint32_t b) {
    const Two product = __hmul2(reinterpret_cast<const Two&>(a), reinterpret_cast<const Two&>(b));
    return reinterpret_cast<const std::uint32_t&>(product);
}
__device__ inline std::uint32_t multiply_pairs(std::uint32_t a, std::uint32_t b, __nv_bfloat16) {
    return multiply_as<__nv_bfloat162>(a, b);
}
__device__ inline std::uint32_t multiply_pairs(std::uint32_t a, std::uint32_t b, __half) {
    return multiply_as<__half2>(a, b);
}
#else
inline std::uint32_t multiply_pairs(std::uint32_t a, std::uint32_t b, __nv_bfloat16) {
    const float low = __uint_as_float(a << 16) * __uint_as_float(b << 16);
    const float high = __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
    return __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000u);
}
inline std::uint32_t multiply_pairs(std::uint32_t a, std::uint32_t b, __half) {
    const auto product = [](std::uint32_t x, std::uint32_t y) {
        const __half_raw first{static_cast<unsigned short>(x)}, second{static_cast<unsigned short>(y)};
        const __half_raw rounded = __float2half_rn(__half2float(first) * __half2float(second));
        return static_cast<std::uint32_t>(rounded.x);
    };
    return product(a & 0xffffu, b & 0xffffu) | product(a >> 16, b >> 16) << 16;
}
#endif

// The eight codes of a word as four pairs of T, code j with code j + 4, not yet to scale: with its three bits astride the
// boundary of exponent and mantissa a magnitude is a number of T, 2^-126 (bfloat16) or 2^-14 (half) times its value.
template <class T> struct Astride;
template <> struct Astride<__nv_bfloat16> { static constexpr int position = 6; };
template <> struct Astride<__half> { static constexpr int position = 9; };
template <class T> __device__ inline void decode_astride(std::uint32_t (&pairs)[4], std::uint32_t word) {
    constexpr int position = Astride<T>::position;
    constexpr std::uint32_t magnitude = 0x00070007u << position, sign = 0x80008000u;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const std::uint32_t codes = word >> 4 * (j & 2) & 0x000f000fu << 4 * (j & 1);
        const int down = 4 * (j & 1);  // how much less to shift
        if (position + 3 < 12)  // what the two shifts leave is apart: one multiplication does both
            pairs[j] = codes * (((1u << position) + (1u << 12)) >> down) & (magnitude | sign);
        else
            pairs[j] = (codes << (position - down) & magnitude) | (codes << (12 - down) & sign);
    }
}

// 2^(s - 127); 2^-127 is subnormal in float32; 255 is NaN.
__device__ inline float decode_scale(std::uint32_t s) {
    if (s == 0) return __uint_as_float(0x00400000u);
    if (s == 255) return __uint_as_float(0x7fffffffu);
    return __uint_as_float(s << 23);
}

// A bfloat16 pair of codes times its scale. Every product is a bfloat16 number, so cutting off the low half of the
// float32 product is exact; past 2^128 (s = 253 with 4 and 6, s = 254 with 2 and more) it is Inf.
__device__ inline std::uint32_t scale_pair(std::uint32_t pair, float scale) {
    const float first = __fmul_rn(__uint_as_float(pair << 16), scale);
    const float second = __fmul_rn(__uint_as_float(pair & 0xffff0000u), scale);
    return (__float_as_uint(first) >> 16) | (__float_as_uint(second) & 0xffff0000u);
}

enum ScaleRule { SCALE_FLOOR = 0, SCALE_EVEN = 1, SCALE_RCEIL = 2, SCALE_CEIL = 3 };
enum TieRule { TIE_EVEN = 0, TIE_ZERO = 1, TIE_AWAY = 2 };

// The scale byte of a block whose largest magnitude is `amax` (finite). From the bits: log2f is one too high for
// up to 44 ulps under a power of two. A subnormal amax has exponent field 0, and byte 0 is right for it.
__device__ inline int encode_scale(float amax, int rule) {
    const std::uint32_t bits = __float_as_uint(amax), mantissa = bits & 0x007fffffu;
    int byte = static_cast<int>(bits >> 23) - 2;                    // floor(log2 amax) - 2, biased
    if (rule == SCALE_EVEN) byte += mantissa >= 0x00600000u;        // 1.75: the round-half-even midpoint of E2M1
    if (rule == SCALE_RCEIL) byte += mantissa > 0x00400000u;        // past 1.5 = 6 / 4
    if (rule == SCALE_CEIL) byte += mantissa > 0;
    return byte > 0 ? byte : 0;
}

// The E2M1 code of x / 2^(s - 127), saturating at 6. The sign bit is kept, also of zero and of what rounds to it.
__device__ inline std::uint32_t encode(float x, int s, int rule) {
    const float inverse = __uint_as_float(static_cast<std::uint32_t>(254 - s) << 23);  // s <= 253
    const float a = __fmul_rn(__uint_as_float(__float_as_uint(x) & 0x7fffffffu), inverse);
    const bool up = rule == TIE_AWAY, even = rule == TIE_EVEN;
    // A tie goes up, or to the neighbour with an even code.
    const std::uint32_t magnitude = (up ? a >= 0.25f : a > 0.25f) + (up || even ? a >= 0.75f : a > 0.75f) +
                                    (up ? a >= 1.25f : a > 1.25f) + (up || even ? a >= 1.75f : a > 1.75f) +
                                    (up ? a >= 2.5f : a > 2.5f) + (up || even ? a >= 3.5f : a > 3.5f) +
                                    (up ? a >= 5.0f : a > 5.0f);
    return magnitude | (__float_as_uint(x) >> 31 << 3);
}

// The 32 codes of a block, packed, and its scale byte. A block that holds NaN or Inf becomes scale byte 255 with
// codes 0: loud, never a plausible number.
struct Block {
    uint4 codes;
    int scale;
};
__device__ inline Block encode_block(const float (&values)[MX_BLOCK], int scale_rule, int tie_rule) {
    std::uint32_t largest = 0;  // magnitudes order like their bits; Inf and NaN are past every finite one
#pragma unroll
    for (int i = 0; i < MX_BLOCK; ++i) largest = max(largest, __float_as_uint(values[i]) & 0x7fffffffu);
    const bool finite = largest < 0x7f800000u;
    Block block;
    block.scale = finite ? encode_scale(__uint_as_float(largest), scale_rule) : 255;
    std::uint32_t* words = reinterpret_cast<std::uint32_t*>(&block.codes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        std::uint32_t word = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j)
            word |= (finite ? encode(values[8 * i + j], block.scale, tie_rule) : 0) << (4 * j);
        words[i] = word;
    }
    return block;
}
