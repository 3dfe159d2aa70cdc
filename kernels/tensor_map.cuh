// Boxes of a matrix, brought to shared memory by Hopper's copy engine (cp.async.bulk.tensor); on the CPU by the threads.
//
// A TensorMap tells of a matrix of 16-bit numbers and of its boxes, 64 columns of so many rows, which arrive as wgmma.cuh has
// its tiles. What of a box lies outside the matrix arrives as zeros. The instruction takes a map at a multiple of 64 bytes: as
// a kernel's parameter it is a __grid_constant__ at byte 48, since parameters begin at 0x210.
#pragma once

#include "async.cuh"
#include "wgmma.cuh"

#ifdef __CUDACC__

struct TensorMap {
    std::uint64_t words[16];  // the driver's (device/tensor_map.py)
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ROWS rows, a box's, from `row` on, 128 columns from `column` on, as two tiles; who awaits `there` awaits them, too. For a
// warpgroup, whose first thread asks for them, and afterwards arrives there itself.
template <int ROWS>
__device__ inline void bring_tiles(unsigned char (&tiles)[2][ROWS * 128], const TensorMap& map, int row, int column, Meeting& there) {
    if (threadIdx.x % GROUP_THREADS != 0) return;
    const auto shared = [](const void* at) { return static_cast<unsigned>(__cvta_generic_to_shared(at)); };
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared(&there)), "n"(sizeof tiles) : "memory");
#pragma unroll
    for (int half = 0; half < 2; ++half)
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                         shared(tiles[half])),
                     "l"(&map), "r"(column + half * SWIZZLE_K), "r"(row), "r"(shared(&there))
                     : "memory");
}

// The same for a cluster's BLOCKS blocks, which ask for the same: a box has a share of the rows, and each asks for one box, which
// arrives at all.
template <int ROWS, int BLOCKS>
__device__ inline void bring_tiles_to_all(unsigned char (&tiles)[2][ROWS * 128], const TensorMap& map, int row, int column, Meeting& there) {
    if constexpr (BLOCKS == 1) return bring_tiles<ROWS>(tiles, map, row, column, there);
    if (threadIdx.x % GROUP_THREADS != 0) return;
    const auto shared = [](const void* at) { return static_cast<unsigned>(__cvta_generic_to_shared(at)); };
    const int first = ROWS / BLOCKS * cluster_rank();
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared(&there)), "n"(sizeof tiles) : "memory");
#pragma unroll
    for (int half = 0; half < 2; ++half)
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(
                shared(tiles[half] + first * 128)),
            "l"(&map), "r"(column + half * SWIZZLE_K), "r"(row + first), "r"(shared(&there)), "h"(static_cast<short>((1 << BLOCKS) - 1))
            : "memory");
}

#else  // no such engine: functional/gemm.py does not launch these kernels there

template <int ROWS> __device__ inline void bring_tiles(unsigned char (&)[2][ROWS * 128], const TensorMap&, int, int, Meeting&) {}
template <int ROWS, int BLOCKS>
__device__ inline void bring_tiles_to_all(unsigned char (&)[2][ROWS * 128], const TensorMap&, int, int, Meeting&) {}

#endif

#else

#include "host/tensor_map.h"

#endif
