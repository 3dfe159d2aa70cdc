// Where a key or value row lies: a contiguous cache (B, Hkv, S, D), or pages (P, Hkv, page, D) with a table (B, pages)
// of the page that holds a sequence's keys n page .. n page + page - 1. A contiguous cache is pages as long as S.
//
// A row is D values of 16 bits, or MXFP4: codes of Dp/2 bytes and Dp/32 scale bytes, Dp = D rounded up to 32.
#pragma once

#include "mxfp4.cuh"

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
