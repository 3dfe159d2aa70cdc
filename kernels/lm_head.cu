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
// One block cannot read a vocabulary as fast as the GPU could. Few tokens of many are chosen by a tournament: many blocks
// leave the first token of every group; the first k tokens lie in the k groups whose first ones come first, so that one
// block goes on with parts of these, and parts of parts, until a part is a token. The order is total, so that groups
// and parts change nothing.
#include "math.cuh"
#include "warp.cuh"

constexpr int THREADS = 512;      // the most in a block
constexpr int CANDIDATES = 1024;  // the most that a block chooses from, a thread each
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
template <int MOST = THREADS, class V, class Combine> __device__ inline V over_block(V value, Combine combine) {
    __shared__ V each[MOST], few[WARP];
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
    // Those from `id` on, a multiple of 4; past the end the last one again, which comes after itself in the order.
    __device__ void four(float (&to)[4], int id) const {
        if (V % 4 == 0) {
            reinterpret_cast<float4&>(to) = *reinterpret_cast<const float4*>(z + id);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) to[i] = z[min(id + i, V - 1)];
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

// A row's tokens in tiles of WARP groups of `size`, a power of 2 of 4 or more. A lane's group is every WARP-th run of
// four of its tile: neighbours read next to each other, and any of a group's tokens tells where the others are.
struct Group {
    int first, size;

    __device__ static Group of(int id, int size) {
        return {(id & -(WARP * size)) + (id & (4 * WARP - 4)), size};
    }
    __device__ int id(int i) const { return first + i / 4 * (4 * WARP) + i % 4; }
    __device__ int index(int id) const { return (id - first) / (4 * WARP) * 4 + id % 4; }
};

// The first rank of a group's tokens from the one of this index on, `count` of them, a power of 2; 0 where there is none.
__device__ inline std::uint64_t first_of(const Row& row, const Group& group, int index, int count) {
    constexpr int AHEAD = 4;  // runs of four that are read before the first is used
    std::uint64_t best = 0;
#pragma unroll 1
    for (int i = index; i < index + count % 4; ++i)
        if (group.id(i) < row.V) best = Max()(best, rank_of(row.z[group.id(i)], group.id(i)));
    for (int begin = index; begin < index + count / 4 * 4; begin += 4 * AHEAD) {
        alignas(16) float read[AHEAD][4];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int id = group.id(begin + 4 * i);
            if (4 * i < count && id < row.V) row.four(read[i], id);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int id = group.id(begin + 4 * i);
            if (4 * i >= count || id >= row.V) continue;
#pragma unroll
            for (int j = 0; j < 4; ++j) best = Max()(best, rank_of(read[i][j], id + j));
        }
    }
    return best;
}

// How many threads of the block say so.
__device__ inline int count_of(bool mine) {
#ifdef __CUDACC__
    return __syncthreads_count(mine);
#else
    return blockDim.x == WARP ? __popc(vote(mine)) : over_block<CANDIDATES>(mine ? 1 : 0, Sum());
#endif
}

// How many threads before this one say so.
__device__ inline int count_before(bool mine) {
    __shared__ int counts[CANDIDATES / WARP];
    const std::uint32_t warp = vote(mine);
    counts[threadIdx.x / WARP] = __popc(warp);
    __syncthreads();
    int before = __popc(warp & ((1u << threadIdx.x % WARP) - 1));
    for (int i = 0; i < static_cast<int>(threadIdx.x) / WARP; ++i) before += counts[i];
    return before;
}

// Of the block's ranks, one a thread, the first k are those from this number on; where there are fewer, all but 0. As
// many or more are known to be those from `low` on, and none is past `top`.
__device__ inline std::uint64_t edge_of(std::uint64_t mine, int k, std::uint64_t low, std::uint64_t top) {
    if (low != 0 && count_of(mine >= low) == k) return low;
    const std::uint32_t own = static_cast<std::uint32_t>(mine >> 32), most = static_cast<std::uint32_t>(top >> 32);
    std::uint32_t key = static_cast<std::uint32_t>(low >> 32);
    const int length = 32 - __clz(static_cast<int>(most - key));
#pragma unroll 1
    for (int bit = length - 1; bit >= 0; --bit) {
        const std::uint32_t step = 1u << bit;
        if (step > most - key) continue;  // also past the largest number
        const int count = count_of(own >= key + step);
        if (count >= k) key += step;
        if (count == k) return static_cast<std::uint64_t>(key) << 32;
    }
    std::uint64_t edge = static_cast<std::uint64_t>(key) << 32;
#pragma unroll 1
    for (std::uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {  // of tokens with equal logits
        const int count = count_of(mine >= (edge | bit));
        if (count >= k) edge |= bit;
        if (count == k) break;
    }
    return Max()(edge, std::uint64_t{1});
}

// This thread's one of `count`, the first tokens of groups or, where there are none, the row's tokens.
__device__ inline std::uint64_t candidate(const Row& row, const std::uint64_t* firsts, int count) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= count) return 0;
    return firsts != nullptr ? firsts[static_cast<long long>(blockIdx.x) * count + thread] : rank_of(row.z[thread], thread);
}

