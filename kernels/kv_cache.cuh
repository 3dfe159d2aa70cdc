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
        const int n = position / page;
        const long long id = table == nullptr ? sequence : table[static_cast<long long>(sequence) * pages + n];
        return (id * heads + head) * page + (position - n * page);
    }
};

__device__ inline int row_blocks(int D) { return (D + MX_BLOCK - 1) / MX_BLOCK; }
