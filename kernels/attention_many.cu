// Attention for many rows, as in prefill: what attention.cu computes, of the same parameters and with the same bits.
#include "attention_many.cuh"

using Bytes = const std::uint8_t*;
constexpr int MANY_BLOCKS = 2;  // at once on one multiprocessor: how many registers a thread may have

extern "C" __device__ const unsigned attention_many64_bf16_shared = sizeof(ManyShared<64, Plain<__nv_bfloat16>>);
extern "C" __global__ void __launch_bounds__(THREADS, MANY_BLOCKS)
    attention_many64_bf16(__nv_bfloat16* y, const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v,
                          Bytes, Bytes, const int* table, const int* lengths, const float* sinks, int T, int H,
                          int Hkv, int D, int q_stride, int page, int pages, float scale, int causal, int window) {
    attend_many<64>(y, q, Plain<__nv_bfloat16>{k}, Plain<__nv_bfloat16>{v},
                    {table, Hkv, page, pages}, {lengths, sinks, T, H, D, q_stride, scale, causal, window});
}
extern "C" __device__ const unsigned attention_many128_bf16_shared = sizeof(ManyShared<128, Plain<__nv_bfloat16>>);
extern "C" __global__ void __launch_bounds__(THREADS, MANY_BLOCKS)
    attention_many128_bf16(__nv_bfloat16* y, const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v,
                           Bytes, Bytes, const int* table, const int* lengths, const float* sinks, int T, int H,
                           int Hkv, int D, int q_stride, int page, int pages, float scale, int causal, int window) {
    attend_many<128>(y, q, Plain<__nv_bfloat16>{k}, Plain<__nv_bfloat16>{v},
                    {table, Hkv, page, pages}, {lengths, sinks, T, H, D, q_stride, scale, causal, window});
}
extern "C" __device__ const unsigned attention_many64_fp16_shared = sizeof(ManyShared<64, Plain<__half>>);
extern "C" __global__ void __launch_bounds__(THREADS, MANY_BLOCKS)
    attention_many64_fp16(__half* y, const __half* q, const __half* k, const __half* v, Bytes, Bytes,
                          const int* table, const int* lengths, const float* sinks, int T, int H, int Hkv, int D,
                          int q_stride, int page, int pages, float scale, int causal, int window) {
    attend_many<64>(y, q, Plain<__half>{k}, Plain<__half>{v},
                    {table, Hkv, page, pages}, {lengths, sinks, T, H, D, q_stride, scale, causal, window});
}
extern "C" __device__ const unsigned attention_many128_fp16_shared = sizeof(ManyShared<128, Plain<__half>>);
extern "C" __global__ void __launch_bounds__(THREADS, MANY_BLOCKS)
    attention_many128_fp16(__half* y, const __half* q, const __half* k, const __half* v, Bytes, Bytes,
                           const int* table, const int* lengths, const float* sinks, int T, int H, int Hkv, int D,
                           int q_stride, int page, int pages, float scale, int causal, int window) {
    attend_many<128>(y, q, Plain<__half>{k}, Plain<__half>{v},
                    {table, Hkv, page, pages}, {lengths, sinks, T, H, D, q_stride, scale, causal, window});
}
extern "C" __device__ const unsigned attention_many64_mxfp4_bf16_shared = sizeof(ManyShared<64, Packed<__nv_bfloat16>>);
extern "C" __global__ void __launch_bounds__(THREADS, MANY_BLOCKS)
    attention_many64_mxfp4_bf16(__nv_bfloat16* y, const __nv_bfloat16* q, Bytes k, Bytes v, Bytes k_scales,
                                Bytes v_scales, const int* table, const int* lengths, const float* sinks, int T,
                                int H, int Hkv, int D, int q_stride, int page, int pages, float scale, int causal,
                                int window) {
    attend_many<64>(y, q, Packed<__nv_bfloat16>{k, k_scales}, Packed<__nv_bfloat16>{v, v_scales},
                    {table, Hkv, page, pages}, {lengths, sinks, T, H, D, q_stride, scale, causal, window});
}
extern "C" __device__ const unsigned attention_many128_mxfp4_bf16_shared = sizeof(ManyShared<128, Packed<__nv_bfloat16>>);
extern "C" __global__ void __launch_bounds__(THREADS, MANY_BLOCKS)
    attention_many128_mxfp4_bf16(__nv_bfloat16* y, const __nv_bfloat16* q, Bytes k, Bytes v, Bytes k_scales,
                                 Bytes v_scales, const int* table, const int* lengths, const float* sinks, int T,
                                 int H, int Hkv, int D, int q_stride, int page, int pages, float scale, int causal,
                                 int window) {
    attend_many<128>(y, q, Packed<__nv_bfloat16>{k, k_scales}, Packed<__nv_bfloat16>{v, v_scales},
                    {table, Hkv, page, pages}, {lengths, sinks, T, H, D, q_stride, scale, causal, window});
}
extern "C" __device__ const unsigned attention_many64_mxfp4_fp16_shared = sizeof(ManyShared<64, Packed<__half>>);
extern "C" __global__ void __launch_bounds__(THREADS, MANY_BLOCKS)
    attention_many64_mxfp4_fp16(__half* y, const __half* q, Bytes k, Bytes v, Bytes k_scales, Bytes v_scales,
                                const int* table, const int* lengths, const float* sinks, int T, int H, int Hkv,
                                int D, int q_stride, int page, int pages, float scale, int causal, int window) {
    attend_many<64>(y, q, Packed<__half>{k, k_scales}, Packed<__half>{v, v_scales},
                    {table, Hkv, page, pages}, {lengths, sinks, T, H, D, q_stride, scale, causal, window});
}
extern "C" __device__ const unsigned attention_many128_mxfp4_fp16_shared = sizeof(ManyShared<128, Packed<__half>>);
extern "C" __global__ void __launch_bounds__(THREADS, MANY_BLOCKS)
    attention_many128_mxfp4_fp16(__half* y, const __half* q, Bytes k, Bytes v, Bytes k_scales, Bytes v_scales,
                                 const int* table, const int* lengths, const float* sinks, int T, int H, int Hkv,
                                 int D, int q_stride, int page, int pages, float scale, int causal, int window) {
    attend_many<128>(y, q, Packed<__half>{k, k_scales}, Packed<__half>{v, v_scales},
                    {table, Hkv, page, pages}, {lengths, sinks, T, H, D, q_stride, scale, causal, window});
}
