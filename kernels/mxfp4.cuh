// MXFP4 (OCP Microscaling Formats 1.0): the project's one decoder and one encoder.
//
// A block is 32 E2M1 codes (sign, 2 exponent bits, 1 mantissa bit) and one E8M0 byte s, value 2^(s - 127);
// s = 255 is NaN. Codes are packed two a byte, low nibble first ("linear"): codes (rows, K/2), scales (rows, K/32).
#pragma once

#include "convert.cuh"

#include <cstdint>
#include <type_traits>

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
inline std::uint32_t multiply_pairs(std::uint32_t a, std::uint32_t b, __half) { return cpu::multiply_halves(a, b); }
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

// COUNT codes of one block, packed, and its scale byte: values, each rounded once to T.
template <class T, int COUNT>
__device__ inline void decode_any(T (&values)[COUNT], const std::uint8_t (&codes)[COUNT / 2], std::uint32_t scale_byte) {
    const float scale = decode_scale(scale_byte);
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
        const std::uint32_t pair = scale_pair(decode_byte<__nv_bfloat16>(codes[i]), scale);
        if constexpr (std::is_same<T, __nv_bfloat16>::value) {  // as it is
            reinterpret_cast<std::uint32_t*>(values)[i] = pair;
        } else {
            narrow(&values[2 * i], __uint_as_float(pair << 16));
            narrow(&values[2 * i + 1], __uint_as_float(pair & 0xffff0000u));
        }
    }
}

// Eight of them, in a word, to four pairs.
#ifdef __CUDACC__

// The scale 2^(byte - 127) twice. bfloat16 has every scale.
__device__ inline std::uint32_t scale_twice(std::uint32_t byte, __nv_bfloat16) {
    return (__float_as_uint(decode_scale(byte)) >> 16) * 0x00010001u;
}
// half has those from 2^-24 to 2^15.
__device__ inline std::uint32_t scale_twice(std::uint32_t byte, __half) {
    return (byte < 113 ? 1u << (byte - 103) : (byte - 112) << 10) * 0x00010001u;
}
template <class T> __device__ inline uint4 decode_eight(std::uint32_t codes, std::uint32_t scale_byte) {
    static_assert(sizeof(T) == 2);
    constexpr bool half = std::is_same<T, __half>::value;
    uint4 result;
    if (half && (scale_byte < 103 || scale_byte > 142)) {
        decode_any(reinterpret_cast<T(&)[8]>(result), reinterpret_cast<const std::uint8_t(&)[4]>(codes), scale_byte);
        return result;
    }
    const std::uint32_t magnitudes = codes & 0x77777777u, even = codes << 4;
    const std::uint32_t scale = scale_twice(scale_byte, T());
    std::uint32_t* words = reinterpret_cast<std::uint32_t*>(&result);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {  // four codes at a time: their low and their high bytes
        const std::uint32_t four = magnitudes >> (8 * i);
        const std::uint32_t low = half ? 0 : __byte_perm(Pair<T>::low[0], Pair<T>::low[1], four);
        const std::uint32_t high = __byte_perm(Pair<T>::high[0], Pair<T>::high[1], four);
        words[i] = __byte_perm(low, high, 0x5140);
        words[i + 1] = __byte_perm(low, high, 0x7362);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // The sign of an even code is the first bit of its byte of `even`, that of an odd one of `codes`.
        const std::uint32_t signs = __byte_perm(even, codes, (i + 4) << 12 | i << 4) & 0x80008000u;
        words[i] = multiply_pairs(words[i] | signs, scale, T());  // rounded once
    }
    return result;
}

#else  // the same bits in fewer of a CPU's instructions

template <class T> inline uint4 decode_eight(std::uint32_t codes, std::uint32_t scale_byte) {
    uint4 result;
    decode_any(reinterpret_cast<T(&)[8]>(result), reinterpret_cast<const std::uint8_t(&)[4]>(codes), scale_byte);
    return result;
}

#endif

