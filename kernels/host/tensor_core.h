// One step of a Hopper tensor core on the CPU, bit for bit (docs/tensor_core.md):
//   d = f(c, a_1 b_1, ..., a_16 b_16)
//   1. exponents are taken as stored: e(x), for a subnormal the type's smallest; a product has e(a) + e(b); zeros do
//      not count. E is the largest of the 17.
//   2. every product and c is truncated toward zero to a multiple of 2^(E - 25); the 17 are added exactly.
//   3. the sum is truncated toward zero to float32; zero is +0; past the range is Inf; NaN is 0x7fffffff.
//
// `step` says this in integers for one element. `multiply` does the same for rows and columns with vector instructions
// wherever E is far from the ends of float32's range, and calls `step` elsewhere.
// With CPU_FLOAT32_MMA the sum is plain float32 fused multiply-add in ascending k: faster, other bits.
// With CPU_MMA_STEP and its three neighbours below `step` is another GPU's unit, so that what finds a unit's parameters
// can be tried where there is no such GPU.
#pragma once

#include "vector.h"

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
constexpr int SPECIAL_EXPONENT = 15000;   // Inf and NaN: above every real exponent, also when times zero

// a b + c where that is exact.
template <class P> inline P exact(const P& a, const P& b, const P& c) {
#ifdef __FMA__
    return fused(a, b, c);
#else
    return a * b + c;
#endif
}
// 24 significant bits of what float32's range holds, toward zero.
template <int n> inline Pack<float, n> truncated(const Pack<double, n>& x) {
    using Bits = Pack<std::int64_t, n>;
    return __builtin_convertvector((Pack<double, n>)((Bits)x & ~std::int64_t{0x1fffffff}), Pack<float, n>);
}

// Widens the low halves of n words.
template <class T> struct Operand;
template <> struct Operand<__nv_bfloat16> {
    static constexpr int fraction_bits = 7, exponent_offset = 127, smallest_exponent = -126;
    template <int n> static Pack<float, n> widen(const Pack<std::uint32_t, n>& bits) { return (Pack<float, n>)(bits << 16); }
};
template <> struct Operand<__half> {
    static constexpr int fraction_bits = 10, exponent_offset = 15, smallest_exponent = -14;
    template <int n> static Pack<float, n> widen(const Pack<std::uint32_t, n>& bits) {
        using Words = Pack<std::uint32_t, n>;
        const Words magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
        const Words finite = (Words)((Pack<float, n>)(magnitude << 13) * 0x1p112f);  // exact, also for subnormals
        const Words special = 0x7f800000u | (magnitude & 0x3ffu) << 13;
        return (Pack<float, n>)((magnitude < 0x7c00u ? finite : special) | sign);
    }
};

inline int exponent_of(float x, int smallest) {
    const std::uint32_t bits = __float_as_uint(x) & 0x7fffffffu;
    if (bits == 0) return ZERO_EXPONENT;
    if (bits >= 0x7f800000u) return SPECIAL_EXPONENT;
    const int e = static_cast<int>(bits >> 23) - 127;
    return e < smallest ? smallest : e;
}

// |x| / 2^(e - 23), an integer below 2^24: e is x's exponent, or its type's smallest.
inline std::int64_t significand_of(float x, int e) {
    const std::uint32_t bits = __float_as_uint(x) & 0x7fffffffu, stored = bits >> 23;
    const std::int64_t significand = (bits & 0x7fffffu) | (stored != 0 ? 0x800000u : 0u);
    return significand >> (e - (stored != 0 ? static_cast<int>(stored) - 127 : -126));
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
    const std::int64_t power = std::int64_t{unit + 1023} << 52;  // 2^unit
    double value;
    std::memcpy(&value, &power, sizeof value);
    value *= static_cast<double>(magnitude);
    const float result = value >= 0x1p128 ? std::numeric_limits<float>::infinity() : static_cast<float>(value);
    return sum < 0 ? -result : result;
}

// One side of a step: `lines` rows of A or columns of B.
template <int lines> struct Side {
    static constexpr int group = lines % 16 == 0 ? 16 : 8;  // that are computed with together
    alignas(64) std::uint32_t pairs[8][lines];         // of elements that follow one another along k
    alignas(64) double wide[16][lines];                // the elements
    // Of the line's elements other than zero: the largest exponent, and one of which every element is a multiple. Of
    // zeros alone ZERO_EXPONENT and its opposite.
    alignas(64) std::int32_t largest[lines], lowest[lines];
    bool detailed;                                     // whether the rest is there
    alignas(64) float value[16][lines];
    alignas(64) std::int16_t exponent[8][lines][2];    // of k = 2 i and 2 i + 1, as stored; of a zero ZERO_EXPONENT
};

