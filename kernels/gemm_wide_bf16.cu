// The GEMM of gemm.cu for many rows on Hopper (gemm_wide.cuh, gemm_split.cuh), bfloat16, with its arguments and bits.
// A name tells the features and the rows that a block owns; <name>_shared is the shared memory that a launch must bring.
#include "gemm_split.cuh"
#include "gemm_wide.cuh"

using Bytes = const std::uint8_t*;
extern "C" __device__ const unsigned gemm_wide_256x128_bf16_shared = sizeof(WideShared<2, 128>);
extern "C" __global__ void __launch_bounds__(WIDE_THREADS, 1)
    gemm_wide_256x128_bf16(void* y, const __nv_bfloat16* x, Bytes codes, Bytes scales, const float* bias, const int* offsets,
    const __grid_constant__ TensorMap map, const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_wide<__nv_bfloat16, 2, 128>({y, bias, N, form, alpha, limit}, x, map, {codes, scales, K},
                                    {offsets, entries, problems, M, x_step, fan});
}
extern "C" __device__ const unsigned gemm_wide_128x128_bf16_shared = sizeof(WideShared<1, 128>);
extern "C" __global__ void __launch_bounds__(WIDE_THREADS, 1)
    gemm_wide_128x128_bf16(void* y, const __nv_bfloat16* x, Bytes codes, Bytes scales, const float* bias, const int* offsets,
    const __grid_constant__ TensorMap map, const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_wide<__nv_bfloat16, 1, 128>({y, bias, N, form, alpha, limit}, x, map, {codes, scales, K},
                                    {offsets, entries, problems, M, x_step, fan});
}
extern "C" __device__ const unsigned gemm_wide_128x64_bf16_shared = sizeof(WideShared<1, 64>);
extern "C" __global__ void __launch_bounds__(WIDE_THREADS, 1)
    gemm_wide_128x64_bf16(void* y, const __nv_bfloat16* x, Bytes codes, Bytes scales, const float* bias, const int* offsets,
    const __grid_constant__ TensorMap map, const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_wide<__nv_bfloat16, 1, 64>({y, bias, N, form, alpha, limit}, x, map, {codes, scales, K},
                                    {offsets, entries, problems, M, x_step, fan});
}
extern "C" __device__ const unsigned gemm_wide_64x64_bf16_shared = sizeof(WideShared<1, 64, true>);
extern "C" __global__ void __launch_bounds__(WIDE_THREADS, 1)
    gemm_wide_64x64_bf16(void* y, const __nv_bfloat16* x, Bytes codes, Bytes scales, const float* bias, const int* offsets,
    const __grid_constant__ TensorMap map, const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_wide<__nv_bfloat16, 1, 64, true>({y, bias, N, form, alpha, limit}, x, map, {codes, scales, K},
                                    {offsets, entries, problems, M, x_step, fan});
}
extern "C" __device__ const unsigned gemm_split_64x32_bf16_shared = sizeof(SplitShared<32>);
extern "C" __global__ void __launch_bounds__(SPLIT_THREADS, 1)
    gemm_split_64x32_bf16(void* y, const __nv_bfloat16* x, Bytes codes, Bytes scales, const float* bias, const int* offsets,
    const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_split<__nv_bfloat16, 32>({y, bias, N, form, alpha, limit}, x, {codes, scales, K},
                                    {offsets, entries, problems, M, x_step, fan});
}
