// The CUDA execution model on a CPU, as far as the kernels of this project use it.
//
// Included before a .cu file when that file is compiled with g++ or clang++. A grid's blocks are spread over
// operating-system threads; the threads of one block are fibers that run until they reach a barrier or a
// warp-wide operation. The kernel text stays as it is: __shared__, threadIdx, __syncthreads and the wrappers of
// warp.cuh and mma.cuh mean here what they mean on the GPU, except that
//   - a thread that returns while others wait at __syncthreads is an error, not undefined behaviour;
//   - all 32 lanes must take part in a warp-wide operation;
//   - a vector (uint4, float4, ..) at an address that is no multiple of its size is a named error.
// The scheduler and what watches it (runtime.h) are compiled once and shared by all kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#ifdef __AVX__
#include <immintrin.h>
#endif  // __AVX__

#define CPU_SHARED __attribute__((visibility("default")))  // between the runtime's library and a kernel's

namespace cpu {

struct Copy {  // that a thread asked for (async.h)
    void* to;
    const void* from;  // nullptr: zeros
    unsigned bytes, group;
};
// What a thread has asked for and was not made, in this order.
template <class Asked, unsigned most> class Pending {
public:
    unsigned groups = 0;  // begun and ended

    explicit Pending(Asked (&ring)[most]) : ring_(ring) {}
    bool empty() const { return first_ == end_; }
    bool full() const { return size() == most; }
    unsigned size() const { return end_ - first_; }
    const Asked& at(unsigned i) const { return ring_[(first_ + i) % most]; }
    const Asked& pop() { return ring_[first_++ % most]; }
    void push(const Asked& asked) { ring_[end_++ % most] = asked; }
    void clear() { groups = first_ = end_ = 0; }

private:
    unsigned first_ = 0, end_ = 0;
    Asked* const ring_;
};
constexpr unsigned MOST_COPIES = 256, MOST_STEPS = 16;
struct Copies : Pending<Copy, MOST_COPIES> {
    using Pending::Pending;
    int poison = -1;  // what lies where they go to until they are made; -1: they are made at once, and there are never any
};
struct Steps;
struct GroupStep {  // of a warpgroup's tensor core, one lane's part (warpgroup.h)
    void (*run)(const Steps* const* lanes, unsigned at, unsigned count);
    float* d;
    const std::uint32_t* a;
    const void *rows, *tile;  // rows: in place of a, or null
    int step, live, columns;
    bool first, across;  // across: rows of the tile are the k
    unsigned group;
};
struct Steps : Pending<GroupStep, MOST_STEPS> {
    using Pending::Pending;
    unsigned due = 0;  // to be made now
};

class Worker;
struct Thread {  // the CUDA thread that the running fiber executes
    uint3 thread_index, block_index;
    dim3 block_size, grid_size;
    int lane, warp;
    Worker* worker;
    Copies copies{copy_ring};
    Steps steps{step_ring};
    Copy copy_ring[MOST_COPIES];  // last: what every switch reads lies close together
    GroupStep step_ring[MOST_STEPS];
};

extern CPU_SHARED __thread Thread* self;

// Makes the running fiber the next thread of its block that has not begun; false where there is none.
CPU_SHARED bool next_thread(const Thread& self);

// Waits until every thread of the block has arrived.
CPU_SHARED void barrier(const Thread& self);

// One warp-wide operation: each lane deposits `mine`; the last of the 32 to arrive runs `compute` on all 32
// deposits, in lane order; then every lane goes on.
using Compute = void (*)(void* const* deposits);
CPU_SHARED void warp_collective(const Thread& self, void* mine, Compute compute);
inline void warp_collective(void* mine, Compute compute) { warp_collective(*self, mine, compute); }
// The same for a warpgroup, 128 threads.
CPU_SHARED void group_collective(const Thread& self, void* mine, Compute compute);
inline void group_collective(void* mine, Compute compute) { group_collective(*self, mine, compute); }
// So many bytes, aligned to 64, for `compute` to work in.
constexpr std::size_t SCRATCH = 96 * 1024;
CPU_SHARED void* scratch(const Thread& self);
inline void* scratch() { return scratch(*self); }

// Ends the launch: a vector of so many bytes was read or written where a GPU reports a misaligned address.
[[noreturn]] CPU_SHARED void misaligned(unsigned bytes);

// CUDA's vector type of 8 or 16 bytes, whose copies look at the addresses: a CPU would take any.
template <class Plain> struct alignas(sizeof(Plain)) Vector : Plain {
    Vector() = default;
    Vector(const Plain& plain) : Plain(plain) {}
    template <class... Elements, class = std::enable_if_t<(sizeof...(Elements) > 1)>>
    Vector(Elements... elements) : Plain{elements...} {}
    Vector(const Vector& other) : Plain(other.aligned()) {}
    Vector& operator=(const Vector& other) {
        aligned();
        Plain::operator=(other.aligned());
        return *this;
    }
    const Plain& aligned() const {
        auto address = reinterpret_cast<std::uintptr_t>(this);
        asm("" : "+r"(address));  // or the compiler takes what it checks for granted
        if (address % sizeof(Plain) != 0) misaligned(sizeof(Plain));
        return *this;
    }
};

// Runs a grid; `body(arguments)` is the running thread and all that `next_thread` finds. Returns nullptr, or what went
// wrong.
using Body = void (*)(void* const* arguments);
CPU_SHARED const char* run(const unsigned grid[3], const unsigned block[3], Body body, void* const* arguments);

// Calls a kernel with the values that `arguments` points to, as cuLaunchKernel does.
template <auto kernel> struct Entry;
template <class... Parameters, void (*kernel)(Parameters...)> struct Entry<kernel> {
    template <std::size_t... i> static void unpack(void* const* arguments, std::index_sequence<i...>) {
        do kernel(*static_cast<std::remove_const_t<Parameters>*>(arguments[i])...);
        while (next_thread(*self));
    }
    static void body(void* const* arguments) { unpack(arguments, std::index_sequence_for<Parameters...>{}); }
    static constexpr unsigned sizes[] = {sizeof(Parameters)..., 0};  // in bytes, zero-terminated
};

}  // namespace cpu