// The elements of n lines from `line` on, of k = 2 i and 2 i + 1.
template <class T, int n, int lines> inline void elements(Pack<float, n> (&both)[2], const Side<lines>& side, int i, int line) {
    const auto words = load<Pack<std::uint32_t, n>>(&side.pairs[i][line]);
    both[0] = Operand<T>::template widen<n>(words & 0xffffu);
    both[1] = Operand<T>::template widen<n>(words >> 16);
}

template <class T, int lines> inline void unpack(Side<lines>& side) {
    constexpr int n = Side<lines>::group;
    for (int i = 0; i < 8; ++i)
        for (int l = 0; l < lines; l += n) {
            Pack<float, n> both[2];
            elements<T, n>(both, side, i, l);
            for (int odd = 0; odd < 2; ++odd) store(&side.value[2 * i + odd][l], both[odd]);
        }
}

// The exponents of n lines' elements from the pairs.
template <class T, int n> inline Pack<std::int16_t, 2 * n> exponents(const Pack<std::int16_t, 2 * n>& pairs) {
    using Halves = Pack<std::int16_t, 2 * n>;
    constexpr std::int16_t infinity = 0x7fff >> Operand<T>::fraction_bits << Operand<T>::fraction_bits;
    const Halves magnitude = pairs & std::int16_t{0x7fff};
    Halves e = (magnitude >> Operand<T>::fraction_bits) - std::int16_t{Operand<T>::exponent_offset};
    const Halves smallest = all<Halves>(std::int16_t{Operand<T>::smallest_exponent});
    e = e < smallest ? smallest : e;
    e = magnitude >= infinity ? all<Halves>(std::int16_t{SPECIAL_EXPONENT}) : e;
    return magnitude == 0 ? all<Halves>(std::int16_t{ZERO_EXPONENT}) : e;
}

// What `whole_step` reads, from the pairs.
template <class T, int lines> inline void measure(Side<lines>& side) {
    constexpr int n = Side<lines>::group;
    using Halves = Pack<std::int16_t, 2 * n>;
    using Words = Pack<std::int32_t, n>;
    const auto low = [](const Halves& x) { return (Words)x << 16 >> 16; };
    const auto high = [](const Halves& x) { return (Words)x >> 16; };
    for (int l = 0; l < lines; l += n) {
        Halves largest = all<Halves>(std::int16_t{ZERO_EXPONENT}), least = -largest;
        Halves fractions = all<Halves>(static_cast<std::int16_t>(1 << Operand<T>::fraction_bits));
        for (int i = 0; i < 8; ++i) {
            const Halves x = load<Halves>(&side.pairs[i][l]);
            const Halves stored = exponents<T, n>(x);
            const Halves nonzero = stored == std::int16_t{ZERO_EXPONENT} ? -stored : stored;
            largest = largest < stored ? stored : largest;
            least = nonzero < least ? nonzero : least;
            fractions |= x;
            Pack<float, n> both[2];
            elements<T, n>(both, side, i, l);
            for (int odd = 0; odd < 2; ++odd)
                store(&side.wide[2 * i + odd][l], __builtin_convertvector(both[odd], Pack<double, n>));
        }
        store(&side.largest[l], low(largest) < high(largest) ? high(largest) : low(largest));
        // The place of the lowest bit that any fraction has, from the exponent of that bit as a float.
        const Words fraction = low(fractions) | high(fractions), bit = fraction & -fraction;
        const Words place = ((Words)__builtin_convertvector(bit, Pack<float, n>) >> 23) - 127;
        const Words lowest = low(least) < high(least) ? low(least) : high(least);
        store(&side.lowest[l], lowest - Operand<T>::fraction_bits + place);
    }
    side.detailed = false;
}

// What `any_step` reads besides.
template <class T, int lines> inline void detail(Side<lines>& side) {
    if (std::exchange(side.detailed, true)) return;
    constexpr int n = Side<lines>::group;
    unpack<T>(side);
    for (int i = 0; i < 8; ++i)
        for (int l = 0; l < lines; l += n)
            store(&side.exponent[i][l], exponents<T, n>(load<Pack<std::int16_t, 2 * n>>(&side.pairs[i][l])));
}

