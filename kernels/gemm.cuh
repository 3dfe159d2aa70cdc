// What the paths of gemm.cu have in common: whose rows a block works on, the weights as operands of the tensor core, and
// where results go. The paths have the same bits, because all follow the canonical order of mma.cuh; in all of them the
// weights are the 16-row operand of the tensor core and the tokens the 8-column one.
#pragma once

#include "convert.cuh"
#include "mma.cuh"
#include "mxfp4.cuh"
#include "stream.cuh"
#include "warp.cuh"

struct Rows {
    const int* offsets;
    const int* entries;
    int problems, M, x_step, fan;
};

// The rows that one block works on.
struct Tile {
    int problem, first, count, begin;  // first row within the problem, rows of the problem, where its entries begin
    const Rows* rows;

    __device__ bool has(int m) const { return first + m < count; }
    __device__ int entry(int m) const { return rows->entries[begin + first + m]; }
    __device__ long long x_row(int m) const {
        if (rows->offsets != nullptr) return entry(m) / rows->fan;
        return static_cast<long long>(problem) * rows->x_step + first + m;
    }
    __device__ long long y_row(int m) const {
        if (rows->offsets != nullptr) return entry(m);
        return static_cast<long long>(problem) * rows->M + first + m;
    }
};

// Block row blockIdx.y of the grid; tiles of routed problems follow one another. False: there is nothing left to do.
// All threads of the block must call.
__device__ inline bool locate(Tile& tile, const Rows& rows, int size) {
    const int at = blockIdx.y;
    tile.rows = &rows;
    if (rows.offsets == nullptr) {
        tile.problem = blockIdx.z;
        tile.first = at * size;
        tile.count = rows.M;
        return true;
    }
    // A lane has a run of neighbouring problems: all are read at once.
    const int run = (rows.problems + WARP - 1) / WARP, lane = threadIdx.x % WARP;
    const auto count_of = [&](int p) { return p < rows.problems ? rows.offsets[p + 1] - rows.offsets[p] : 0; };
    const auto tiles_of = [&](int count) { return (count + size - 1) / size; };
    int tiles = 0;
#pragma unroll 4
    for (int i = 0; i < run; ++i) tiles += tiles_of(count_of(lane * run + i));
    int sum = tiles;  // of this run and those before it
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const int before = shuffle(sum, lane - distance);
        if (lane >= distance) sum += before;
    }
    const std::uint32_t done = vote(sum <= at);  // sums ascend: those runs come before
    if (done == 0xffffffffu) return false;
    const int mine = 32 - __clz(static_cast<int>(done));
    int left = at - shuffle(sum - tiles, mine), p = mine * run;
    while (left >= tiles_of(count_of(p))) left -= tiles_of(count_of(p++));
    tile.problem = p;
    tile.first = left * size;
    tile.count = count_of(p);
    tile.begin = rows.offsets[p];
    return true;
}

// A chunk's sum joins the total: the declared order's only other rounding.
template <class T> __device__ inline float add_chunk(float total, float chunk_sum, float scale) {
    return __fadd_rn(total, Order<T>::scale_operand ? chunk_sum : __fmul_rn(chunk_sum, scale));
}

// The same; exact: the product is known to be (half: a sum is a multiple of 2^-25 below 2^24 before, and no scale extreme),
// so that one fused operation has the same bits.
template <class T, bool exact> __device__ inline float join_chunk(float total, float chunk_sum, float scale) {
    return exact && !Order<T>::scale_operand ? __fmaf_rn(chunk_sum, scale, total) : add_chunk<T>(total, chunk_sum, scale);
}

// The two codes of a byte as an operand. A half operand carries no scale; where code times scale is past float32's
// range it is Inf like every other decoded weight, so that both paths and dtypes agree with the format's decoder.
template <class T> __device__ inline std::uint32_t operand(std::uint32_t byte, float scale) {
    const std::uint32_t pair = decode_byte<T>(byte);
    if constexpr (Order<T>::scale_operand) {
        return scale_pair(pair, scale);
    } else {
        if (!(scale >= 0x1p126f)) return pair;
        const std::uint32_t scaled = scale_pair(decode_byte<__nv_bfloat16>(byte), scale);
        std::uint32_t result = pair;
        if ((scaled & 0x00007fffu) == 0x00007f80u) result = (result & 0xffff8000u) | 0x00007c00u;
        if ((scaled & 0x7fff0000u) == 0x7f800000u) result = (result & 0x8000ffffu) | 0x7c000000u;
        return result;
    }
}

// Weights (P, N, K) as operands of the tensor core. `row` counts through all problems.
template <class T> struct Packed {
    const std::uint8_t* codes;
    const std::uint8_t* scales;
    int K;

    __device__ float scale(long long row, int k) const { return decode_scale(scales[row * (K / MX_BLOCK) + k / MX_BLOCK]); }
    // 16 weights from k on, k a multiple of 16, into 8 words.
    __device__ void sixteen(std::uint32_t* to, long long row, int k, float scale) const {
        const uint2 codes16 = *reinterpret_cast<const uint2*>(codes + row * (K / 2) + k / 2);
#pragma unroll
        for (int i = 0; i < 8; ++i) to[i] = operand<T>(((i < 4 ? codes16.x : codes16.y) >> (8 * (i % 4))) & 0xff, scale);
    }
};

template <class T> struct Dense {
    const T* operands;
    const std::uint8_t* scales;
    int K;

    __device__ float scale(long long row, int k) const {
        return scales == nullptr ? 1.0f : decode_scale(scales[row * (K / MX_BLOCK) + k / MX_BLOCK]);
    }
    __device__ void sixteen(std::uint32_t* to, long long row, int k, float) const {
        const uint4* from = reinterpret_cast<const uint4*>(operands + row * K + k);
        reinterpret_cast<uint4*>(to)[0] = from[0];
        reinterpret_cast<uint4*>(to)[1] = from[1];
    }
};

// Where a problem's results go, and as what.
enum Form { SAME, FLOAT32, SWIGLU };  // of T; float32; rounded to T, then swiglu (ffn.cu) of neighbouring features: N / 2 of T
template <class T> struct Output {
    void* y;
    const float* bias;
    int N, form;
    float alpha, limit;  // of SWIGLU

    __device__ const float* bias_of(const Tile& tile) const { return bias + static_cast<long long>(tile.problem) * N; }
    __device__ float with_bias(float total, float more) const {
        return bias == nullptr ? total : __fadd_rn(total, more);
    }
    // To feature n < N of y's row `row`, in any form but SWIGLU.
    __device__ void write(const Tile& tile, long long row, int n, float total) const {
        total = with_bias(total, bias == nullptr ? 0.0f : bias_of(tile)[n]);
        const long long at = row * N + n;
        if (form == FLOAT32) static_cast<float*>(y)[at] = total;
        else narrow(static_cast<T*>(y) + at, total);
    }
};