// As `decode_any`, the quickest way.
template <class T, int COUNT>
__device__ inline void decode(T (&values)[COUNT], const std::uint8_t (&codes)[COUNT / 2], std::uint32_t scale_byte) {
#ifdef __CUDACC__
    if constexpr (sizeof(T) == 2 && COUNT == 8) {
        reinterpret_cast<uint4&>(values) = decode_eight<T>(reinterpret_cast<const std::uint32_t&>(codes), scale_byte);
        return;
    }
#endif
    decode_any(values, codes, scale_byte);
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

// The E2M1 code of x / 2^(s - 127) in the four highest bits, saturating at 6. The sign is kept, also of zero and of what
// rounds to it. Between a power of two from 2 on and the next, codes lie half that power apart; below 2 they lie 0.5
// apart. This is the last bit of 2^22 times the power (1 below 2): adding it rounds to a whole number of such steps, of
// two as near to the even one, whose code is even. A power has 2 codes below its own steps from 0 on.
__device__ inline std::uint32_t encode(float x, int s, int rule) {
    const float inverse = __uint_as_float(static_cast<std::uint32_t>(254 - s) << 23);  // s <= 253
    const float a = min(__fmul_rn(__uint_as_float(__float_as_uint(x) & 0x7fffffffu), inverse), 6.0f);
    const std::uint32_t power = max(__float_as_uint(a), 0x3f800000u) & 0x7f800000u;
    const float magic = __uint_as_float(power + 0x0b000002u), sum = __fadd_rn(a, magic);  // 2 + 254 is 0 modulo 8
    std::uint32_t code = __float_as_uint(sum) + (power >> 22);
    if (rule != TIE_EVEN) {
        const float down = __fsub_rn(a, __fsub_rn(sum, magic)), half = __uint_as_float(power - 0x01000000u);  // exact
        if (rule == TIE_AWAY) code += down == half;
        else code -= down == -half;
    }
    return (code << 28 & 0x70000000u) | (__float_as_uint(x) & 0x80000000u);
}

// Of the largest magnitude among values, the bits: they order like it; Inf and NaN are past every finite one.
template <int COUNT> __device__ inline int largest_of(const float (&values)[COUNT]) {
    int largest = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        largest = max(largest, static_cast<int>(__float_as_uint(values[i]) & 0x7fffffffu));
    return largest;
}

// The scale byte of a block by its largest magnitude's bits. A block that holds NaN or Inf becomes scale byte 255 with
// codes 0: loud, never a plausible number.
__device__ inline int scale_of(int largest, int scale_rule) {
    return largest < 0x7f800000 ? encode_scale(__uint_as_float(largest), scale_rule) : 255;
}

// Eight codes a word, the first lowest.
template <int COUNT>
__device__ inline void encode_all(std::uint32_t* words, const float (&values)[COUNT], int s, int tie_rule) {
#pragma unroll
    for (int i = 0; i < COUNT / 8; ++i) {
        std::uint32_t word = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) word |= encode(values[8 * i + j], s, tie_rule) >> (28 - 4 * j);
        words[i] = s == 255 ? 0 : word;
    }
}

// ---------------------------------------------------------------------------------------------- pairs of bfloat16

// Half words by half words, as `multiply_pairs`.
#ifdef __CUDACC__
__device__ inline std::uint32_t add_pairs(std::uint32_t a, std::uint32_t b) {
    const auto sum = __hadd2_rn(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const std::uint32_t&>(sum);
}
__device__ inline std::uint32_t smaller_pairs(std::uint32_t a, std::uint32_t b) { return __vminu2(a, b); }
__device__ inline std::uint32_t larger_pairs(std::uint32_t a, std::uint32_t b) { return __vmaxu2(a, b); }
#else
inline std::uint32_t add_pairs(std::uint32_t a, std::uint32_t b) {
    const auto sum = [](std::uint32_t x, std::uint32_t y) {
        const __nv_bfloat16_raw rounded = __float2bfloat16_rn(__uint_as_float(x << 16) + __uint_as_float(y << 16));
        return static_cast<std::uint32_t>(rounded.x);
    };
    return sum(a & 0xffffu, b & 0xffffu) | sum(a >> 16, b >> 16) << 16;
}
inline std::uint32_t smaller_pairs(std::uint32_t a, std::uint32_t b) {
    return min(a & 0xffffu, b & 0xffffu) | min(a >> 16, b >> 16) << 16;
}
inline std::uint32_t larger_pairs(std::uint32_t a, std::uint32_t b) {
    return max(a & 0xffffu, b & 0xffffu) | max(a >> 16, b >> 16) << 16;
}
#endif

// `largest_of` for a thread's elements in pairs.
template <int PAIRS> __device__ inline int largest_of(const std::uint32_t (&pairs)[PAIRS]) {
    std::uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) largest = larger_pairs(largest, pairs[i] & 0x7fff7fffu);
    return static_cast<int>(max(largest << 16, largest & 0xffff0000u));
}

// `encode_all` with ties to even, two elements at a time: a bfloat16 has bits enough for the sum of `encode`, whose last
// one is half the power when 64 times the power is added.
template <int PAIRS>
__device__ inline void encode_pairs(std::uint32_t* words, const std::uint32_t (&pairs)[PAIRS], int s) {
    const std::uint32_t inverse = static_cast<std::uint32_t>(254 - s) * 0x00800080u;
#pragma unroll
    for (int i = 0; i < PAIRS / 4; ++i) {
        std::uint32_t codes[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const std::uint32_t x = pairs[4 * i + j];
            const std::uint32_t a = smaller_pairs(multiply_pairs(x & 0x7fff7fffu, inverse, __nv_bfloat16()), 0x40c040c0u);
            const std::uint32_t powers = larger_pairs(a, 0x3f803f80u) & 0x7f807f80u;
            const std::uint32_t code = add_pairs(a, powers + 0x03020302u) + (powers >> 6);
            codes[j] = (code & 0x00070007u) | (x >> 12 & 0x00080008u);
        }
        const std::uint32_t first = codes[0] | codes[1] << 8, last = codes[2] | codes[3] << 8;
        words[i] = s == 255 ? 0 : __byte_perm(first, last, 0x5410) | __byte_perm(first, last, 0x7632) << 4;
    }
}
