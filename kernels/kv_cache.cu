// The KV cache: append rotated keys and values, read them back; and the same rotation for queries.
//
//   k, v    B T tokens of Hkv rows of D bfloat16 or half; a token's row begins `stride` elements after the one before
//   cache   see kv_cache.cuh: 16 bits, or MXFP4 along D (floor rule, ties to even; the last block padded with zeros)
//   angles  (positions, D/2, 2) float32 cos and sin, or null: no rotation    order  "half" or "interleaved" (rope.cuh)
//   starts  (B) int32: token t of sequence b has position starts[b] + t
//
// Keys are rotated in float32, rounded to their type and only then stored or quantised; values are stored as they are.
// Nothing is summed over more than a pair. Positions and pages were checked by the caller.
// A thread does SHARE elements: on a GPU four lanes share a block of 32, so that a token's few rows keep many lanes busy and
// neighbours read and write side by side; on a CPU one thread does it, and as many threads find nothing to do.
#include "kv_cache.cuh"
#include "rope.cuh"
#include "warp.cuh"

#ifdef __CUDACC__
constexpr int LANES = 4;
#else
constexpr int LANES = 1;
#endif
constexpr int SHARE = MX_BLOCK / LANES;

struct Tokens {
    const int* starts;  // null: all 0
    int T, heads, D, order;
    const float* angles;

    __device__ const float* angles_of(int position) const {
        return angles == nullptr ? nullptr : angles + static_cast<long long>(position) * D;
    }
};

constexpr int THREADS = 128;

// The first element that this thread does, and whose: false past the last one.
struct Place {
    int sequence, head, position, first;
    long long token;
};
__device__ inline bool locate(Place& place, const Tokens& tokens, int B) {
    const long long thread = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    const int shares = row_blocks(tokens.D) * LANES;
    const long long row = thread / shares;
    if (row >= static_cast<long long>(B) * tokens.T * tokens.heads) return false;
    place.first = static_cast<int>(thread % shares) * SHARE;
    place.head = static_cast<int>(row % tokens.heads);
    place.token = row / tokens.heads;
    place.sequence = static_cast<int>(place.token / tokens.T);
    place.position = static_cast<int>(place.token % tokens.T);
    if (tokens.starts != nullptr) place.position += tokens.starts[place.sequence];
    return true;
}

// blockIdx.y: 0 for keys, 1 for values.
template <class T, bool quantised>
__device__ inline void append(void* k_cache, void* v_cache, std::uint8_t* k_scales, std::uint8_t* v_scales, const T* k,
                              const T* v, int k_stride, int v_stride, const CacheRows& rows, const Tokens& tokens, int B) {
    Place place = {};
    const bool exists = locate(place, tokens, B);
    if (!quantised && !exists) return;  // else its neighbours may ask it
    const bool keys = blockIdx.y == 0;
    const T* from = (keys ? k + place.token * k_stride : v + place.token * v_stride) + place.head * tokens.D;
    const float* angles = keys ? tokens.angles_of(place.position) : nullptr;
    void* cache = keys ? k_cache : v_cache;
    const long long row = rows.at(place.sequence, place.head, place.position);
    const int count = exists ? min(SHARE, tokens.D - place.first) : 0;
    if constexpr (quantised) {
        float values[SHARE];
#pragma unroll
        for (int i = 0; i < SHARE; ++i)
            values[i] = i < count ? widen(rotated(from, angles, place.first + i, tokens.D, tokens.order)) : 0.0f;
        const int scale = scale_of(warp_reduce<LANES>(largest_of(values), Max()), SCALE_FLOOR);
        if (!exists) return;
        const long long to = row * row_blocks(tokens.D) + place.first / MX_BLOCK;
        using Codes = std::conditional_t<LANES == 1, uint4, std::uint32_t>;
        Codes codes;
        encode_all(reinterpret_cast<std::uint32_t*>(&codes), values, scale, TIE_EVEN);
        static_cast<Codes*>(cache)[to * LANES + place.first % MX_BLOCK / SHARE] = codes;
        if (place.first % MX_BLOCK == 0) (keys ? k_scales : v_scales)[to] = static_cast<std::uint8_t>(scale);
    } else {
        T* to = static_cast<T*>(cache) + row * tokens.D + place.first;
#pragma unroll
        for (int i = 0; i < SHARE; ++i)
            if (i < count) to[i] = rotated(from, angles, place.first + i, tokens.D, tokens.order);
    }
}

// y (B, T, heads, D), contiguous: the rotated rows.
template <class T> __device__ inline void rotate(T* y, const T* x, int stride, const Tokens& tokens, int B) {
    Place place;
    if (!locate(place, tokens, B)) return;
    const T* from = x + place.token * stride + place.head * tokens.D;
    T* to = y + (place.token * tokens.heads + place.head) * tokens.D;
    const float* angles = tokens.angles_of(place.position);
#pragma unroll 8
    for (int i = place.first; i < min(place.first + SHARE, tokens.D); ++i)
        to[i] = rotated(from, angles, i, tokens.D, tokens.order);
}

