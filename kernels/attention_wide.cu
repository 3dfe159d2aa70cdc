// Attention for many rows on Hopper (attention_wide.cuh), with the arguments and bits of attention_many.cu, for heads of 64
// or 128 and caches of 16 bits, and how many sequences there are. Any number of blocks shares the tiles; a block takes up to 256.
#include "attention_wide.cuh"

using Bytes = const std::uint8_t*;
extern "C" __device__ const unsigned attention_wide64_bf16_shared = sizeof(WideShared<64>);
extern "C" __global__ void __launch_bounds__(WIDE_THREADS<64>, 1)
    attention_wide64_bf16(__nv_bfloat16* y, const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v, Bytes, Bytes, const int* table,
                          const int* lengths, const float* sinks, int T, int H, int Hkv, int D, int q_stride, int page,
                          int pages, float scale, int causal, int window, int batch,
                          int heads_at_once) {
    attend_wide<64>(y, q, Plain<__nv_bfloat16>{k}, Plain<__nv_bfloat16>{v}, {table, Hkv, page, pages},
                    {lengths, sinks, T, H, D, q_stride, scale, causal, window}, batch, heads_at_once);
}
extern "C" __device__ const unsigned attention_wide64_fp16_shared = sizeof(WideShared<64>);
extern "C" __global__ void __launch_bounds__(WIDE_THREADS<64>, 1)
    attention_wide64_fp16(__half* y, const __half* q, const __half* k, const __half* v, Bytes, Bytes, const int* table,
                          const int* lengths, const float* sinks, int T, int H, int Hkv, int D, int q_stride, int page,
                          int pages, float scale, int causal, int window, int batch,
                          int heads_at_once) {
    attend_wide<64>(y, q, Plain<__half>{k}, Plain<__half>{v}, {table, Hkv, page, pages},
                    {lengths, sinks, T, H, D, q_stride, scale, causal, window}, batch, heads_at_once);
}
extern "C" __device__ const unsigned attention_wide128_bf16_shared = sizeof(WideShared<128>);
extern "C" __global__ void __launch_bounds__(WIDE_THREADS<128>, 1)
    attention_wide128_bf16(__nv_bfloat16* y, const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v, Bytes, Bytes, const int* table,
                          const int* lengths, const float* sinks, int T, int H, int Hkv, int D, int q_stride, int page,
                          int pages, float scale, int causal, int window, int batch,
                          int heads_at_once) {
    attend_wide<128>(y, q, Plain<__nv_bfloat16>{k}, Plain<__nv_bfloat16>{v}, {table, Hkv, page, pages},
                    {lengths, sinks, T, H, D, q_stride, scale, causal, window}, batch, heads_at_once);
}
extern "C" __device__ const unsigned attention_wide128_fp16_shared = sizeof(WideShared<128>);
extern "C" __global__ void __launch_bounds__(WIDE_THREADS<128>, 1)
    attention_wide128_fp16(__half* y, const __half* q, const __half* k, const __half* v, Bytes, Bytes, const int* table,
                          const int* lengths, const float* sinks, int T, int H, int Hkv, int D, int q_stride, int page,
                          int pages, float scale, int causal, int window, int batch,
                          int heads_at_once) {
    attend_wide<128>(y, q, Plain<__half>{k}, Plain<__half>{v}, {table, Hkv, page, pages},
                    {lengths, sinks, T, H, D, q_stride, scale, causal, window}, batch, heads_at_once);
}
