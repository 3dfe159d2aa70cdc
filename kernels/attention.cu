// Attention over a KV cache: y = softmax(scale q K^T) V for queries of T positions, prefill and decode by one kernel.
//
//   q       B T tokens of H rows of D bfloat16 or half, H = G Hkv; a token begins `q_stride` elements after the last
//   k, v    cache of Hkv heads, see kv_cache.cuh: the type of q, or MXFP4 (decoded values rounded once to that type)
//   lengths (B) int32: keys of a sequence that count; its T queries stand at the positions lengths[b] - T ..
//   sinks   (H) float32 or null: one more logit of each head, without a value
//   y       (B, T, H, D), contiguous
//   D a multiple of 16, at most 128; the caller has checked lengths, pages and sizes
//
// A query at position i sees the keys below its sequence's length; with `causal` those up to i only; with `window` > 0
// those after i - window only. A query that sees no key and has no sink gives zeros.
//
// Order of sums, the same for every batch, tile, page size, prefill or decode: keys in chunks of 64 at absolute
// positions, in ascending order. Within a chunk, for one row of queries:
//   s    = (q . k) * scale; the product over D is one unbroken chain of tensor core steps from zero
//   m_c  = the largest visible s
//   p    = exp32(s - m_c), rounded to the type of q; 0 for what is not visible
//   l_c  = sum of the rounded p in float32: keys 16 w + 8 j + 2 t + i, over i, then j, then the butterfly over t = 0..3
//          with distances 2 and 1, then w ascending
//   O_c  = p V, a chain of four tensor core steps from zero
// Chunks join the state (m, l, O), from (-inf, 0, 0) or with a sink (sink, 1, 0):
//   m' = max(m, m_c), l = l exp32(m - m') + l_c exp32(m_c - m'), O likewise, each product and sum rounded
// A chunk of which the row sees nothing leaves the row's state as it is. y = O / l, rounded to float32 and to its type.
//
// A block of four warps owns 16 rows (row t G + g: position t, query head g of the group) of one KV head. All rows
// share the chunk in shared memory; of the scores a warp owns 16 keys, of the output every fourth group of 8 columns.
#include "kv_cache.cuh"
#include "math.cuh"
#include "mma.cuh"
#include "warp.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS, ROWS = 16, CHUNK = 64;
constexpr int PITCH = 128 / 2 + 4, P_PITCH = CHUNK / 2 + 4;  // in 4-byte words; fragment loads hit 32 banks
constexpr int COLUMNS = 128 / 8 / WARPS;                     // groups of 8 columns a warp owns

struct Problem {
    const int* lengths;
    const float* sinks;
    int T, H, D, q_stride;
    float scale;
    int causal, window;
};

// The exponent bits of the 16-bit types: all set in NaN and Inf.
template <class T> struct Exponent;
template <> struct Exponent<__nv_bfloat16> { static constexpr std::uint32_t bits = 0x7f80u; };
template <> struct Exponent<__half> { static constexpr std::uint32_t bits = 0x7c00u; };
template <class T> __device__ inline bool special(std::uint32_t value) {
    return (value & Exponent<T>::bits) == Exponent<T>::bits;
}

// What exponentials are taken relative to: -inf, where nothing was larger, would make NaN of -inf - -inf.
__device__ inline float base(float m) { return m == -__uint_as_float(0x7f800000u) ? 0.0f : m; }

// `sum` and the special values of one column that a row sees, each times its weight, in ascending order of keys.
// Not inlined: it is rare, and there are many columns.
#ifdef __CUDACC__
#define OUT_OF_LINE __noinline__
#else
#define OUT_OF_LINE __attribute__((noinline))
#endif
template <class T>
__device__ OUT_OF_LINE float add_specials(float sum, const std::uint32_t (*values)[PITCH], const std::uint32_t* weights,
                                           int column, int low, int high) {
    for (int n = max(low, 0); n < min(high, CHUNK); ++n) {
        if (!special<T>(reinterpret_cast<const std::uint16_t*>(values[n])[column])) continue;
        const float p = widen(reinterpret_cast<const T*>(weights)[n]);
        sum = __fadd_rn(sum, __fmul_rn(p, widen(reinterpret_cast<const T*>(values[n])[column])));
    }
    return sum;
}