// y (B, heads, T, D), contiguous: the cache's rows 0 .. T - 1.
template <class T, class Cache>
__device__ inline void read(T* y, const Cache& cache, const CacheRows& rows, const Tokens& tokens, int B) {
    Place place;
    if (!locate(place, tokens, B)) return;
    const int D = tokens.D;
    const long long row = rows.at(place.sequence, place.head, place.position);
    T* to = y + ((static_cast<long long>(place.sequence) * tokens.heads + place.head) * tokens.T + place.position) * D;
    for (int column = place.first; column < min(place.first + SHARE, D); column += 8)
        *reinterpret_cast<uint4*>(to + column) = cache.eight(row, D, column);
}

// ---------------------------------------------------------------------------------------------- entry points

extern "C" __global__ void __launch_bounds__(THREADS)
    kv_append_bf16(void* k_cache, void* v_cache, std::uint8_t* k_scales, std::uint8_t* v_scales, const __nv_bfloat16* k,
                   const __nv_bfloat16* v, int k_stride, int v_stride, const int* table, const float* angles,
                   const int* starts, int B, int T, int heads, int D, int order, int page, int pages) {
    append<__nv_bfloat16, false>(k_cache, v_cache, k_scales, v_scales, k, v, k_stride, v_stride, {table, heads, page, pages},
                                 {starts, T, heads, D, order, angles}, B);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    kv_append_fp16(void* k_cache, void* v_cache, std::uint8_t* k_scales, std::uint8_t* v_scales, const __half* k,
                   const __half* v, int k_stride, int v_stride, const int* table, const float* angles,
                   const int* starts, int B, int T, int heads, int D, int order, int page, int pages) {
    append<__half, false>(k_cache, v_cache, k_scales, v_scales, k, v, k_stride, v_stride, {table, heads, page, pages},
                          {starts, T, heads, D, order, angles}, B);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    kv_append_mxfp4_bf16(void* k_cache, void* v_cache, std::uint8_t* k_scales, std::uint8_t* v_scales,
                         const __nv_bfloat16* k, const __nv_bfloat16* v, int k_stride, int v_stride, const int* table,
                         const float* angles, const int* starts, int B, int T, int heads, int D, int order, int page,
                         int pages) {
    append<__nv_bfloat16, true>(k_cache, v_cache, k_scales, v_scales, k, v, k_stride, v_stride, {table, heads, page, pages},
                                {starts, T, heads, D, order, angles}, B);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    kv_append_mxfp4_fp16(void* k_cache, void* v_cache, std::uint8_t* k_scales, std::uint8_t* v_scales, const __half* k,
                         const __half* v, int k_stride, int v_stride, const int* table, const float* angles,
                         const int* starts, int B, int T, int heads, int D, int order, int page, int pages) {
    append<__half, true>(k_cache, v_cache, k_scales, v_scales, k, v, k_stride, v_stride, {table, heads, page, pages},
                         {starts, T, heads, D, order, angles}, B);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_bf16(__nv_bfloat16* y, const __nv_bfloat16* x, int stride, const float* angles, const int* starts, int B, int T,
              int heads, int D, int order) {
    rotate(y, x, stride, {starts, T, heads, D, order, angles}, B);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    rope_fp16(__half* y, const __half* x, int stride, const float* angles, const int* starts, int B, int T, int heads,
              int D, int order) {
    rotate(y, x, stride, {starts, T, heads, D, order, angles}, B);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    kv_read_bf16(__nv_bfloat16* y, const __nv_bfloat16* cache, const std::uint8_t*, const int* table, int B,
                 int T, int heads, int D, int page, int pages) {
    read(y, Plain<__nv_bfloat16>{cache}, {table, heads, page, pages}, {nullptr, T, heads, D, PAIR_HALF, nullptr}, B);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    kv_read_fp16(__half* y, const __half* cache, const std::uint8_t*, const int* table, int B,
                 int T, int heads, int D, int page, int pages) {
    read(y, Plain<__half>{cache}, {table, heads, page, pages}, {nullptr, T, heads, D, PAIR_HALF, nullptr}, B);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    kv_read_mxfp4_bf16(__nv_bfloat16* y, const std::uint8_t* cache, const std::uint8_t* scales, const int* table,
                       int B, int T, int heads, int D, int page, int pages) {
    read(y, Packed<__nv_bfloat16>{cache, scales}, {table, heads, page, pages}, {nullptr, T, heads, D, PAIR_HALF, nullptr}, B);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    kv_read_mxfp4_fp16(__half* y, const std::uint8_t* cache, const std::uint8_t* scales, const int* table, int B,
                       int T, int heads, int D, int page, int pages) {
    read(y, Packed<__half>{cache, scales}, {table, heads, page, pages}, {nullptr, T, heads, D, PAIR_HALF, nullptr}, B);
}