// ---------------------------------------------------------------------------------------------- entry points

// Block (row, tile): the first token of each of the tile's groups; y, where there is one, becomes -Inf there. Each of a
// block's warps, a power of 2 of them, has the same part of all groups.
extern "C" __global__ void __launch_bounds__(THREADS)
    lm_head_groups(std::uint64_t* firsts, float* y, const float* z, int V, int size) {
    __shared__ std::uint64_t each[THREADS];
    const Row row = row_of(z, V);
    const int lane = threadIdx.x % WARP, part = size / (static_cast<int>(blockDim.x) / WARP);
    const int begin = static_cast<int>(blockIdx.y) * WARP * size, end = min(begin + WARP * size, V);
    each[threadIdx.x] = first_of(row, {begin + 4 * lane, size}, static_cast<int>(threadIdx.x) / WARP * part, part);
    __syncthreads();
    if (y != nullptr) {
        float* to = y + static_cast<long long>(blockIdx.x) * V;
        const int thread = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
        if (V % 4 == 0)
            for (int id = begin + 4 * thread; id < end; id += 4 * step)
                *reinterpret_cast<float4*>(to + id) = {-INFINITE, -INFINITE, -INFINITE, -INFINITE};
        else
            for (int id = begin + thread; id < end; id += step) to[id] = -INFINITE;
    }
    if (threadIdx.x >= WARP) return;
    std::uint64_t best = each[lane];
    for (int i = lane + WARP; i < static_cast<int>(blockDim.x); i += WARP) best = Max()(best, each[i]);
    firsts[(static_cast<long long>(blockIdx.x) * gridDim.y + blockIdx.y) * WARP + lane] = best;
}

// Block row: its first k tokens are written to y, which is -Inf. Where groups are tokens (`size` 1, no `firsts`) y may
// hold anything, and all of it is written. Threads: a power of 2, `count` or more and, where groups are larger, 2 k.
extern "C" __global__ void __launch_bounds__(CANDIDATES)
    lm_head_first(float* y, long long* last, const float* z, const std::uint64_t* firsts, int V, int size, int count, int k) {
    __shared__ std::uint64_t chosen[CANDIDATES];
    const Row row = row_of(z, V);
    float* to = y + static_cast<long long>(blockIdx.x) * V;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    std::uint64_t mine = candidate(row, firsts, count);
    const std::uint64_t top = over_block<CANDIDATES>(mine, Max());
    if (top == NAN_RANK) {
        refuse(to, last, row);
        return;
    }
    std::uint64_t edge = edge_of(mine, k, 0, top);
    int room = 1;  // for k
    while (room < k) room *= 2;
    for (int have = size; have > 1;) {
        const int place = count_before(mine >= edge), parts = min(have, threads / room), part = have / parts;
        chosen[thread] = 0;
        __syncthreads();
        if (mine >= edge) chosen[place] = mine;
        __syncthreads();
        const std::uint64_t whole = thread / parts < k ? chosen[thread / parts] : 0;
        mine = 0;
        if (whole != 0) {
            const Group group = Group::of(id_of(whole), size);
            mine = first_of(row, group, (group.index(id_of(whole)) & -have) + (thread & (parts - 1)) * part, part);
        }
        have = part;
        edge = edge_of(mine, k, edge, top);
    }
    if (mine >= edge) to[id_of(mine)] = z[static_cast<long long>(blockIdx.x) * V + id_of(mine)];
    else if (size == 1 && thread < V) to[thread] = -INFINITE;
    const std::uint64_t end = ~over_block<CANDIDATES>(mine >= edge ? ~mine : 0, Max());
    if (threadIdx.x == 0) last[blockIdx.x] = id_of(end);
}

// Block row: its first token.
extern "C" __global__ void __launch_bounds__(CANDIDATES)
    lm_head_greedy(long long* ids, const float* z, const std::uint64_t* firsts, int V, int count) {
    const std::uint64_t best = over_block<CANDIDATES>(candidate(row_of(z, V), firsts, count), Max());
    if (threadIdx.x == 0) ids[blockIdx.x] = best == NAN_RANK ? -1 : id_of(best);
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
