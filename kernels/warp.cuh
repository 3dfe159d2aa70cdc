// Exchange between the 32 lanes of a warp, and reductions over a block in an order that the schedule cannot change.
//
// All 32 lanes must call. Sums go by a butterfly (lane distances 16, 8, 4, 2, 1): every lane gets the same bits.
#pragma once

#include <cstdint>

constexpr int WARP = 32;

#ifdef __CUDACC__

__device__ inline std::uint32_t exchange(std::uint32_t value, int from) { return __shfl_sync(0xffffffffu, value, from); }

// The lanes of which it is true, lane 0 in the lowest bit.
__device__ inline std::uint32_t vote(bool mine) { return __ballot_sync(0xffffffffu, mine); }

// Among the four lanes whose numbers differ in the last two bits only: word i of lane t becomes word t of lane i.
__device__ inline void quad_transpose(std::uint32_t (&words)[4]) {
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    std::uint32_t half[4];  // exchanged between neighbours
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const std::uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? words[i] : words[i + 1], 1);
        half[i] = odd ? other : words[i];
        half[i + 1] = odd ? words[i + 1] : other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const std::uint32_t other = __shfl_xor_sync(0xffffffffu, high ? half[i] : half[i + 2], 2);
        words[i] = high ? other : half[i];
        words[i + 2] = high ? half[i + 2] : other;
    }
}

// Word i becomes the value of the i-th of these four lanes.
__device__ inline void quad_gather(std::uint32_t (&words)[4], std::uint32_t value) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = __shfl_sync(0xffffffffu, value, i, 4);
}

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
struct Vote {
    std::uint32_t mine, all;
};
inline void vote_warp(void* const* deposits) {
    std::uint32_t all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= static_cast<Vote*>(deposits[lane])->mine << lane;
    for (int lane = 0; lane < 32; ++lane) static_cast<Vote*>(deposits[lane])->all = all;
}
inline void transpose_quads(void* const* deposits) {
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < lane % 4; ++i)
            std::swap(static_cast<std::uint32_t*>(deposits[lane])[i],
                      static_cast<std::uint32_t*>(deposits[lane - lane % 4 + i])[lane % 4]);
}
}  // namespace cpu

inline std::uint32_t vote(bool mine) {
    cpu::Vote asked{mine, 0};
    cpu::warp_collective(&asked, &cpu::vote_warp);
    return asked.all;
}
inline void quad_transpose(std::uint32_t (&words)[4]) { cpu::warp_collective(words, &cpu::transpose_quads); }
inline void quad_gather(std::uint32_t (&words)[4], std::uint32_t value) {
    for (std::uint32_t& word : words) word = value;
    quad_transpose(words);
}
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
#ifdef __CUDACC__
template <int width = WARP, class V, class Combine> __device__ inline V warp_reduce(V value, Combine combine) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int distance = width / 2; distance > 0; distance /= 2) value = combine(value, shuffle(value, lane ^ distance));
    return value;
}
#else
namespace cpu {
// The same exchanges for all lanes at once: one meeting of the warp instead of one for each distance.
template <int width, class V, class Combine> void reduce_warp(void* const* deposits) {
    V values[WARP], next[WARP];
    for (int lane = 0; lane < WARP; ++lane) values[lane] = *static_cast<V*>(deposits[lane]);
    for (int distance = width / 2; distance > 0; distance /= 2) {
        for (int lane = 0; lane < WARP; ++lane) next[lane] = Combine()(values[lane], values[lane ^ distance]);
        std::memcpy(values, next, sizeof values);
    }
    for (int lane = 0; lane < WARP; ++lane) *static_cast<V*>(deposits[lane]) = values[lane];
}
}  // namespace cpu
template <int width = WARP, class V, class Combine> inline V warp_reduce(V value, Combine) {
    cpu::warp_collective(&value, &cpu::reduce_warp<width, V, Combine>);
    return value;
}
#endif

// Over a one-dimensional block of THREADS: warps by butterfly, then the warps' results in ascending order.
// `scratch` is shared memory, which may not be used again after the call without a barrier.
template <int THREADS, class V, class Combine>
__device__ inline V block_reduce(V value, Combine combine, V (&scratch)[THREADS / WARP]) {
    value = warp_reduce(value, combine);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    value = scratch[0];
    for (int warp = 1; warp < THREADS / WARP; ++warp) value = combine(value, scratch[warp]);
    return value;
}
