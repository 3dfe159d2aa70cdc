// One step of a Hopper tensor core on the CPU, bit for bit (docs/tensor_core.md):
//   d = f(c, a_1 b_1, ..., a_16 b_16)
//   1. exponents are taken as stored: e(x), for a subnormal the type's smallest; a product has e(a) + e(b); zeros do
//      not count. E is the largest of the 17.
//   2. every product and c is truncated toward zero to a multiple of 2^(E - 25); the 17 are added exactly.
//   3. the sum is truncated toward zero to float32; zero is +0; past the range is Inf; NaN is 0x7fffffff.
//
// `step` says this in integers for one element. `step_row` does the same for a row of columns with vector
// instructions wherever E is far from the ends of float32's range, and calls `step` elsewhere.
// With CPU_FLOAT32_MMA the sum is plain float32 fused multiply-add in ascending k: faster, other bits.
// With CPU_MMA_STEP and its three neighbours below `step` is another GPU's unit, so that what finds a unit's parameters
// can be tried where there is no such GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef CPU_MMA_STEP
#define CPU_MMA_OTHER_UNIT
#else
#define CPU_MMA_STEP 16            // products added at once
#define CPU_MMA_FRACTION_BITS 25   // kept below the largest exponent
#define CPU_MMA_ALIGNMENT 0        // of a term: 0 toward zero, 1 toward minus infinity, 2 to nearest even
#define CPU_MMA_ROUNDING 0         // of the sum: 0 toward zero, 2 to nearest even
#endif

