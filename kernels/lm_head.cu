// What an LM head does with its logits: temperature, top-k, top-p, greedy choice, probabilities, a sample.
// The logits themselves, x W^T, are a GEMM (gemm.cu).
//
//   z, y, p   (M, V) float32     ids, last  (M) int64     uniforms  (M) float32
//   a block a row, of 32 or more threads, a multiple of 32; a row of blocks for each row where it is said
//
// Order of tokens: the larger logit first (-0 = +0), at equal logits the lower id. A filter keeps the first so many
// tokens of that order; `last` is the last one kept; all others become -Inf.
//
// No result depends on an order of sums: a maximum has none, and masses of tokens are integers,
//   mass = floor(exp32(z - max z) 2^40),
// so that any schedule has the same bits. 2^22 tokens have a total below 2^63. A row without a softmax (its maximum is
// NaN or infinite) has no mass: filters and probabilities give NaN throughout, a sample is -1. Where only the order
// counts (top-k, greedy) Inf is a number like others, and NaN alone gives NaN throughout and -1.
//
// One block cannot read a vocabulary as fast as the GPU could, so that a few tokens are chosen by many: each keeps the
// first of its slice, and another launch the first of those, until one block has them. The order is total, so that the
// slices change nothing.
#include "math.cuh"
#include "warp.cuh"

constexpr int THREADS = 512;  // the most in a block
constexpr int SLICE = 2048;   // the most tokens that a block sorts, and of which one keeps some
constexpr float INFINITE = __builtin_huge_valf(), NONE = __builtin_nanf("");

using Mass = std::uint64_t;

