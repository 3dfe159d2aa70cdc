// Attention over a KV cache: y = softmax(scale q K^T) V for queries of T positions.
//
//   q       B T tokens of H rows of D bfloat16 or half, H = G Hkv; a token begins `q_stride` elements after the last
//   k, v    cache of Hkv heads, see kv_cache.cuh: the type of q, or MXFP4 (decoded values rounded once to that type)
//   lengths (B) int32: keys of a sequence that count; its T queries stand at the positions lengths[b] - T ..
//   sinks   (H) float32 or null: one more logit of each head, without a value
//   y       (B, T, H, D), contiguous
//   D a multiple of 16, at most 128; the caller has checked lengths, pages and sizes
//
// A query at position i sees the keys below its sequence's length; with `causal` those up to i only; with `window` > 0
// those after i - window only. A query that sees no key gives zeros, whatever its sink.
//
// Order of sums, the same for every batch, tile, page size, prefill or decode: keys in chunks of 128 at absolute
// positions, in ascending order. Powers of 2 below 2^-126 are 0. Within a chunk, for one row of queries, with
// c = |scale| log2(e), rounded:
//   s    = q . k, one unbroken chain of tensor core steps from zero over D; its sign changed if scale is negative
//   m_c  = ceil(max s c) over the visible s, the chunk's base: weights are told relative to 2^m_c
//   z    = s c - m_c, rounded once, to a multiple of 2^-12 (where |m_c| >= 2^23 the product is rounded before)
//   p    = 2^z times a constant of the type of q (weights.cuh), rounded to that type; 0 for what is not visible
//   l_c  = the sum of the rounded p, a chain of eight tensor core steps from zero: the product with ones
//   O_c  = p V, a chain of eight tensor core steps from zero
// Chunks join the state (m, l, O), from (-inf, 0, 0) or, with a sink, from (ceil(sink log2(e)), 2^z times the constant, 0):
//   m' = max(m, m_c), l = l 2^(m - m') + l_c 2^(m_c - m'), O likewise: both factors exact, one of them 1, one rounding
// A chunk of which the row sees nothing leaves the row's state as it is. y = O (1 / l): the inverse and the product are each
// rounded to float32, and that to y's type.
//
// The bits are those of that order, whichever schedule ran: attention_few.cuh for few rows (decoding, mostly), here,
// attention_many.cuh for many, or attention_wide.cuh for many on Hopper. A row is t G + g of a KV head: position t, query
// head g of the group.
#include "attention_few.cuh"

using Bytes = const std::uint8_t*;
constexpr int FEW_BLOCKS = 4;  // at once on one multiprocessor: how many registers a thread may have

