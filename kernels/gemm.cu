// W4A16 GEMM: y = x W^T (+ bias), float32 accumulation in the canonical order of mma.cuh, for one weight matrix, for
// several in one launch, and for rows routed to experts.
//
//   x      rows of K bfloat16 or half, 16-byte aligned     W      (P, N, K), P problems ("gemm": MXFP4; "dense": 16 bit)
//   bias   (P, N) float32 or null                          codes  (P, N, K/2) uint8, low nibble first
//   y      rows of N float32, or the type of x             scales (P, N, K/32) uint8
//   K a multiple of 32; any N and number of rows
//
// Which rows of x and y belong to a problem:
//   offsets null   problem p = blockIdx.z has M rows: y's p M .. p M + M - 1, x's p x_step .. (x_step 0: x is shared)
//   offsets (P+1)  problem p has the entries[offsets[p] .. offsets[p + 1]); entry e reads x's row e / fan, writes y's e
//
// "dense" weights (P, N, K) have the type of x and are the operand itself: decoded weights for bfloat16; for half the
// values of the bare codes, with their scales beside them, or any half matrix with scales null.
//
// There are several paths with the same bits. Here (gemm_few.cuh, gemm_narrow.cuh, gemm_tile.cuh):
//   small    up to 8 rows: a block owns 16 features, its 8 warps share K
//   deep     the same with 16 warps, where features are few
//   narrow   many rows of "dense" with few features
//   tile     many rows of "dense"
// and for MXFP4 with these arguments gemm_thin_*.cu, up to 32 rows a block, and gemm_wide_*.cu, Hopper's for more.
#include "gemm_few.cuh"
#include "gemm_narrow.cuh"
#include "gemm_tile.cuh"

using Bytes = const std::uint8_t*;

extern "C" __global__ void __launch_bounds__(256, 4)
    gemm_small_bf16(void* y, const __nv_bfloat16* x, Bytes codes, Bytes scales, const float* bias, const int* offsets,
                    const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_few<__nv_bfloat16, Packed<__nv_bfloat16>, 8>({y, bias, N, form, alpha, limit}, x,
                                                                      Packed<__nv_bfloat16>{codes, scales, K},
                                                                      {offsets, entries, problems, M, x_step, fan});
}
extern "C" __global__ void __launch_bounds__(256, 4)
    gemm_small_fp16(void* y, const __half* x, Bytes codes, Bytes scales, const float* bias, const int* offsets,
                    const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_few<__half, Packed<__half>, 8>({y, bias, N, form, alpha, limit}, x, Packed<__half>{codes, scales, K},
                                                        {offsets, entries, problems, M, x_step, fan});
}
extern "C" __global__ void __launch_bounds__(512, 2)
    gemm_deep_bf16(void* y, const __nv_bfloat16* x, Bytes codes, Bytes scales, const float* bias, const int* offsets,
                   const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_few<__nv_bfloat16, Packed<__nv_bfloat16>, 16>({y, bias, N, form, alpha, limit}, x,
                                                                       Packed<__nv_bfloat16>{codes, scales, K},
                                                                       {offsets, entries, problems, M, x_step, fan});
}
extern "C" __global__ void __launch_bounds__(512, 2)
    gemm_deep_fp16(void* y, const __half* x, Bytes codes, Bytes scales, const float* bias, const int* offsets,
                   const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_few<__half, Packed<__half>, 16>({y, bias, N, form, alpha, limit}, x,
                                                         Packed<__half>{codes, scales, K},
                                                         {offsets, entries, problems, M, x_step, fan});
}
extern "C" __global__ void __launch_bounds__(256)
    dense_small_bf16(void* y, const __nv_bfloat16* x, const __nv_bfloat16* w, Bytes scales, const float* bias,
                     const int* offsets, const int* entries, int problems, int M, int x_step, int fan, int N, int K,
                     int form, float alpha, float limit) {
    multiply_few<__nv_bfloat16, Dense<__nv_bfloat16>, 8>({y, bias, N, form, alpha, limit}, x,
                                                                     Dense<__nv_bfloat16>{w, scales, K},
                                                                     {offsets, entries, problems, M, x_step, fan});
}
extern "C" __global__ void __launch_bounds__(256)
    dense_small_fp16(void* y, const __half* x, const __half* w, Bytes scales, const float* bias, const int* offsets,
                     const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_few<__half, Dense<__half>, 8>({y, bias, N, form, alpha, limit}, x, Dense<__half>{w, scales, K},
                                                       {offsets, entries, problems, M, x_step, fan});
}
extern "C" __global__ void __launch_bounds__(NARROW_THREADS)
    dense_narrow_bf16(void* y, const __nv_bfloat16* x, const __nv_bfloat16* w, Bytes scales, const float* bias,
                      const int* offsets, const int* entries, int problems, int M, int x_step, int fan, int N, int K,
                      int form, float alpha, float limit) {
    multiply_narrow<__nv_bfloat16>({y, bias, N, form, alpha, limit}, x, Dense<__nv_bfloat16>{w, scales, K},
                                   {offsets, entries, problems, M, x_step, fan});
}
extern "C" __global__ void __launch_bounds__(NARROW_THREADS)
    dense_narrow_fp16(void* y, const __half* x, const __half* w, Bytes scales, const float* bias, const int* offsets,
                      const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_narrow<__half>({y, bias, N, form, alpha, limit}, x, Dense<__half>{w, scales, K},
                            {offsets, entries, problems, M, x_step, fan});
}
extern "C" __global__ void __launch_bounds__(TILE_THREADS)
    dense_tile_bf16(void* y, const __nv_bfloat16* x, const __nv_bfloat16* w, Bytes scales, const float* bias,
                    const int* offsets, const int* entries, int problems, int M, int x_step, int fan, int N, int K,
                    int form, float alpha, float limit) {
    multiply_tile<__nv_bfloat16>({y, bias, N, form, alpha, limit}, x, Dense<__nv_bfloat16>{w, scales, K},
                                 {offsets, entries, problems, M, x_step, fan});
}
extern "C" __global__ void __launch_bounds__(TILE_THREADS)
    dense_tile_fp16(void* y, const __half* x, const __half* w, Bytes scales, const float* bias, const int* offsets,
                    const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_tile<__half>({y, bias, N, form, alpha, limit}, x, Dense<__half>{w, scales, K},
                          {offsets, entries, problems, M, x_step, fan});
}
