// The tensor core behind one wrapper, and the accumulation order that every contraction of the project follows.
//
// Canonical order: K is cut into chunks of Order<T>::chunk; inside a chunk, steps of 16 consecutive k in ascending
// order on the tensor core, from zero; chunk sums are added in ascending order in float32, round to nearest.
// A step's 16 products are summed exactly by the hardware, so their order inside a step is free; which 16 belong
// together is not. Any schedule that keeps to this (any tile, any number of tokens, split K) has the same bits.
//
// Warp tile: MT x 16 rows of A by NT x 8 columns of B, fragments as in PTX ISA, mma.m16n8k16 (lane = 4 g + t):
//   a[0] row g      k 2t, 2t+1     a[1] row g + 8  same k     a[2] row g  k 2t+8, 2t+9     a[3] row g + 8
//   b[0] column g   k 2t, 2t+1     b[1] column g   k 2t+8, 2t+9
//   d[0] row g      column 2t      d[1] column 2t + 1         d[2], d[3] the same of row g + 8
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

constexpr int MMA_K = 16;

template <class T> struct Order;
// bfloat16 holds code times scale exactly, so the scale is part of the operand.
template <> struct Order<__nv_bfloat16> { static constexpr int chunk = 128; static constexpr bool scale_operand = true; };
// half does not reach all scales: the operand is the bare code and the scale multiplies the chunk's sum.
template <> struct Order<__half> { static constexpr int chunk = 32; static constexpr bool scale_operand = false; };

template <class T, int MT, int NT> struct Fragments {
    float (&d)[MT][NT][4];
    const std::uint32_t (&a)[MT][4];
    const std::uint32_t (&b)[NT][2];
};

#ifdef __CUDACC__

__device__ inline void mma_m16n8k16(float* d, const std::uint32_t* a, const std::uint32_t* b, __nv_bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_m16n8k16(float* d, const std::uint32_t* a, const std::uint32_t* b, __half) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b over 16 k, for the whole warp.
template <class T, int MT, int NT> __device__ inline void mma_step(const Fragments<T, MT, NT>& tile) {
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < NT; ++j) mma_m16n8k16(tile.d[i][j], tile.a[i], tile.b[j], T());
}

#else

#include "host/tensor_core.h"

template <class T, int MT, int NT> inline void mma_step(const Fragments<T, MT, NT>& tile) {
    cpu::warp_collective(const_cast<Fragments<T, MT, NT>*>(&tile), &cpu::mma_warp<T, MT, NT>);
}

#endif

// The sums of 16 rows over 16 N k, A's fragments given, in the canonical order: the product with ones. sum[0] of row g,
// sum[1] of row g + 8.
template <class T> struct Ones;
template <> struct Ones<__nv_bfloat16> { static constexpr std::uint32_t pair = 0x3f803f80u; };
template <> struct Ones<__half> { static constexpr std::uint32_t pair = 0x3c003c00u; };
template <class T, int N> __device__ inline void row_sums(float (&sum)[2], const std::uint32_t (&a)[N][4]) {
    float total[1][1][4] = {};
    const std::uint32_t ones[1][2] = {{Ones<T>::pair, Ones<T>::pair}};
#pragma unroll
    for (int step = 0; step < N; ++step)
        mma_step(Fragments<T, 1, 1>{total, reinterpret_cast<const std::uint32_t (&)[1][4]>(a[step]), ones});
    sum[0] = total[0][0][0];
    sum[1] = total[0][0][2];
}
