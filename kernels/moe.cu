// Mixture of experts as gpt-oss has it, but for its products (gemm.cu) and its activation (ffn.cu): which experts a
// token goes to, their tokens side by side, and the weighted sum of what they return.
//
//   logits   (T, E) float32                 x w^T + bias, from the "dense" kernels of gemm.cu; E up to 256
//   ids      (T, k) int32                   the k largest logits, largest first; of equals the lowest id; k up to 8
//   weights  (T, k) float32                 softmax over these k alone, taken after the choice
//   offsets  (E + 1), entries (T k) int32   expert e has the entries[offsets[e] .. offsets[e + 1]), in ascending order
//   down     (T, k, H) float32              what the chosen experts return; entry t k + s is token t's slot s
//   y        (T, H) bfloat16 or half        y_t = sum over s of weights_ts down_ts, H a multiple of 4
//
// NaN is larger than every number, so that a NaN logit is chosen and makes all weights of its token NaN: it shows.
// A token with a +Inf logit has NaN weights (Inf - Inf); -Inf has weight 0 where a larger logit is chosen.
//
// Order of sums: the softmax's denominator and y's slots in ascending order, from 0, y rounded to its type once.
// Everything about a token depends on that token alone, and offsets and entries on nothing but ids.
#include "convert.cuh"
#include "math.cuh"
#include "stream.cuh"
#include "warp.cuh"

// ---------------------------------------------------------------------------------------------- choice of experts

constexpr int ROUTE_WARPS = 4, MAX_EXPERTS = 256, PER_LANE = MAX_EXPERTS / WARP;

// Larger for a larger logit, then for a lower id; never 0. The upper half is the logit as an ordered integer; a sum that
// starts from 0 is never -0.
__device__ inline std::uint64_t rank(float logit, int id) {
    const std::uint32_t bits = __float_as_uint(logit);
    std::uint32_t order = bits >> 31 ? ~bits : bits | 0x80000000u;
    if (logit != logit) order = 0xffffffffu;
    return static_cast<std::uint64_t>(order) << 32 | (0xffffffffu - static_cast<std::uint32_t>(id));
}
__device__ inline float logit_of(std::uint64_t rank) {
    const std::uint32_t order = static_cast<std::uint32_t>(rank >> 32);
    return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}
__device__ inline int id_of(std::uint64_t rank) { return static_cast<int>(0xffffffffu - static_cast<std::uint32_t>(rank)); }

// A warp a token. Lane l holds the ranks of experts l, l + 32, ..; slot s of the result ends up in lane s.
extern "C" __global__ void __launch_bounds__(ROUTE_WARPS * WARP)
    moe_route(int* ids, float* weights, const float* logits, int T, int E, int k) {
    const int lane = threadIdx.x % WARP;
    const long long token = static_cast<long long>(blockIdx.x) * ROUTE_WARPS + threadIdx.x / WARP;
    if (token >= T) return;  // the whole warp; there is no barrier
    std::uint64_t ranks[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int e = i * WARP + lane;
        ranks[i] = e < E ? rank(logits[token * E + e], e) : 0;
    }
    std::uint64_t mine = 0;
    for (int slot = 0; slot < k; ++slot) {  // the largest that is left
        std::uint64_t best = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) best = Max()(best, ranks[i]);
        best = warp_reduce(best, Max());
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
            if (ranks[i] == best) ranks[i] = 0;  // ranks differ: this is the chosen expert and no other
        if (slot == lane) mine = best;
    }
    // The lanes of no slot have NaN, which goes nowhere.
    const float logit = logit_of(mine), largest = shuffle(logit, 0), exponential = exp32(__fsub_rn(logit, largest));
    float total = 0;
    for (int slot = 0; slot < k; ++slot) total = __fadd_rn(total, shuffle(exponential, slot));
    if (lane < k) {
        ids[token * k + lane] = id_of(mine);
        weights[token * k + lane] = __fdiv_rn(exponential, total);
    }
}

// ---------------------------------------------------------------------------------------------- entries by expert

constexpr int GROUP_THREADS = 256;

// A block an expert: it counts the entries of smaller experts and compacts its own. A warp has a run of consecutive
// entries, 32 at a time and a lane each, so the order is ascending.
extern "C" __global__ void __launch_bounds__(GROUP_THREADS)
    moe_group(int* offsets, int* entries, const int* ids, int count) {
    constexpr int WARPS = GROUP_THREADS / WARP, READ = 4;
    __shared__ int scratch[WARPS];
    const int expert = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int run = (count + GROUP_THREADS - 1) / GROUP_THREADS * WARP;
    const int first = min(warp * run, count), end = min(first + run, count);
    const auto id_at = [&](int entry) { return entry < end ? ids[entry] : 0x7fffffff; };
    int smaller = 0, own = 0;
    for (int begin = first; begin < end; begin += READ * WARP) {
        int some[READ];
#pragma unroll
        for (int i = 0; i < READ; ++i) some[i] = id_at(begin + i * WARP + lane);
#pragma unroll
        for (int i = 0; i < READ; ++i) {
            smaller += some[i] < expert;
            own += some[i] == expert;
        }
    }
    const int offset = block_reduce<GROUP_THREADS>(smaller, Sum(), scratch);
    own = warp_reduce(own, Sum());
    __syncthreads();  // scratch has been read
    if (lane == 0) scratch[warp] = own;
    __syncthreads();
    int at = offset;
    for (int w = 0; w < warp; ++w) at += scratch[w];
    if (own > 0)
        for (int begin = first; begin < end; begin += WARP) {
            const std::uint32_t mine = vote(id_at(begin + lane) == expert);
            if (mine >> lane & 1) entries[at + __popc(mine & ((1u << lane) - 1))] = begin + lane;
            at += __popc(mine);
        }
    if (threadIdx.x == 0) offsets[expert] = offset;
    if (threadIdx.x == 0 && expert + 1 == static_cast<int>(gridDim.x)) offsets[expert + 1] = count;
}

// ---------------------------------------------------------------------------------------------- weighted sum

constexpr int COMBINE_THREADS = 256, COMBINE_WIDTH = 4;  // consecutive features of a thread

// A token a row of blocks.
template <class T>
__device__ inline void combine(T* y, const float* down, const float* weights, int k, int H) {
    const long long token = blockIdx.x;
    const int feature = (blockIdx.y * COMBINE_THREADS + threadIdx.x) * COMBINE_WIDTH;
    if (feature >= H) return;
    float total[COMBINE_WIDTH] = {};
#pragma unroll 4
    for (int slot = 0; slot < k; ++slot) {
        const long long entry = token * k + slot;
        const float weight = weights[entry];
        const float4 four = read_once(reinterpret_cast<const float4*>(down + entry * H + feature));
        const float terms[COMBINE_WIDTH] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < COMBINE_WIDTH; ++i) total[i] = __fadd_rn(total[i], __fmul_rn(weight, terms[i]));
    }
    *reinterpret_cast<uint2*>(y + token * H + feature) = make_uint2(pack<T>(total[0], total[1]), pack<T>(total[2], total[3]));
}

extern "C" __global__ void __launch_bounds__(COMBINE_THREADS)
    moe_combine_bf16(__nv_bfloat16* y, const float* down, const float* weights, int k, int H) {
    combine(y, down, weights, k, H);
}
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS)
    moe_combine_fp16(__half* y, const float* down, const float* weights, int k, int H) {
    combine(y, down, weights, k, H);
}
