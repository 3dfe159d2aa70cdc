// Rotary position embedding: pair (a, b) of a row turned by the angle of its position,
//   a' = a cos - b sin     b' = b cos + a sin
// each product and the sum rounded to float32, the result once more to the row's type.
//
// "half" pairs element i with i + D/2, "interleaved" 2i with 2i + 1. A row of the table is (D/2, 2): cos, sin.
#pragma once

#include "convert.cuh"

enum PairOrder { PAIR_HALF = 0, PAIR_INTERLEAVED = 1 };

// Element i of the rotated row; the element itself where there is no table.
template <class T> __device__ inline T rotated(const T* row, const float* angles, int i, int D, int order) {
    if (angles == nullptr) return row[i];
    const int half = D / 2;
    const bool first = order == PAIR_INTERLEAVED ? i % 2 == 0 : i < half;
    const int pair = order == PAIR_INTERLEAVED ? i / 2 : first ? i : i - half;
    const int partner = order == PAIR_INTERLEAVED ? i ^ 1 : first ? i + half : i - half;
    const float along = __fmul_rn(widen(row[i]), angles[2 * pair]);
    const float across = __fmul_rn(widen(row[partner]), angles[2 * pair + 1]);
    T result;
    narrow(&result, first ? __fsub_rn(along, across) : __fadd_rn(along, across));
    return result;
}
