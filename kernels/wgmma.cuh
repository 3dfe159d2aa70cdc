// A warpgroup's step on Hopper's tensor core: 64 weights rows from registers by TOKENS columns from shared memory over
// 16 k, asynchronous. The bits are those of mma.cuh's step; on the CPU host/warpgroup.h makes it.
//
// Shared tokens are tiles of 64 k: row r has its 128 bytes at 128 r, the 16-byte piece p of them at place p ^ (r & 7)
// ("128-byte swizzle"), and a tile begins at a multiple of 1,024 bytes. Registers, lane = 4 g + t of warp w:
//   a[0..3]   as mma.m16n8k16's, of rows 16 w + g and 16 w + g + 8
//   d[j]      columns 8 j + 2t and 8 j + 2t + 1 of row 16 w + g, then of row 16 w + g + 8
// Between group_fence and the group_wait that covers the step, a and d belong to the tensor core.
#pragma once

#include "mma.cuh"

using Meeting = std::uint64_t;
constexpr int GROUP_ROWS = 64, GROUP_THREADS = 128, SWIZZLE_K = 64;

// Where in a tile the 16-byte piece (8 k) of a row lies, in bytes.
__device__ inline int swizzled(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

#ifdef __CUDACC__

// The instruction names its registers one by one.
#define FOUR(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define D16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
#define D32                                                                                                       \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define D48                                                                                                       \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "  \
    "%44, %45, %46, %47}, "
#define D64                                                                                                       \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "  \
    "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
#define WGMMA_8(type)                                                                                             \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %9, 0;\n"                                                    \
                 "wgmma.mma_async.sync.aligned.m64n8k16.f32." type "." type " {%0, %1, %2, %3}, "                 \
                 "{%4, %5, %6, %7}, %8, add, 1, 1, 0; }"                                                          \
                 : FOUR(0)                                                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens), "r"(add))
#define WGMMA_32(type)                                                                                            \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %21, 0;\n"                                                   \
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " " D16                              \
                 "{%16, %17, %18, %19}, %20, add, 1, 1, 0; }"                                                     \
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3)                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens), "r"(add))
// across: 1 where the columns' 16 k lie in 16 rows of a tile, a column in each (columns_across).
#define WGMMA_64(type, across)                                                                                            \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %37, 0;\n"                                                   \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " D32                              \
                 "{%32, %33, %34, %35}, %36, add, 1, 1, " across "; }"                                                     \
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7)                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens), "r"(add))
#define WGMMA_96(type)                                                                                            \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %53, 0;\n"                                                   \
                 "wgmma.mma_async.sync.aligned.m64n96k16.f32." type "." type " " D48                              \
                 "{%48, %49, %50, %51}, %52, add, 1, 1, 0; }"                                                     \
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7), FOUR(8), FOUR(9),      \
                   FOUR(10), FOUR(11)                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens), "r"(add))
#define WGMMA_128(type, across)                                                                                           \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %69, 0;\n"                                                   \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " D64                             \
                 "{%64, %65, %66, %67}, %68, add, 1, 1, " across "; }"                                                     \
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7), FOUR(8), FOUR(9),      \
                   FOUR(10), FOUR(11), FOUR(12), FOUR(13), FOUR(14), FOUR(15)                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens), "r"(add))
// Both operands from shared memory.
#define WGMMA_SHARED_64(type)                                                                                     \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %34, 0;\n"                                                   \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " D32                              \
                 "%32, %33, add, 1, 1, 0, 0; }"                                                                   \
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7)                         \
                 : "l"(rows), "l"(tokens), "r"(add))
