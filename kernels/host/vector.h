// Vectors of the compiler: what the host's own parts compute with.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace cpu {

// n elements that are computed with together, as GCC and Clang have them: arithmetic, comparisons (0 or -1) and ?: mean
// every element's own.
template <class E, int n> struct PackOf { typedef E type __attribute__((vector_size(sizeof(E) * n))); };
template <class E, int n> using Pack = typename PackOf<E, n>::type;

template <class P, class E> inline P load(const E* from) {
    P pack;
    std::memcpy(&pack, from, sizeof pack);
    return pack;
}
template <class P, class E> inline void store(E* to, const P& pack) { std::memcpy(to, &pack, sizeof pack); }
template <class P, class E> inline P all(E value) { return value - P{}; }
template <class P> inline bool any(const P& found) {
#ifdef __AVX512F__
    if constexpr (sizeof(P) == 64) return _mm512_test_epi32_mask((__m512i)found, (__m512i)found) != 0;
#endif
    std::uint64_t words[sizeof(P) / 8], one = 0;
    std::memcpy(words, &found, sizeof found);
    for (const std::uint64_t word : words) one |= word;
    return one != 0;
}

// a b + c with one rounding. By name where the processor has it: compilers take the loop for many single ones.
template <class P> inline P fused(const P& a, const P& b, const P& c) {
    constexpr bool single = sizeof(a[0]) == 4;
#ifdef __FMA__
#ifdef __AVX512F__
    if constexpr (sizeof(P) == 64 && single) return (P)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
    else if constexpr (sizeof(P) == 64) return (P)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#endif
    if constexpr (sizeof(P) == 32 && single) return (P)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    else if constexpr (sizeof(P) == 32) return (P)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#endif
    P sum;
    for (unsigned i = 0; i < sizeof(P) / sizeof(a[0]); ++i) sum[i] = std::fma(a[i], b[i], c[i]);
    return sum;
}

// body(0), .., body(n - 1) one after another, the numbers known to the compiler: arrays that they index stay in registers,
// which a loop does not promise.
#define CPU_INLINE __attribute__((always_inline))
template <class Body, int... i> CPU_INLINE inline void each(const Body& body, std::integer_sequence<int, i...>) {
    (body(std::integral_constant<int, i>()), ...);
}
template <int n, class Body> CPU_INLINE inline void each(const Body& body) { each(body, std::make_integer_sequence<int, n>()); }

// Elements of x, then of y, by their numbers; Index is a vector of as many integers of their size.
#ifdef __clang__
#define CPU_CHOICE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define CPU_CHOICE(x, y, ...) __builtin_shuffle(x, y, Index{__VA_ARGS__})
#endif

// Four words of each of four, as four of each word.
inline void transpose(Pack<std::uint32_t, 4> (&words)[4]) {
    using Index = Pack<std::int32_t, 4>;
    const auto low = [](const auto& x, const auto& y) { return CPU_CHOICE(x, y, 0, 4, 1, 5); };
    const auto high = [](const auto& x, const auto& y) { return CPU_CHOICE(x, y, 2, 6, 3, 7); };
    const auto a = low(words[0], words[2]), b = low(words[1], words[3]);
    const auto c = high(words[0], words[2]), d = high(words[1], words[3]);
    words[0] = low(a, b);
    words[1] = high(a, b);
    words[2] = low(c, d);
    words[3] = high(c, d);
}

}  // namespace cpu