extern "C" __device__ const unsigned attention_few64_bf16_shared = FEW_BYTES<64, Plain<__nv_bfloat16>>;
extern "C" __global__ void __launch_bounds__(THREADS, FEW_BLOCKS)
    attention_few64_bf16(__nv_bfloat16* y, const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v,
                         Bytes, Bytes, const int* table, const int* lengths, const float* sinks, int T, int H,
                         int Hkv, int D, int q_stride, int page, int pages, float scale, int causal, int window,
                         float* parts, int rows, int slots, int splits) {
    attend_few<64>(y, {parts, rows, slots, D}, q, Plain<__nv_bfloat16>{k},
                   Plain<__nv_bfloat16>{v}, {table, Hkv, page, pages},
                   {lengths, sinks, T, H, D, q_stride, scale, causal, window}, splits);
}
extern "C" __device__ const unsigned attention_few128_bf16_shared = FEW_BYTES<128, Plain<__nv_bfloat16>>;
extern "C" __global__ void __launch_bounds__(THREADS, FEW_BLOCKS)
    attention_few128_bf16(__nv_bfloat16* y, const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v,
                          Bytes, Bytes, const int* table, const int* lengths, const float* sinks, int T, int H,
                          int Hkv, int D, int q_stride, int page, int pages, float scale, int causal, int window,
                          float* parts, int rows, int slots, int splits) {
    attend_few<128>(y, {parts, rows, slots, D}, q, Plain<__nv_bfloat16>{k},
                   Plain<__nv_bfloat16>{v}, {table, Hkv, page, pages},
                   {lengths, sinks, T, H, D, q_stride, scale, causal, window}, splits);
}
extern "C" __device__ const unsigned attention_few64_fp16_shared = FEW_BYTES<64, Plain<__half>>;
extern "C" __global__ void __launch_bounds__(THREADS, FEW_BLOCKS)
    attention_few64_fp16(__half* y, const __half* q, const __half* k, const __half* v, Bytes, Bytes, const int* table,
                         const int* lengths, const float* sinks, int T, int H, int Hkv, int D, int q_stride, int page,
                         int pages, float scale, int causal, int window, float* parts, int rows, int slots,
                         int splits) {
    attend_few<64>(y, {parts, rows, slots, D}, q, Plain<__half>{k},
                   Plain<__half>{v}, {table, Hkv, page, pages},
                   {lengths, sinks, T, H, D, q_stride, scale, causal, window}, splits);
}
extern "C" __device__ const unsigned attention_few128_fp16_shared = FEW_BYTES<128, Plain<__half>>;
extern "C" __global__ void __launch_bounds__(THREADS, FEW_BLOCKS)
    attention_few128_fp16(__half* y, const __half* q, const __half* k, const __half* v, Bytes, Bytes,
                          const int* table, const int* lengths, const float* sinks, int T, int H, int Hkv, int D,
                          int q_stride, int page, int pages, float scale, int causal, int window, float* parts,
                          int rows, int slots, int splits) {
    attend_few<128>(y, {parts, rows, slots, D}, q, Plain<__half>{k},
                   Plain<__half>{v}, {table, Hkv, page, pages},
                   {lengths, sinks, T, H, D, q_stride, scale, causal, window}, splits);
}
extern "C" __device__ const unsigned attention_few64_mxfp4_bf16_shared = FEW_BYTES<64, Packed<__nv_bfloat16>>;
extern "C" __global__ void __launch_bounds__(THREADS, FEW_BLOCKS)
    attention_few64_mxfp4_bf16(__nv_bfloat16* y, const __nv_bfloat16* q, Bytes k, Bytes v, Bytes k_scales,
                               Bytes v_scales, const int* table, const int* lengths, const float* sinks, int T, int H,
                               int Hkv, int D, int q_stride, int page, int pages, float scale, int causal, int window,
                               float* parts, int rows, int slots, int splits) {
    attend_few<64>(y, {parts, rows, slots, D}, q, Packed<__nv_bfloat16>{k, k_scales},
                   Packed<__nv_bfloat16>{v, v_scales}, {table, Hkv, page, pages},
                   {lengths, sinks, T, H, D, q_stride, scale, causal, window}, splits);
}
extern "C" __device__ const unsigned attention_few128_mxfp4_bf16_shared = FEW_BYTES<128, Packed<__nv_bfloat16>>;
extern "C" __global__ void __launch_bounds__(THREADS, FEW_BLOCKS)
    attention_few128_mxfp4_bf16(__nv_bfloat16* y, const __nv_bfloat16* q, Bytes k, Bytes v, Bytes k_scales,
                                Bytes v_scales, const int* table, const int* lengths, const float* sinks, int T,
                                int H, int Hkv, int D, int q_stride, int page, int pages, float scale, int causal,
                                int window, float* parts, int rows, int slots, int splits) {
    attend_few<128>(y, {parts, rows, slots, D}, q, Packed<__nv_bfloat16>{k, k_scales},
                   Packed<__nv_bfloat16>{v, v_scales}, {table, Hkv, page, pages},
                   {lengths, sinks, T, H, D, q_stride, scale, causal, window}, splits);
}
extern "C" __device__ const unsigned attention_few64_mxfp4_fp16_shared = FEW_BYTES<64, Packed<__half>>;
extern "C" __global__ void __launch_bounds__(THREADS, FEW_BLOCKS)
    attention_few64_mxfp4_fp16(__half* y, const __half* q, Bytes k, Bytes v, Bytes k_scales, Bytes v_scales,
                               const int* table, const int* lengths, const float* sinks, int T, int H, int Hkv, int D,
                               int q_stride, int page, int pages, float scale, int causal, int window, float* parts,
                               int rows, int slots, int splits) {
    attend_few<64>(y, {parts, rows, slots, D}, q, Packed<__half>{k, k_scales},
                   Packed<__half>{v, v_scales}, {table, Hkv, page, pages},
                   {lengths, sinks, T, H, D, q_stride, scale, causal, window}, splits);
}
extern "C" __device__ const unsigned attention_few128_mxfp4_fp16_shared = FEW_BYTES<128, Packed<__half>>;
extern "C" __global__ void __launch_bounds__(THREADS, FEW_BLOCKS)
    attention_few128_mxfp4_fp16(__half* y, const __half* q, Bytes k, Bytes v, Bytes k_scales, Bytes v_scales,
                                const int* table, const int* lengths, const float* sinks, int T, int H, int Hkv,
                                int D, int q_stride, int page, int pages, float scale, int causal, int window,
                                float* parts, int rows, int slots, int splits) {
    attend_few<128>(y, {parts, rows, slots, D}, q, Packed<__half>{k, k_scales},
                   Packed<__half>{v, v_scales}, {table, Hkv, page, pages},
                   {lengths, sinks, T, H, D, q_stride, scale, causal, window}, splits);
}

// The chunks' sums of what attention_few left in parts, when it ran with splits > 1. grid (rows), block at least D.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_join_bf16(__nv_bfloat16* y, const __nv_bfloat16* q, const void* k, const void* v, const void* k_scales,
                        const void* v_scales, const int* table, const int* lengths, const float* sinks, int T, int H,
                        int Hkv, int D, int q_stride, int page, int pages, float scale, int causal, int window,
                        float* parts, int rows, int slots, int splits) {
    join_parts(y, {parts, rows, slots, D}, {table, Hkv, page, pages},
               {lengths, sinks, T, H, D, q_stride, scale, causal, window}, splits);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_join_fp16(__half* y, const __half* q, const void* k, const void* v, const void* k_scales,
                        const void* v_scales, const int* table, const int* lengths, const float* sinks, int T, int H,
                        int Hkv, int D, int q_stride, int page, int pages, float scale, int causal, int window,
                        float* parts, int rows, int slots, int splits) {
    join_parts(y, {parts, rows, slots, D}, {table, Hkv, page, pages},
               {lengths, sinks, T, H, D, q_stride, scale, causal, window}, splits);
}