// Orders like the float it is made of; -0 and +0 are one key. Never 2^32 - 1.
__device__ inline std::uint32_t key_of(float z) {
    const std::uint32_t bits = __float_as_uint(__fadd_rn(z, 0.0f));
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
// A token's place in the order: the larger the earlier. Of NaN it is past all others; 0 is no token's.
constexpr std::uint64_t NAN_RANK = ~0ull;
__device__ inline std::uint64_t rank_of(float z, int id) {
    const std::uint64_t key = key_of(z);
    return z != z ? NAN_RANK : key << 32 | ~static_cast<std::uint32_t>(id);
}
__device__ inline int id_of(std::uint64_t rank) { return static_cast<int>(~static_cast<std::uint32_t>(rank)); }
__device__ inline float logit_of(std::uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

struct Softmax {
    float largest;

    __device__ float exponential(float z) const { return exp32(__fsub_rn(z, largest)); }
    __device__ Mass operator()(float z) const { return static_cast<Mass>(__fmul_rn(exponential(z), 0x1p40f)); }
    __device__ bool exists() const { return largest > -INFINITE && largest < INFINITE; }
    __device__ bool ordered() const { return largest == largest; }  // the row holds no NaN
};

struct Count {
    __device__ Mass operator()(float) const { return 1; }
};

// total * fraction / 2^32 for total < 2^63 and fraction <= 2^32, rounded down or up.
__device__ inline Mass share(Mass total, Mass fraction, bool up) {
    return (total >> 32) * fraction + (((total & 0xffffffffu) * fraction + (up ? 0xffffffffu : 0)) >> 32);
}

// Over all threads of the block; every thread gets the result. For operations that have no order.
template <class V, class Combine> __device__ inline V over_block(V value, Combine combine) {
    __shared__ V each[THREADS], few[WARP];
    each[threadIdx.x] = value;
    __syncthreads();
    if (threadIdx.x < WARP) {
        V mine = each[threadIdx.x];
        for (int i = threadIdx.x + WARP; i < static_cast<int>(blockDim.x); i += WARP) mine = combine(mine, each[i]);
        few[threadIdx.x] = mine;
    }
    __syncthreads();
    V all = few[0];
    for (int i = 1; i < WARP; ++i) all = combine(all, few[i]);
    return all;
}

struct Row {
    const float* z;
    int V;

    // A few at a time, all read before the first is used.
    template <class Use> __device__ void each(Use use) const {
        constexpr int AHEAD = 8;
        const int step = static_cast<int>(blockDim.x);
        for (int begin = threadIdx.x; begin < V; begin += AHEAD * step) {
            float read[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) read[i] = begin + i * step < V ? z[begin + i * step] : 0.0f;
#pragma unroll
            for (int i = 0; i < AHEAD; ++i)
                if (begin + i * step < V) use(read[i], begin + i * step);
        }
    }
    // This thread's part when the ids are cut into as many runs as there are threads, in ascending order.
    __device__ int run() const { return (V + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x); }
    __device__ int first() const { return min(V, static_cast<int>(threadIdx.x) * run()); }
    __device__ int end() const { return min(V, first() + run()); }
};

__device__ inline Row row_of(const float* z, int V) { return {z + static_cast<long long>(blockIdx.x) * V, V}; }

__device__ inline Softmax softmax_of(const Row& row) {
    float largest = -INFINITE;
    row.each([&](float z, int) { largest = Max()(largest, z); });
    return {over_block(largest, Max())};
}

template <class Weight> __device__ inline Mass total_of(const Row& row, Weight weight, std::uint32_t above = 0) {
    Mass mine = 0;
    row.each([&](float z, int) { mine += above == 0 || key_of(z) > above ? weight(z) : 0; });
    return over_block(mine, Sum());
}

// ---------------------------------------------------------------------------------------------- filters

struct Quarters {
    Mass of[3];
};
struct AddQuarters {
    __device__ Quarters operator()(const Quarters& a, const Quarters& b) const {
        return {{a.of[0] + b.of[0], a.of[1] + b.of[1], a.of[2] + b.of[2]}};
    }
};

// The largest key from which on upwards the tokens weigh `target` (>= 1) or more: two bits of it at a time.
template <class Weight> __device__ inline std::uint32_t threshold(const Row& row, Mass target, Weight weight) {
    std::uint32_t found = 0;
    for (int shift = 30; shift >= 0; shift -= 2) {
        const std::uint32_t from[3] = {found | 1u << shift, found | 2u << shift, found | 3u << shift};
        Quarters mine = {};
        row.each([&](float z, int) {
            const std::uint32_t key = key_of(z);
            if (key < from[0]) return;
            const Mass own = weight(z);
            mine.of[0] += own;
            mine.of[1] += key >= from[1] ? own : 0;
            mine.of[2] += key >= from[2] ? own : 0;
        });
        const Quarters all = over_block(mine, AddQuarters());
        for (int quarter = 0; quarter < 3; ++quarter)  // weights fall from one to the next
            if (all.of[quarter] >= target) found = from[quarter];
    }
    return found;
}

// Keeps the shortest beginning of the order that weighs `target` or more: all tokens past the threshold's key and, of
// those at it, the lowest ids. The row's last token kept goes to `last`.
template <class Weight>
__device__ inline void keep(float* y, long long* last, const Row& row, Mass target, Weight weight) {
    __shared__ int ties[THREADS], cut;
    const std::uint32_t key = threshold(row, target, weight);
    const Mass own = weight(logit_of(key)), missing = target - total_of(row, weight, key);
    const int needed = static_cast<int>((missing + own - 1) / own);

    int mine = 0, before = 0;
    for (int id = row.first(); id < row.end(); ++id) mine += key_of(row.z[id]) == key;
    ties[threadIdx.x] = mine;
    __syncthreads();
    for (int i = 0; i < static_cast<int>(threadIdx.x); ++i) before += ties[i];
    if (before < needed && needed <= before + mine) {
        int id = row.first() - 1;
        while (before < needed) before += key_of(row.z[++id]) == key;
        cut = id;
        last[blockIdx.x] = id;
    }
    __syncthreads();
    row.each([&](float z, int id) {
        const bool kept = key_of(z) > key || (key_of(z) == key && id <= cut);
        y[id] = kept ? z : -INFINITE;
    });
}

__device__ inline void refuse(float* y, long long* last, const Row& row) {
    row.each([&](float, int id) { y[id] = NONE; });
    if (threadIdx.x == 0) last[blockIdx.x] = -1;
}

// ---------------------------------------------------------------------------------------------- few tokens of many

// What a row's blocks choose from: its tokens, or `from`, what an earlier launch has left of them, n of either.
struct Choice {
    const float* z;
    const std::uint64_t* from;
    int n;

    __device__ std::uint64_t operator[](int i) const {
        if (i >= n) return 0;
        const long long at = static_cast<long long>(blockIdx.x) * n + i;
        return from != nullptr ? from[at] : rank_of(z[at], i);
    }
};

// Ranks, a power of 2 of them, into falling order (Batcher's bitonic sort): no step's pairs have an element in common.
__device__ inline void sort(std::uint64_t* ranks, int count) {
    for (int size = 2; size <= count; size *= 2)
        for (int distance = size / 2; distance > 0; distance /= 2) {
            __syncthreads();
#pragma unroll 4
            for (int pair = threadIdx.x; pair < count / 2; pair += static_cast<int>(blockDim.x)) {
                const int low = 2 * pair - (pair & (distance - 1)), high = low + distance;
                const std::uint64_t first = ranks[low], second = ranks[high];
                if ((first < second) == ((low & size) == 0)) {
                    ranks[low] = second;
                    ranks[high] = first;
                }
            }
        }
    __syncthreads();
}

// ---------------------------------------------------------------------------------------------- entry points

// Block (row, slice): the first k <= each of a slice of `each` of its choice, a power of 2; of fewer all, and then 0.
extern "C" __global__ void __launch_bounds__(THREADS)
    lm_head_first(std::uint64_t* first, const float* z, const std::uint64_t* from, int n, int each, int k) {
    __shared__ std::uint64_t ranks[SLICE];
    const Choice choice{z, from, n};
#pragma unroll 8
    for (int i = threadIdx.x; i < each; i += static_cast<int>(blockDim.x))
        ranks[i] = choice[static_cast<int>(blockIdx.y) * each + i];
    sort(ranks, each);
    std::uint64_t* to = first + (static_cast<long long>(blockIdx.x) * gridDim.y + blockIdx.y) * k;
    for (int i = threadIdx.x; i < k; i += static_cast<int>(blockDim.x)) to[i] = ranks[i];
}

// Block (row, slice): of the row's first k tokens, sorted, all that its slice of z holds stay.
extern "C" __global__ void __launch_bounds__(THREADS)
    lm_head_keep(float* y, long long* last, const float* z, const std::uint64_t* first, int V, int k) {
    const std::uint64_t* mine = first + static_cast<long long>(blockIdx.x) * k;
    const std::uint64_t edge = mine[k - 1];
    const bool ordered = mine[0] != NAN_RANK;
    const long long row = static_cast<long long>(blockIdx.x) * V;
    const int begin = static_cast<int>(blockIdx.y) * SLICE, step = static_cast<int>(blockDim.x);
#pragma unroll 2
    for (int id = begin + static_cast<int>(threadIdx.x); id < min(begin + SLICE, V); id += step) {
        const float logit = z[row + id];
        y[row + id] = !ordered ? NONE : rank_of(logit, id) >= edge ? logit : -INFINITE;
    }
    if (blockIdx.y == 0 && threadIdx.x == 0) last[blockIdx.x] = ordered ? id_of(edge) : -1;
}

// Block (row, slice): the first token of `each` of its choice, as a rank to `first` or, where that is null, as an id.
extern "C" __global__ void __launch_bounds__(THREADS)
    lm_head_greedy(std::uint64_t* first, long long* ids, const float* z, const std::uint64_t* from, int n, int each) {
    const Choice choice{z, from, n};
    const int begin = static_cast<int>(blockIdx.y) * each, step = static_cast<int>(blockDim.x);
    std::uint64_t best = 0;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < each; i += step) best = Max()(best, choice[begin + i]);
    best = over_block(best, Max());
    if (threadIdx.x == 0) {
        if (first != nullptr) first[static_cast<long long>(blockIdx.x) * gridDim.y + blockIdx.y] = best;
        else ids[blockIdx.x] = best == NAN_RANK ? -1 : id_of(best);
    }
}

// Flat: y = z / temperature.
extern "C" __global__ void __launch_bounds__(256)
    lm_head_temperature(float* y, const float* z, float temperature, long long count) {
    const long long first = 4 * (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x);
    if (first + 4 <= count) {
        const float4 four = *reinterpret_cast<const float4*>(z + first);
        *reinterpret_cast<float4*>(y + first) = {__fdiv_rn(four.x, temperature), __fdiv_rn(four.y, temperature),
                                                 __fdiv_rn(four.z, temperature), __fdiv_rn(four.w, temperature)};
    } else {
        for (long long i = first; i < count; ++i) y[i] = __fdiv_rn(z[i], temperature);
    }
}

// 1 <= k <= V tokens stay; where they are not few.
extern "C" __global__ void __launch_bounds__(THREADS)
    lm_head_topk(float* y, long long* last, const float* z, int V, int k) {
    const Row row = row_of(z, V);
    float* to = y + static_cast<long long>(blockIdx.x) * V;
    if (!softmax_of(row).ordered()) refuse(to, last, row);
    else keep(to, last, row, k, Count());
}

// The fewest tokens stay whose mass is p / 2^32 of the row's or more; 1 <= p < 2^32.
extern "C" __global__ void __launch_bounds__(THREADS)
    lm_head_topp(float* y, long long* last, const float* z, int V, long long p) {
    const Row row = row_of(z, V);
    float* to = y + static_cast<long long>(blockIdx.x) * V;
    const Softmax softmax = softmax_of(row);
    if (!softmax.exists()) refuse(to, last, row);
    else keep(to, last, row, share(total_of(row, softmax), p, true), softmax);
}

// Softmax; the denominator is the row's whole mass, so its terms are cut off at 2^-40 of the largest.
extern "C" __global__ void __launch_bounds__(THREADS)
    lm_head_probabilities(float* p, const float* z, int V) {
    const Row row = row_of(z, V);
    float* to = p + static_cast<long long>(blockIdx.x) * V;
    const Softmax softmax = softmax_of(row);
    const float total = softmax.exists() ? __fmul_rn(static_cast<float>(total_of(row, softmax)), 0x1p-40f) : NONE;
    row.each([&](float z, int id) { to[id] = __fdiv_rn(softmax.exponential(z), total); });
}

// The first id, in ascending order, up to and with which the tokens weigh more than the uniform's share of the row.
extern "C" __global__ void __launch_bounds__(THREADS)
    lm_head_sample(long long* ids, const float* z, const float* uniforms, int V) {
    __shared__ Mass masses[THREADS];
    const Row row = row_of(z, V);
    const Softmax softmax = softmax_of(row);
    const float uniform = uniforms[blockIdx.x];
    if (!softmax.exists() || !(uniform >= 0.0f && uniform < 1.0f)) {
        if (threadIdx.x == 0) ids[blockIdx.x] = -1;
        return;
    }
    Mass mine = 0, before = 0, total = 0;
    for (int id = row.first(); id < row.end(); ++id) mine += softmax(row.z[id]);
    masses[threadIdx.x] = mine;
    __syncthreads();
    for (int i = 0; i < static_cast<int>(blockDim.x); ++i) {
        if (i == static_cast<int>(threadIdx.x)) before = total;
        total += masses[i];
    }
    const Mass target = share(total, static_cast<Mass>(__fmul_rn(uniform, 0x1p32f)), false);
    if (before <= target && target < before + mine) {
        int id = row.first() - 1;
        while (before <= target) before += softmax(row.z[++id]);
        ids[blockIdx.x] = id;
    }
}