// Whether nothing is cut off before the sum of any column of B from n0 on with row m of A; double then holds it exactly,
// in any order.
template <int rows, int columns>
inline bool is_whole(const float* c, const Side<rows>& a, int m, const Side<columns>& b, int n0) {
    constexpr int n = Side<columns>::group;
    using Words = Pack<std::int32_t, n>;
    using Floats = Pack<float, n>;
    // The larger of c's exponent and of the largest product's, or more: a row's and a column's largest need not meet.
    // With 2^-115 as the least unit and 2^75 as the largest nothing below leaves float32's normal range.
    const Floats before = load<Floats>(c);
    const Words exponent = ((Words)before >> 23 & 0xff) - 127;
    Words largest = load<Words>(&b.largest[n0]) + a.largest[m];
    largest = largest < exponent ? exponent : largest;
    largest = largest < -90 ? all<Words>(std::int32_t{-90}) : largest;
    const Floats units = before * (Floats)((127 + 25 - largest) << 23);  // of 2^(largest - 25)
    const Floats whole = __builtin_convertvector(__builtin_convertvector(units, Words), Floats);
    return !any((largest > 100) | (load<Words>(&b.lowest[n0]) + (a.lowest[m] + 25) < largest) | (whole != units));
}

// The sums of `together` rows from m on, where they are whole.
template <int together, int rows, int columns>
inline void whole_steps(float* c, const Side<rows>& a, int m, const Side<columns>& b, int n0) {
    constexpr int n = Side<columns>::group, half = n / 2;
    using Doubles = Pack<double, half>;
    Doubles sum[together][2];
    each<2 * together>([&](auto i) CPU_INLINE {
        const float* part = c + i / 2 * columns + i % 2 * half;
        sum[i / 2][i % 2] = 0.0 + __builtin_convertvector(load<Pack<float, half>>(part), Doubles);  // never -0
    });
    for (int k = 0; k < 16; ++k) {
        const Doubles line[2] = {load<Doubles>(&b.wide[k][n0]), load<Doubles>(&b.wide[k][n0 + half])};
        each<together>([&](auto r) CPU_INLINE {
            const Doubles element = all<Doubles>(a.wide[k][m + r]);
            sum[r][0] = exact(element, line[0], sum[r][0]);
            sum[r][1] = exact(element, line[1], sum[r][1]);
        });
    }
    each<2 * together>([&](auto i) CPU_INLINE {
        store(c + i / 2 * columns + i % 2 * half, truncated<half>(sum[i / 2][i % 2]));
    });
}

// The same for all numbers.
template <int rows, int columns>
inline void any_step(float* c, const Side<rows>& a, int m, const Side<columns>& b, int n0, int smallest) {
    constexpr int n = Side<columns>::group, half = n / 2;
    using Halves = Pack<std::int16_t, 2 * n>;
    using Words = Pack<std::int32_t, n>;
    using Floats = Pack<float, n>;
    const auto zero = [](const Words& exponent) { return exponent < ZERO_EXPONENT / 2; };
    Halves product = all<Halves>(std::int16_t{2 * ZERO_EXPONENT});
    for (int i = 0; i < 8; ++i) {
        std::int32_t pair;
        std::memcpy(&pair, a.exponent[i][m], 4);
        const Halves e = (Halves)all<Words>(pair) + load<Halves>(&b.exponent[i][n0]);
        product = product < e ? e : product;
    }
    const Words even = (Words)product << 16 >> 16, odd = (Words)product >> 16;
    Words largest = even < odd ? odd : even;
    const Floats before = load<Floats>(c);
    const Words magnitude = (Words)before & 0x7fffffff;
    Words exponent = (magnitude >> 23) - 127;
    exponent = exponent < -126 ? all<Words>(std::int32_t{-126}) : exponent;
    exponent = magnitude == 0 ? all<Words>(std::int32_t{ZERO_EXPONENT}) : exponent;
    largest = largest < exponent ? exponent : largest;
    // Inside this range no intermediate of the vector form rounds, overflows or underflows: products that float32
    // cannot hold lie below the unit 2^(E - 25) and vanish.
    if (any((largest > 100) | ((largest < -90) & ~zero(largest)))) {
        float row[16];
        for (int k = 0; k < 16; ++k) row[k] = a.value[k][m];
        for (int i = 0; i < n; ++i) c[i] = step(c[i], row, &b.value[0][n0 + i], columns, smallest);
        return;
    }
    largest = largest < -90 ? all<Words>(std::int32_t{-90}) : largest;
    const Floats units = (Floats)((127 - 25 + largest) << 23), inverse = (Floats)((127 + 25 - largest) << 23);
    // |product| < 4 * 2^25 units; 8 of them and c stay below 2^31.
    Words sums[2] = {__builtin_convertvector(before * inverse, Words), Words{}};
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) {
        const Floats product = all<Floats>(a.value[k][m]) * load<Floats>(&b.value[k][n0]);
        sums[k / 8] += __builtin_convertvector(product * inverse, Words);
    }
    Pack<float, half> result[2];
    for (int h = 0; h < 2; ++h) {
        Pack<double, half> sum{};
        for (int part = 0; part < 2; ++part) {
            Pack<std::int32_t, half> halves[2];
            std::memcpy(halves, &sums[part], sizeof halves);
            sum += __builtin_convertvector(halves[h], Pack<double, half>);
        }
        result[h] = truncated<half>(sum);
    }
    store(c, load<Floats>(&result[0]) * units);
}

