// Exchange between the 32 lanes of a warp, and reductions over a block in an order that the schedule cannot change.
//
// All 32 lanes must call. Sums go by a butterfly (lane distances 16, 8, 4, 2, 1): every lane gets the same bits.
#pragma once

#include <cstdint>

constexpr int WARP = 32;

#ifdef __CUDACC__

__device__ inline std::uint32_t exchange(std::uint32_t value, int from) { return __shfl_sync(0xffffffffu, value, from); }

#else

namespace cpu {
struct Exchange {
    std::uint32_t value, result;
    int from;
};
inline void exchange_warp(void* const* deposits) {
    for (int lane = 0; lane < 32; ++lane) {
        Exchange* mine = static_cast<Exchange*>(deposits[lane]);
        mine->result = static_cast<Exchange*>(deposits[mine->from & 31])->value;
    }
}
}  // namespace cpu

inline std::uint32_t exchange(std::uint32_t value, int from) {
    cpu::Exchange mine{value, 0, from};
    cpu::warp_collective(&mine, &cpu::exchange_warp);
    return mine.result;
}

#endif

// The value of lane `from`.
__device__ inline float shuffle(float value, int from) { return __uint_as_float(exchange(__float_as_uint(value), from)); }
__device__ inline int shuffle(int value, int from) { return static_cast<int>(exchange(static_cast<std::uint32_t>(value), from)); }
__device__ inline std::uint64_t shuffle(std::uint64_t value, int from) {
    const std::uint64_t high = exchange(static_cast<std::uint32_t>(value >> 32), from);
    return high << 32 | exchange(static_cast<std::uint32_t>(value), from);
}

struct Sum {
    __device__ float operator()(float a, float b) const { return __fadd_rn(a, b); }
    __device__ int operator()(int a, int b) const { return a + b; }
    __device__ std::uint64_t operator()(std::uint64_t a, std::uint64_t b) const { return a + b; }
};

// NaN wins over every number, so that it is never lost (fmaxf would drop it).
struct Max {
    __device__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
    __device__ int operator()(int a, int b) const { return a > b ? a : b; }
    __device__ std::uint64_t operator()(std::uint64_t a, std::uint64_t b) const { return a > b ? a : b; }
};

// Over the lanes whose number differs in the bits of `width` - 1 only (32: the whole warp; 4: groups of four).
template <int width = WARP, class V, class Combine> __device__ inline V warp_reduce(V value, Combine combine) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int distance = width / 2; distance > 0; distance /= 2) value = combine(value, shuffle(value, lane ^ distance));
    return value;
}

// Over a one-dimensional block of THREADS: warps by butterfly, then the warps' results in ascending order.
// `scratch` is shared memory; it may be used again after the call.
template <int THREADS, class V, class Combine>
__device__ inline V block_reduce(V value, Combine combine, V (&scratch)[THREADS / WARP]) {
    value = warp_reduce(value, combine);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    value = scratch[0];
    for (int warp = 1; warp < THREADS / WARP; ++warp) value = combine(value, scratch[warp]);
    __syncthreads();
    return value;
}