template <class T, class Cache>
__device__ inline void attend(T* __restrict__ y, const T* __restrict__ q, const Cache& k, const Cache& v,
                              const CacheRows& rows, const Problem& problem) {
    __shared__ __align__(16) std::uint32_t queries[ROWS][PITCH], keys[CHUNK][PITCH], values[CHUNK][PITCH];
    __shared__ __align__(16) std::uint32_t weights[ROWS][P_PITCH];
    __shared__ float top_of[WARPS][ROWS], sum_of[WARPS][ROWS];
    __shared__ int special_chunk;  // one more than the last chunk that holds a value that is NaN or Inf
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int D = problem.D, T_ = problem.T, G = problem.H / rows.heads, count = T_ * G;
    const int b = blockIdx.z, head = blockIdx.y, first = blockIdx.x * ROWS;
    const int length = problem.lengths[b], start = length - T_;
    const float infinity = __uint_as_float(0x7f800000u);

    // Queries, and which keys the two rows of this lane see: [low, high).
    for (int i = thread; i < ROWS * (D / 8); i += THREADS) {
        const int row = i / (D / 8), column = i % (D / 8) * 8, r = first + row;
        const long long token = static_cast<long long>(b) * T_ + r / G;
        uint4 eight = make_uint4(0, 0, 0, 0);
        if (r < count)
            eight = *reinterpret_cast<const uint4*>(q + token * problem.q_stride + (head * G + r % G) * D + column);
        *reinterpret_cast<uint4*>(&queries[row][column / 2]) = eight;
    }
    special_chunk = 0;  // by all threads
    int low[2], high[2];
    float m[2], l[2], o[COLUMNS][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int r = first + g + 8 * half, position = start + r / G;
        low[half] = problem.window > 0 ? max(position - problem.window + 1, 0) : 0;
        high[half] = r >= count ? 0 : problem.causal ? position + 1 : length;
        const bool sink = problem.sinks != nullptr;
        m[half] = sink ? problem.sinks[head * G + r % G] : -infinity;
        l[half] = sink ? 1.0f : 0.0f;
    }
    // Chunks that some row of the block sees.
    const int last = min(first + ROWS, count) - 1;
    const int begin = problem.window > 0 ? max(start + first / G - problem.window + 1, 0) / CHUNK : 0;
    const int end = ((problem.causal ? start + last / G + 1 : length) + CHUNK - 1) / CHUNK;

    for (int chunk = begin; chunk < end; ++chunk) {
        __syncthreads();  // the chunk before has been used
        for (int i = thread; i < CHUNK * (D / 8); i += THREADS) {
            const int row = i / (D / 8), column = i % (D / 8) * 8, key = chunk * CHUNK + row;
            uint4 k8 = make_uint4(0, 0, 0, 0), v8 = k8;  // past the length: zeros, so that no garbage enters
            if (key < length) {
                const long long at = rows.at(b, head, key);
                k8 = k.eight(at, D, column);
                v8 = v.eight(at, D, column);
            }
            *reinterpret_cast<uint4*>(&keys[row][column / 2]) = k8;
            *reinterpret_cast<uint4*>(&values[row][column / 2]) = v8;
            const std::uint32_t words[4] = {v8.x, v8.y, v8.z, v8.w};
#pragma unroll
            for (int w = 0; w < 4; ++w)
                if (special<T>(words[w]) || special<T>(words[w] >> 16)) special_chunk = chunk + 1;
        }
        __syncthreads();

        float s[1][2][4] = {};
        for (int word = t; word < D / 2; word += MMA_K / 2) {
            std::uint32_t a[1][4], keys8[2][2];
#pragma unroll
            for (int r = 0; r < 4; ++r) a[0][r] = queries[g + 8 * (r & 1)][word + 4 * (r >> 1)];
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int r = 0; r < 2; ++r) keys8[j][r] = keys[16 * warp + 8 * j + g][word + 4 * r];
            mma_step(Fragments<T, 1, 2>{s, a, keys8});
        }

        // Element r of group j: row g + 8 (r / 2), key first_key + 8 j + r % 2.
        const int first_key = chunk * CHUNK + 16 * warp + 2 * t;
        bool visible[2][4];
        float top[2] = {-infinity, -infinity};
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int key = first_key + 8 * j + r % 2;
                visible[j][r] = key >= low[r / 2] && key < high[r / 2];
                s[0][j][r] = __fmul_rn(s[0][j][r], problem.scale);
                if (visible[j][r]) top[r / 2] = Max()(top[r / 2], s[0][j][r]);
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            top[half] = warp_reduce<4>(top[half], Max());
            if (t == 0) top_of[warp][g + 8 * half] = top[half];
        }
        __syncthreads();

        float partial[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            top[half] = top_of[0][g + 8 * half];
#pragma unroll
            for (int w = 1; w < WARPS; ++w) top[half] = Max()(top[half], top_of[w][g + 8 * half]);
            float each[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                alignas(4) T p[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int r = 2 * half + i;
                    narrow(&p[i], visible[j][r] ? exp32(__fsub_rn(s[0][j][r], base(top[half]))) : 0.0f);
                }
                each[j] = __fadd_rn(widen(p[0]), widen(p[1]));
                weights[g + 8 * half][8 * warp + 4 * j + t] = *reinterpret_cast<const std::uint32_t*>(p);
            }
            partial[half] = warp_reduce<4>(__fadd_rn(each[0], each[1]), Sum());
            if (t == 0) sum_of[warp][g + 8 * half] = partial[half];
        }
        __syncthreads();

        // A value that is NaN or Inf would reach rows that do not see it, as 0 times it: it is left out here, and
        // added to the rows that do.
        const bool specials = special_chunk == chunk + 1;
        float part[COLUMNS][4] = {};