// Fragments of d and rows of it: lanes 2 i and 2 i + 1 of a group of four hold columns 4 i .. 4 i + 3 of rows g and g + 8
// of each of n tiles, two columns of a row at a time. The same exchange leads back.
template <int n> inline void exchange_rows(Pack<float, 4 * n>& first, Pack<float, 4 * n>& second) {
    using Pairs = Pack<double, 2 * n>;  // copied, not computed with
    using Index = Pack<std::int64_t, 2 * n>;
    static_assert(n == 1 || n == 2 || n == 4);
    const Pairs x = (Pairs)first, y = (Pairs)second;
    Pairs even, odd;
    if constexpr (n == 4) {
        even = CPU_CHOICE(x, y, 0, 8, 2, 10, 4, 12, 6, 14);
        odd = CPU_CHOICE(x, y, 1, 9, 3, 11, 5, 13, 7, 15);
    } else if constexpr (n == 2) {
        even = CPU_CHOICE(x, y, 0, 4, 2, 6);
        odd = CPU_CHOICE(x, y, 1, 5, 3, 7);
    } else {
        even = CPU_CHOICE(x, y, 0, 2);
        odd = CPU_CHOICE(x, y, 1, 3);
    }
    first = (Pack<float, 4 * n>)even;
    second = (Pack<float, 4 * n>)odd;
}

// d += A B of a whole step: of the sides the pairs are there.
template <class T, int lines> inline void prepare(Side<lines>& side) {
#if defined(CPU_FLOAT32_MMA) || defined(CPU_MMA_OTHER_UNIT)
    unpack<T>(side);
#else
    measure<T>(side);
#endif
}
template <class T, int rows, int columns> inline void multiply(float (&d)[rows][columns], Side<rows>& a, Side<columns>& b) {
#ifdef CPU_FLOAT32_MMA
    constexpr int n = Side<columns>::group, together = 4;
    using Floats = Pack<float, n>;
    for (int n0 = 0; n0 < columns; n0 += n)
        for (int m = 0; m < rows; m += together) {
            Floats sum[together];
            each<together>([&](auto r) CPU_INLINE { sum[r] = load<Floats>(&d[m + r][n0]); });
            for (int k = 0; k < 16; ++k) {
                const Floats line = load<Floats>(&b.value[k][n0]);
                each<together>([&](auto r) CPU_INLINE { sum[r] = fused(all<Floats>(a.value[k][m + r]), line, sum[r]); });
            }
            each<together>([&](auto r) CPU_INLINE { store(&d[m + r][n0], sum[r]); });
        }
#elif defined(CPU_MMA_OTHER_UNIT)
    for (int m = 0; m < rows; ++m) {
        float row[16];
        for (int k = 0; k < 16; ++k) row[k] = a.value[k][m];
        for (int n = 0; n < columns; ++n)
            for (int k = 0; k < 16; k += STEP)
                d[m][n] = step(d[m][n], row + k, &b.value[k][n], columns, Operand<T>::smallest_exponent);
    }
#else
    constexpr int together = 4;
    for (int n = 0; n < columns; n += Side<columns>::group)
        for (int m = 0; m < rows; m += together) {
            bool whole[together];
            each<together>([&](auto r) CPU_INLINE { whole[r] = is_whole(d[m + r] + n, a, m + r, b, n); });
            if (whole[0] & whole[1] & whole[2] & whole[3]) {
                whole_steps<together>(d[m] + n, a, m, b, n);
                continue;
            }
            detail<T>(a);
            detail<T>(b);
            for (int r = 0; r < together; ++r) {
                if (whole[r]) whole_steps<1>(d[m + r] + n, a, m + r, b, n);
                else any_step(d[m + r] + n, a, m + r, b, n, Operand<T>::smallest_exponent);
            }
        }
#endif
}