namespace cpu {

constexpr int STEP = CPU_MMA_STEP, FRACTION_BITS = CPU_MMA_FRACTION_BITS;
constexpr int ZERO_EXPONENT = -10000;     // below every sum of real exponents
constexpr int SPECIAL_EXPONENT = 30000;   // Inf and NaN: above every real exponent, also when times zero

template <class T> struct Operand;
template <> struct Operand<__nv_bfloat16> {
    static constexpr int smallest_exponent = -126;
    static float widen(std::uint32_t bits) { return __uint_as_float(bits << 16); }
};
template <> struct Operand<__half> {
    static constexpr int smallest_exponent = -14;
    static float widen(std::uint32_t bits) {  // in operations that the compiler vectorises, without a half type
        const std::uint32_t magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
        const float finite = __uint_as_float(magnitude << 13) * 0x1p112f;  // exact, also for subnormals
        const std::uint32_t special = 0x7f800000u | (magnitude & 0x3ffu) << 13;
        return __uint_as_float((magnitude < 0x7c00u ? __float_as_uint(finite) : special) | sign);
    }
};

inline int exponent_of(float x, int smallest) {
    const std::uint32_t bits = __float_as_uint(x) & 0x7fffffffu;
    if (bits == 0) return ZERO_EXPONENT;
    if (bits >= 0x7f800000u) return SPECIAL_EXPONENT;
    const int e = static_cast<int>(bits >> 23) - 127;
    return e < smallest ? smallest : e;
}

// |x| / 2^(e - 23), an integer below 2^24.
inline std::int64_t significand_of(float x, int e) {
    return static_cast<std::int64_t>(std::ldexp(static_cast<double>(std::fabs(x)), 23 - e));
}

// magnitude / 2^shift of a number with this sign, rounded as `rule` says; shift > 0.
inline std::int64_t shifted(std::int64_t magnitude, int shift, bool negative, int rule) {
    if (shift > 62) return rule == 1 && negative && magnitude != 0;
    const std::int64_t kept = magnitude >> shift, lost = magnitude - (kept << shift), half = std::int64_t{1} << (shift - 1);
    if (rule == 1) return kept + (negative && lost != 0);
    if (rule == 2) return kept + (lost > half || (lost == half && (kept & 1)));
    return kept;
}

inline float step(float c, const float* a, const float* b, int b_stride, int smallest) {
    int largest = exponent_of(c, -126);
    bool special = largest == SPECIAL_EXPONENT;
    float special_sum = c;
    for (int k = 0; k < STEP; ++k) {
        const float x = a[k], y = b[k * b_stride];
        const int ea = exponent_of(x, smallest), eb = exponent_of(y, smallest);
        if (ea == SPECIAL_EXPONENT || eb == SPECIAL_EXPONENT) {
            special_sum += x * y;
            special = true;
        }
        if (ea + eb > largest) largest = ea + eb;
    }
    if (special) {
        if (std::isnan(special_sum)) return __uint_as_float(0x7fffffffu);
        if (std::isinf(special_sum)) return special_sum;
    }
    if (largest < ZERO_EXPONENT / 2) return 0.0f;

    std::int64_t sum = 0;  // in units of 2^(largest - FRACTION_BITS)
    const auto add = [&](std::int64_t magnitude, int shift, bool negative) {
        const std::int64_t term = shift <= 0 ? magnitude * (std::int64_t{1} << -shift)
                                             : shifted(magnitude, shift, negative, CPU_MMA_ALIGNMENT);
        sum += negative ? -term : term;
    };
    for (int k = 0; k < STEP; ++k) {
        const float x = a[k], y = b[k * b_stride];
        if (x == 0 || y == 0) continue;
        const int ea = exponent_of(x, smallest), eb = exponent_of(y, smallest);
        add(significand_of(x, ea) * significand_of(y, eb), largest + 46 - FRACTION_BITS - ea - eb, std::signbit(x) != std::signbit(y));
    }
    if (c != 0) {
        const int ec = exponent_of(c, -126);
        add(significand_of(c, ec), largest + 23 - FRACTION_BITS - ec, std::signbit(c));
    }
    if (sum == 0) return 0.0f;

    std::int64_t magnitude = sum < 0 ? -sum : sum;
    const int top = 63 - __builtin_clzll(static_cast<unsigned long long>(magnitude));
    int unit = top - 23 + largest - FRACTION_BITS;  // exponent of the result's last place
    if (unit < -149) unit = -149;
    const int shift = unit - (largest - FRACTION_BITS);
    magnitude = shift > 0 ? shifted(magnitude, shift, sum < 0, CPU_MMA_ROUNDING) : magnitude << -shift;
    const double value = std::ldexp(static_cast<double>(magnitude), unit);
    const float result = value >= 0x1p128 ? std::numeric_limits<float>::infinity() : static_cast<float>(value);
    return sum < 0 ? -result : result;
}

// One row of A against `columns` columns of B. b and b_exponent are [16][columns]; c is updated in place.
template <int columns>
inline void step_row(float* __restrict c, const float* __restrict a, const int* __restrict a_exponent,
                     const float* __restrict b, const int* __restrict b_exponent, int smallest) {
    int largest[columns];
    for (int n = 0; n < columns; ++n) largest[n] = exponent_of(c[n], -126);
    for (int k = 0; k < 16; ++k)
        for (int n = 0; n < columns; ++n) {
            const int e = a_exponent[k] + b_exponent[k * columns + n];
            largest[n] = largest[n] < e ? e : largest[n];
        }
    // Inside this range no intermediate of the vector form rounds, overflows or underflows: products that float32
    // cannot hold lie below the unit 2^(E - 25) and vanish.
    int ordinary = 1;
    for (int n = 0; n < columns; ++n)
        ordinary &= (largest[n] >= -90) & (largest[n] <= 100) | (largest[n] < ZERO_EXPONENT / 2);
    if (!ordinary) {
        for (int n = 0; n < columns; ++n) c[n] = step(c[n], a, b + n, columns, smallest);
        return;
    }
    // |product| < 4 * 2^25 units; 8 of them and c stay below 2^31.
    float units[columns];
    std::int32_t low[columns], high[columns];
    for (int n = 0; n < columns; ++n) {
        largest[n] = largest[n] < -90 ? -90 : largest[n];
        units[n] = __uint_as_float(static_cast<std::uint32_t>(127 + 25 - largest[n]) << 23);
        low[n] = static_cast<std::int32_t>(c[n] * units[n]);
        high[n] = 0;
    }
    for (int k = 0; k < 8; ++k)
        for (int n = 0; n < columns; ++n) {
            low[n] += static_cast<std::int32_t>(a[k] * b[k * columns + n] * units[n]);
            high[n] += static_cast<std::int32_t>(a[k + 8] * b[(k + 8) * columns + n] * units[n]);
        }
    for (int n = 0; n < columns; ++n) {
        const double sum = static_cast<double>(low[n]) + static_cast<double>(high[n]);
        std::uint64_t bits;
        std::memcpy(&bits, &sum, 8);
        bits &= ~std::uint64_t{0x1fffffff};  // 24 significant bits
        double truncated;
        std::memcpy(&truncated, &bits, 8);
        const std::uint64_t unit_bits = static_cast<std::uint64_t>(1023 + largest[n] - 25) << 52;
        double unit;
        std::memcpy(&unit, &unit_bits, 8);
        c[n] = static_cast<float>(truncated * unit);
    }
}

// The warp-wide operation behind mma_step: gathers the fragments of 32 lanes, computes, scatters the result.
// A register holds two neighbours (k of the operands, columns of d), so both move together.
template <class T, int MT, int NT> void mma_warp(void* const* deposits) {
    constexpr int rows = 16 * MT, columns = 8 * NT;
    alignas(64) std::uint32_t a_pairs[rows][8], b_pairs[8][columns];
    alignas(64) float a[rows][16], b[16][columns], d[rows][columns];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& tile = *static_cast<const Fragments<T, MT, NT>*>(deposits[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < MT; ++i)
            for (int r = 0; r < 4; ++r) a_pairs[16 * i + g + 8 * (r & 1)][t + 4 * (r >> 1)] = tile.a[i][r];
        for (int j = 0; j < NT; ++j)
            for (int r = 0; r < 2; ++r) b_pairs[t + 4 * r][8 * j + g] = tile.b[j][r];
        for (int i = 0; i < MT; ++i)
            for (int j = 0; j < NT; ++j)
                for (int half = 0; half < 2; ++half)
                    std::memcpy(&d[16 * i + g + 8 * half][8 * j + 2 * t], &tile.d[i][j][2 * half], 8);
    }
    for (int m = 0; m < rows; ++m)
        for (int pair = 0; pair < 8; ++pair) {
            a[m][2 * pair] = Operand<T>::widen(a_pairs[m][pair] & 0xffffu);
            a[m][2 * pair + 1] = Operand<T>::widen(a_pairs[m][pair] >> 16);
        }
    for (int pair = 0; pair < 8; ++pair)
        for (int n = 0; n < columns; ++n) {
            b[2 * pair][n] = Operand<T>::widen(b_pairs[pair][n] & 0xffffu);
            b[2 * pair + 1][n] = Operand<T>::widen(b_pairs[pair][n] >> 16);
        }
#ifdef CPU_FLOAT32_MMA
    for (int m = 0; m < rows; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < columns; ++n) d[m][n] = std::fma(a[m][k], b[k][n], d[m][n]);
#elif defined(CPU_MMA_OTHER_UNIT)
    for (int m = 0; m < rows; ++m)
        for (int n = 0; n < columns; ++n)
            for (int k = 0; k < 16; k += STEP)
                d[m][n] = step(d[m][n], a[m] + k, &b[k][n], columns, Operand<T>::smallest_exponent);
#else
    constexpr int smallest = Operand<T>::smallest_exponent;
    alignas(64) int a_exponent[rows][16], b_exponent[16][columns];
    for (int m = 0; m < rows; ++m)
        for (int k = 0; k < 16; ++k) a_exponent[m][k] = exponent_of(a[m][k], smallest);
    for (int k = 0; k < 16; ++k)
        for (int n = 0; n < columns; ++n) b_exponent[k][n] = exponent_of(b[k][n], smallest);
    for (int m = 0; m < rows; ++m) step_row<columns>(d[m], a[m], a_exponent[m], b[0], b_exponent[0], smallest);
#endif
    for (int lane = 0; lane < 32; ++lane) {
        const auto& tile = *static_cast<const Fragments<T, MT, NT>*>(deposits[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < MT; ++i)
            for (int j = 0; j < NT; ++j)
                for (int half = 0; half < 2; ++half)
                    std::memcpy(&tile.d[i][j][2 * half], &d[16 * i + g + 8 * half][8 * j + 2 * t], 8);
    }
}

}  // namespace cpu