#undef __shared__
#undef __restrict__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define threadIdx (cpu::self->thread_index)
#define blockIdx (cpu::self->block_index)
#define blockDim (cpu::self->block_size)
#define gridDim (cpu::self->grid_size)
#define __syncthreads() cpu::barrier(*cpu::self)

#define uint2 cpu::Vector<uint2>
#define uint4 cpu::Vector<uint4>
#define int2 cpu::Vector<int2>
#define int4 cpu::Vector<int4>
#define float2 cpu::Vector<float2>
#define float4 cpu::Vector<float4>

// CUDA's intrinsics that have no host version, with the same results. Contraction is off (-ffp-contract=off),
// so a plain operator is one correctly rounded operation.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
inline unsigned __float_as_uint(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; std::memcpy(&x, &u, 4); return x; }
// Conversions as in the headers, which go through many branches; NaN becomes 0x7fff, or 0x7fffffff.
namespace cpu {
template <class T> inline T from_bits(unsigned bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    T value;
    std::memcpy(&value, &half, 2);
    return value;
}
inline __nv_bfloat16 to_bfloat16(float x) {
    const unsigned u = __float_as_uint(x), rounded = (u + 0x7fffu + (u >> 16 & 1)) >> 16;
    return from_bits<__nv_bfloat16>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded);
}
#ifdef __F16C__
inline __half to_half(float x) {
    const unsigned rounded = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
    return from_bits<__half>((__float_as_uint(x) & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded);
}
inline float from_half(__half x) {
    std::uint16_t bits;
    std::memcpy(&bits, &x, 2);
    return (bits & 0x7fffu) > 0x7c00u ? __uint_as_float(0x7fffffffu) : _cvtsh_ss(bits);
}
// __hmul2 of two pairs.
inline std::uint32_t multiply_halves(std::uint32_t a, std::uint32_t b) {
    const auto wide = [](std::uint32_t pair) { return _mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(pair))); };
    const __m128 product = _mm_mul_ps(wide(a), wide(b));
    const __m128i rounded = _mm_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT);
    const __m128i nan = _mm_castps_si128(_mm_cmpunord_ps(product, product)), nans = _mm_packs_epi32(nan, nan);
    return static_cast<std::uint32_t>(_mm_cvtsi128_si32(_mm_blendv_epi8(rounded, _mm_set1_epi16(0x7fff), nans)));
}
#else
inline std::uint32_t multiply_halves(std::uint32_t a, std::uint32_t b) {
    const auto half = [](std::uint32_t x, std::uint32_t y) {
        const __half product = __float2half_rn(__half2float(from_bits<__half>(x)) * __half2float(from_bits<__half>(y)));
        std::uint16_t bits;
        std::memcpy(&bits, &product, 2);
        return std::uint32_t{bits};
    };
    return half(a, b) | half(a >> 16, b >> 16) << 16;
}
#endif
}  // namespace cpu
#define __float2bfloat16_rn cpu::to_bfloat16
#ifdef __F16C__
#define __float2half_rn cpu::to_half
#define __half2float cpu::from_half
#endif
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
// Picks four bytes of the eight in (y, x), x the low half; each selector nibble is 0..7.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const auto byte = [&](int i) { const unsigned s = selector >> 4 * i; return ((s & 4 ? y : x) >> (8 * (s & 3))) & 0xff; };
    return byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24;
}