// A's rows from `first` on, of which lane 4 g + t of a warp holds g and g + 8; lane(l) are the four registers of lane l.
template <int lines, class Lane> inline void gather_rows(Side<lines>& to, int first, Lane lane) {
    using Four = Pack<std::uint32_t, 4>;
    for (int g = 0; g < 8; g += 4)
        for (int t = 0; t < 4; ++t) {
            Four words[4];
            for (int l = 0; l < 4; ++l) words[l] = load<Four>(lane(4 * (g + l) + t));
            transpose(words);
            for (int r = 0; r < 4; ++r) store(&to.pairs[t + 4 * (r >> 1)][first + g + 8 * (r & 1)], words[r]);
        }
}

// Between 16 rows of d and the fragments of a warp's lanes: lane(l) are the 4 NT registers of lane l. Inside a row columns are
// in an order of their own: [half of a tile][tile][4].
template <bool back, int NT, class Lane> inline void exchange(float (*d)[8 * NT], Lane lane) {
    constexpr int together = NT % 4 == 0 ? 4 : NT % 2 == 0 ? 2 : 1;
    using Tiles = Pack<float, 4 * together>;
    for (int l = 0; l < 32; l += 2) {
        float *even = lane(l), *odd = lane(l + 1);
        const int g = l / 4, half = l % 4 / 2;
        for (int j = 0; j < NT; j += together) {
            float* row = d[g] + half * 4 * NT + 4 * j;
            float* below = row + 8 * 8 * NT;
            Tiles first = load<Tiles>(back ? row : even + 4 * j), second = load<Tiles>(back ? below : odd + 4 * j);
            exchange_rows<together>(first, second);
            store(back ? even + 4 * j : row, first);
            store(back ? odd + 4 * j : below, second);
        }
    }
}

// The warp-wide operation behind mma_step: gathers the fragments of 32 lanes, computes, scatters the result.
template <class T, int MT, int NT> void mma_warp(void* const* deposits) {
    constexpr int rows = 16 * MT, columns = 8 * NT;
    using Four = Pack<std::uint32_t, 4>;
    const auto tile = [&](int lane) -> const Fragments<T, MT, NT>& {
        return *static_cast<const Fragments<T, MT, NT>*>(deposits[lane]);
    };
    Side<rows> a;
    Side<columns> b;
    alignas(64) float d[rows][columns];
    for (int i = 0; i < MT; ++i) {
        gather_rows(a, 16 * i, [&](int lane) { return tile(lane).a[i]; });
        exchange<false, NT>(d + 16 * i, [&](int lane) { return tile(lane).d[i][0]; });
    }
    for (int g = 0; g < 8; g += 4)
        for (int t = 0; t < 4; ++t) {
            const int lane = 4 * g + t;
            for (int j = 0; j + 2 <= NT; j += 2) {
                Four words[4];
                for (int l = 0; l < 4; ++l) words[l] = load<Four>(tile(lane + 4 * l).b[j]);
                transpose(words);
                for (int r = 0; r < 4; ++r) store(&b.pairs[t + 4 * (r & 1)][g * NT + 4 * (j + r / 2)], words[r]);
            }
            if (NT % 2 != 0)
                for (int l = 0; l < 4; ++l)
                    for (int r = 0; r < 2; ++r) b.pairs[t + 4 * r][g * NT + 4 * (NT - 1) + l] = tile(lane + 4 * l).b[NT - 1][r];
        }
    prepare<T>(a);
    prepare<T>(b);
    multiply<T>(d, a, b);
    for (int i = 0; i < MT; ++i) exchange<true, NT>(d + 16 * i, [&](int lane) { return tile(lane).d[i][0]; });
}

}  // namespace cpu