#pragma unroll
        for (int c = 0; c < COLUMNS; c += 2) {
            if (8 * (warp + WARPS * c) >= D) continue;
            float two[1][2][4] = {};
#pragma unroll
            for (int step = 0; step < CHUNK / MMA_K; ++step) {
                std::uint32_t a[1][4], columns[2][2] = {};
                const int word = step * MMA_K / 2 + t;
#pragma unroll
                for (int r = 0; r < 4; ++r) a[0][r] = weights[g + 8 * (r & 1)][word + 4 * (r >> 1)];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int column = 8 * (warp + WARPS * (c + j)) + g;
                    if (column >= D) continue;
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        std::uint32_t pair[2];
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const int key = step * MMA_K + 2 * t + 8 * r + i;
                            pair[i] = reinterpret_cast<const std::uint16_t*>(values[key])[column];
                            if (specials && special<T>(pair[i])) pair[i] = 0;
                        }
                        columns[j][r] = pair[0] | pair[1] << 16;
                    }
                }
                mma_step(Fragments<T, 1, 2>{two, a, columns});
            }
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int r = 0; r < 4; ++r) part[c + j][r] = two[0][j][r];
        }
        if (specials) {
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const int column = 8 * (warp + WARPS * c) + 2 * t + r % 2, row = g + 8 * (r / 2);
                    if (column >= D) continue;
                    part[c][r] = add_specials<T>(part[c][r], values, weights[row], column, low[r / 2] - chunk * CHUNK,
                                                 high[r / 2] - chunk * CHUNK);
                }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (low[half] >= (chunk + 1) * CHUNK || high[half] <= chunk * CHUNK) continue;  // the row sees none of it
            const float largest = Max()(m[half], top[half]);
            const float kept = exp32(__fsub_rn(m[half], base(largest))), joined = exp32(__fsub_rn(top[half], base(largest)));
            float sum = sum_of[0][g + 8 * half];
#pragma unroll
            for (int w = 1; w < WARPS; ++w) sum = __fadd_rn(sum, sum_of[w][g + 8 * half]);
            m[half] = largest;
            l[half] = __fadd_rn(__fmul_rn(l[half], kept), __fmul_rn(sum, joined));
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int r = 2 * half; r < 2 * half + 2; ++r)
                    o[c][r] = __fadd_rn(__fmul_rn(o[c][r], kept), __fmul_rn(part[c][r], joined));
        }
    }

#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)  // of y, as far as it has them
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int column = 8 * (warp + WARPS * c) + 2 * t + r % 2, row = first + g + 8 * (r / 2);
            if (column >= D || row >= count) continue;
            const bool nothing = low[r / 2] >= high[r / 2] && problem.sinks == nullptr;
            const long long token = static_cast<long long>(b) * T_ + row / G;
            narrow(y + (token * problem.H + head * G + row % G) * D + column,
                   nothing ? 0.0f : __fdiv_rn(o[c][r], l[r / 2]));
        }
}

// ---------------------------------------------------------------------------------------------- entry points

using Bytes = const std::uint8_t*;

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_bf16(__nv_bfloat16* y, const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v, Bytes, Bytes,
                   const int* table, const int* lengths, const float* sinks, int T, int H, int Hkv, int D, int q_stride,
                   int page, int pages, float scale, int causal, int window) {
    attend(y, q, Plain<__nv_bfloat16>{k}, Plain<__nv_bfloat16>{v}, {table, Hkv, page, pages},
           {lengths, sinks, T, H, D, q_stride, scale, causal, window});
}
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_fp16(__half* y, const __half* q, const __half* k, const __half* v, Bytes, Bytes, const int* table,
                   const int* lengths, const float* sinks, int T, int H, int Hkv, int D, int q_stride, int page, int pages,
                   float scale, int causal, int window) {
    attend(y, q, Plain<__half>{k}, Plain<__half>{v}, {table, Hkv, page, pages},
           {lengths, sinks, T, H, D, q_stride, scale, causal, window});
}
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_mxfp4_bf16(__nv_bfloat16* y, const __nv_bfloat16* q, Bytes k, Bytes v, Bytes k_scales, Bytes v_scales,
                         const int* table, const int* lengths, const float* sinks, int T, int H, int Hkv, int D,
                         int q_stride, int page, int pages, float scale, int causal, int window) {
    attend(y, q, Packed<__nv_bfloat16>{k, k_scales}, Packed<__nv_bfloat16>{v, v_scales}, {table, Hkv, page, pages},
           {lengths, sinks, T, H, D, q_stride, scale, causal, window});
}
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_mxfp4_fp16(__half* y, const __half* q, Bytes k, Bytes v, Bytes k_scales, Bytes v_scales, const int* table,
                         const int* lengths, const float* sinks, int T, int H, int Hkv, int D, int q_stride, int page,
                         int pages, float scale, int causal, int window) {
    attend(y, q, Packed<__half>{k, k_scales}, Packed<__half>{v, v_scales}, {table, Hkv, page, pages},
           {lengths, sinks, T, H, D, q_stride, scale, causal, window});
}