#define WGMMA_SHARED_128(type)                                                                                    \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %66, 0;\n"                                                   \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " D64                             \
                 "%64, %65, add, 1, 1, 0, 0; }"                                                                   \
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7), FOUR(8), FOUR(9),      \
                   FOUR(10), FOUR(11), FOUR(12), FOUR(13), FOUR(14), FOUR(15)                                     \
                 : "l"(rows), "l"(tokens), "r"(add))

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ inline void wgmma(float (&d)[1][4], const std::uint32_t (&a)[4], std::uint64_t tokens, int add, __nv_bfloat16) {
    WGMMA_8("bf16");
}
__device__ inline void wgmma(float (&d)[1][4], const std::uint32_t (&a)[4], std::uint64_t tokens, int add, __half) {
    WGMMA_8("f16");
}
__device__ inline void wgmma(float (&d)[4][4], const std::uint32_t (&a)[4], std::uint64_t tokens, int add, __nv_bfloat16) {
    WGMMA_32("bf16");
}
__device__ inline void wgmma(float (&d)[4][4], const std::uint32_t (&a)[4], std::uint64_t tokens, int add, __half) {
    WGMMA_32("f16");
}
__device__ inline void wgmma(float (&d)[8][4], const std::uint32_t (&a)[4], std::uint64_t tokens, int add, __nv_bfloat16) {
    WGMMA_64("bf16", "0");
}
__device__ inline void wgmma(float (&d)[8][4], const std::uint32_t (&a)[4], std::uint64_t tokens, int add, __half) {
    WGMMA_64("f16", "0");
}
__device__ inline void wgmma(float (&d)[12][4], const std::uint32_t (&a)[4], std::uint64_t tokens, int add, __nv_bfloat16) {
    WGMMA_96("bf16");
}
__device__ inline void wgmma(float (&d)[12][4], const std::uint32_t (&a)[4], std::uint64_t tokens, int add, __half) {
    WGMMA_96("f16");
}
__device__ inline void wgmma(float (&d)[16][4], const std::uint32_t (&a)[4], std::uint64_t tokens, int add, __nv_bfloat16) {
    WGMMA_128("bf16", "0");
}
__device__ inline void wgmma(float (&d)[16][4], const std::uint32_t (&a)[4], std::uint64_t tokens, int add, __half) {
    WGMMA_128("f16", "0");
}
__device__ inline void wgmma_across(float (&d)[8][4], const std::uint32_t (&a)[4], std::uint64_t tokens, int add, __nv_bfloat16) {
    WGMMA_64("bf16", "1");
}
__device__ inline void wgmma_across(float (&d)[8][4], const std::uint32_t (&a)[4], std::uint64_t tokens, int add, __half) {
    WGMMA_64("f16", "1");
}
__device__ inline void wgmma_across(float (&d)[16][4], const std::uint32_t (&a)[4], std::uint64_t tokens, int add, __nv_bfloat16) {
    WGMMA_128("bf16", "1");
}
__device__ inline void wgmma_across(float (&d)[16][4], const std::uint32_t (&a)[4], std::uint64_t tokens, int add, __half) {
    WGMMA_128("f16", "1");
}
__device__ inline void wgmma_shared(float (&d)[8][4], std::uint64_t rows, std::uint64_t tokens, int add, __nv_bfloat16) {
    WGMMA_SHARED_64("bf16");
}
__device__ inline void wgmma_shared(float (&d)[8][4], std::uint64_t rows, std::uint64_t tokens, int add, __half) {
    WGMMA_SHARED_64("f16");
}
__device__ inline void wgmma_shared(float (&d)[16][4], std::uint64_t rows, std::uint64_t tokens, int add, __nv_bfloat16) {
    WGMMA_SHARED_128("bf16");
}
__device__ inline void wgmma_shared(float (&d)[16][4], std::uint64_t rows, std::uint64_t tokens, int add, __half) {
    WGMMA_SHARED_128("f16");
}
__device__ inline void group_fence() { asm volatile("wgmma.fence.sync.aligned;"); }
__device__ inline void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;"); }
// Until all steps but those of the last `pending` commits are done. With none pending, d is the thread's again.
template <int pending, int NT> __device__ inline void group_wait(float (&d)[NT][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending));
    if (pending == 0) {
#pragma unroll
        for (int j = 0; j < NT; ++j) asm volatile("" : FOUR(j));  // no use of d moves to before the wait
    }
}
// After a group_wait with others pending: d, which it covered, is the thread's again.
template <int NT> __device__ inline void belongs(float (&d)[NT][4]) {
#pragma unroll
    for (int j = 0; j < NT; ++j) asm volatile("" : FOUR(j));
}
// The tensor core reads a when it comes to it, and the assembler takes a's registers for free from the step on. What keeps
// other values out of them: an instruction after the group_wait that covers the steps seems to want a. never: 0, but not known to be.
template <int N> __device__ inline void keep_until_here(const std::uint32_t (&a)[N][4], std::uint32_t never) {
#pragma unroll
    for (int i = 0; i < N; ++i)
        asm volatile("{ .reg .pred never; setp.ne.b32 never, %4, 0; @never st.shared.v4.u32 [%4], {%0, %1, %2, %3}; }" ::"r"(a[i][0]),
                     "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(never));
}
// What this thread wrote to shared memory is seen by the tensor core after the next barrier.
__device__ inline void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of `warps` warps in two halves: who has done something arrives, and who needs it waits, for one time after the
// other, counted from 0; nobody may be two times ahead of who waits. On the CPU all threads of the block meet instead, where
// `meet` says so, as often as each other.
__device__ inline void open_meeting(Meeting& meeting, int warps) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(&meeting))), "r"(warps)
                 : "memory");
}
__device__ inline void arrive(Meeting& meeting) {
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(
                         static_cast<unsigned>(__cvta_generic_to_shared(&meeting)))
                     : "memory");
}
__device__ inline void await(Meeting& meeting, int time) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(&meeting))), "r"(time & 1)
        : "memory");
}

__device__ inline void meet() {}

// Of a kernel whose neighbouring blockIdx.y form clusters of so many blocks.
#define CLUSTER_OF(blocks) __cluster_dims__(1, blocks, 1)
// This block's number in its cluster, whose blocks can arrive at each other's meetings and have bytes brought to each other.
__device__ inline int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// Meetings that this thread opened are so for the copy engine and for a cluster after the next meet_cluster.
__device__ inline void publish_meetings() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    publish_shared();
}
// All threads of the cluster, of BLOCKS blocks.
template <int BLOCKS> __device__ inline void meet_cluster() {
    if (BLOCKS == 1) __syncthreads();
    else asm volatile("barrier.cluster.arrive.relaxed.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The warp arrives at this meeting of each of the cluster's blocks.
template <int BLOCKS> __device__ inline void arrive_everywhere(Meeting& meeting) {
    if (BLOCKS == 1) return arrive(meeting);
    __syncwarp();
    const int lane = threadIdx.x % 32;
    if (lane < BLOCKS)
        asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
                     "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(
                         static_cast<unsigned>(__cvta_generic_to_shared(&meeting))), "r"(lane)
                     : "memory");
}

