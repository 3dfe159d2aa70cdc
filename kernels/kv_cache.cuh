// Where a key or value row lies: a contiguous cache (B, Hkv, S, D), or pages (P, Hkv, page, D) with a table (B, pages)
// of the page that holds a sequence's keys n page .. n page + page - 1. A contiguous cache is pages as long as S.
//
// A row is D values of 16 bits, or MXFP4: codes of Dp/2 bytes and Dp/32 scale bytes, Dp = D rounded up to 32.
#pragma once

#include "convert.cuh"
#include "mxfp4.cuh"

#include <type_traits>

struct CacheRows {
    const int* table;  // null: sequence b is page b
    int heads, page, pages;

    __device__ long long at(int sequence, int head, int position) const {
        if (table == nullptr) return (static_cast<long long>(sequence) * heads + head) * page + position;
        const int n = position / page;
        const long long id = table[static_cast<long long>(sequence) * pages + n];
        return (id * heads + head) * page + (position - n * page);
    }
};

__device__ inline int row_blocks(int D) { return (D + MX_BLOCK - 1) / MX_BLOCK; }

// Eight MXFP4 codes of one block and its scale byte: four pairs of values, each rounded once to T.
template <class T> __device__ inline uint4 decode_eight_any(std::uint32_t codes, std::uint32_t scale_byte) {
    uint4 result;
    std::uint32_t* words = reinterpret_cast<std::uint32_t*>(&result);
    const float scale = decode_scale(scale_byte);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const std::uint32_t pair = scale_pair(decode_byte<__nv_bfloat16>((codes >> (8 * i)) & 0xff), scale);
        T* both = reinterpret_cast<T*>(&words[i]);
        narrow(both, __uint_as_float(pair << 16));
        narrow(both + 1, __uint_as_float(pair & 0xffff0000u));
    }
    return result;
}

#ifdef __CUDACC__

// A pair times the scale 2^(byte - 127), rounded once. bfloat16 has every scale.
__device__ inline std::uint32_t times_scale(std::uint32_t pair, std::uint32_t byte, __nv_bfloat16) {
    using Two = const __nv_bfloat162&;
    const std::uint32_t scale = __float_as_uint(decode_scale(byte)) >> 16, both = scale | scale << 16;
    const std::uint32_t zero = 0x80008000u;  // -0, which leaves every product as it is
    const __nv_bfloat162 product =
        __hfma2(reinterpret_cast<Two>(pair), reinterpret_cast<Two>(both), reinterpret_cast<Two>(zero));
    return reinterpret_cast<const std::uint32_t&>(product);
}
// half has those from 2^-24 to 2^15.
__device__ inline std::uint32_t times_scale(std::uint32_t pair, std::uint32_t byte, __half) {
    const std::uint32_t scale = byte < 113 ? 1u << (byte - 103) : (byte - 112) << 10, both = scale | scale << 16;
    const __half2 product = __hmul2(reinterpret_cast<const __half2&>(pair), reinterpret_cast<const __half2&>(both));
    return reinterpret_cast<const std::uint32_t&>(product);
}
template <class T> __device__ inline uint4 decode_eight(std::uint32_t codes, std::uint32_t scale_byte) {
    constexpr bool half = std::is_same<T, __half>::value;
    if (half && (scale_byte < 103 || scale_byte > 142)) return decode_eight_any<T>(codes, scale_byte);
    const std::uint32_t magnitudes = codes & 0x77777777u, even = codes << 4;
    uint4 result;
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
        words[i] = times_scale(words[i] | signs, scale_byte, T());
    }
    return result;
}

#else  // the same bits in fewer of a CPU's instructions

template <class T> inline uint4 decode_eight(std::uint32_t codes, std::uint32_t scale_byte) {
    return decode_eight_any<T>(codes, scale_byte);
}

#endif

// Eight elements of a row from `column` on, a multiple of 8; decoded values are rounded once to T.
template <class T> struct Plain {
    const T* values;
    __device__ uint4 eight(long long row, int D, int column) const {
        return *reinterpret_cast<const uint4*>(values + row * D + column);
    }
};
template <class T> struct Packed {
    const std::uint8_t* codes;
    const std::uint8_t* scales;
    __device__ uint4 eight(long long row, int D, int column) const {
        const long long block = row * row_blocks(D) + column / MX_BLOCK;
        const std::uint8_t* first = codes + block * (MX_BLOCK / 2) + column % MX_BLOCK / 2;
        return decode_eight<T>(*reinterpret_cast<const std::uint32_t*>(first), scales[block]);
    }
};