// How many registers a thread of this warpgroup has from here on; those of a block are shared out at its start.
template <int count, int launched = 168> __device__ inline void keep_registers() {
    if (count < launched) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
    else asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

#else  // no such unit: functional/gemm.py does not launch these kernels there

template <int NT, class T>
__device__ inline void wgmma(float (&)[NT][4], const std::uint32_t (&)[4], std::uint64_t, int, T) { __trap(); }
template <int NT, class T>
__device__ inline void wgmma_across(float (&)[NT][4], const std::uint32_t (&)[4], std::uint64_t, int, T) { __trap(); }
template <int NT, class T>
__device__ inline void wgmma_shared(float (&)[NT][4], std::uint64_t, std::uint64_t, int, T) { __trap(); }
__device__ inline void group_fence() {}
__device__ inline void group_commit() {}
template <int pending, int NT> __device__ inline void group_wait(float (&)[NT][4]) {}
template <int NT> __device__ inline void belongs(float (&)[NT][4]) {}
template <int N> __device__ inline void keep_until_here(const std::uint32_t (&)[N][4], std::uint32_t) {}
__device__ inline void open_meeting(Meeting&, int) {}
__device__ inline void arrive(Meeting&) {}
__device__ inline void await(Meeting&, int) {}
__device__ inline void meet() {}
__device__ inline void publish_shared() {}
#define CLUSTER_OF(blocks)
__device__ inline void publish_meetings() {}
template <int BLOCKS> __device__ inline void meet_cluster() {}
template <int BLOCKS> __device__ inline void arrive_everywhere(Meeting&) {}
template <int count, int launched = 168> __device__ inline void keep_registers() {}

#endif

// Tokens' tile as the instruction is told of it, the lower word: its start in units of 16. The upper one: the 1,024 bytes
// between groups of 8 rows, and the 128-byte swizzle.
using Columns = std::uint32_t;
__device__ inline std::uint64_t described(Columns lower) { return (64ull | 1ull << 30) << 32 | lower; }
__device__ inline Columns columns_of(const void* tile) {
    return (static_cast<std::uint32_t>(__cvta_generic_to_shared(tile)) >> 4) + (1u << 16);
}

// d = a tokens (first) or d += a tokens over k = 16 step .. 16 step + 15 of a tile. live: columns that matter, for the CPU.
template <class T, int NT>
__device__ inline void group_step(float (&d)[NT][4], const std::uint32_t (&a)[4], Columns tile, int step, bool first, int) {
    wgmma(d, a, described(tile + 2 * step), first ? 0 : 1, T());
}
// The same with the 64 rows in a tile too, `step` the same in both.
template <class T, int NT>
__device__ inline void group_step_shared(float (&d)[NT][4], Columns rows, Columns tile, int step, bool first, int) {
    wgmma_shared(d, described(rows + 2 * step), described(tile + 2 * step), first ? 0 : 1, T());
}

// Tiles whose rows are the k, of 64 columns each, `apart` bytes from one to the next; 1,024 between groups of 8 k.
__device__ inline Columns columns_across(const void* tile, int apart) {
    return (static_cast<std::uint32_t>(__cvta_generic_to_shared(tile)) >> 4) + (static_cast<std::uint32_t>(apart >> 4) << 16);
}
// d = a columns or d += a columns over the k of rows 16 step .. 16 step + 15.
template <class T, int NT>
__device__ inline void group_step_across(float (&d)[NT][4], const std::uint32_t (&a)[4], Columns tiles, int step, bool first) {
    wgmma_across(d, a, described(tiles + 128 * step), first ? 0 : 1, T());
}

// d[0][0] of row g, d[0][2] of row g + 8: the sums of a over 16 N k. ones: 8 rows of a tile, all ones.
template <class T, int N>
__device__ inline void group_sums(float (&d)[1][4], const std::uint32_t (&a)[N][4], Columns ones) {
#pragma unroll
    for (int step = 0; step < N; ++step) wgmma(d, a[step], described(ones), step == 0 ? 0 : 1, T());
}

#else

#include "host/warpgroup.h"

using Columns = const char*;
inline Columns columns_of(const void* tile) { return static_cast<const char*>(tile); }
inline Columns columns_across(const void* tile, int) { return static_cast<const char*>(tile); }
template <class T, int N> inline void group_sums(float (&d)[1][4], const std::uint32_t (&a)[N][4], Columns) {
    float sum[2];
    row_sums<T>(sum, a);
    d[0][0] = d[0][1] = sum[0];
    d[0][2] = d[0][3] = sum[1];
}

#endif
