// The GEMM of gemm.cu for up to 32 rows, or 64 (gemm_thin.cuh), bfloat16, with its arguments and bits.
// A name tells the features and the rows that a block owns; <name>_shared is the shared memory that a launch must bring.
#include "gemm_thin.cuh"

using Bytes = const std::uint8_t*;
extern "C" __device__ const unsigned gemm_thin_64x8_bf16_shared = thin_shared<__nv_bfloat16, 8, 4, 1, 3>();
extern "C" __global__ void __launch_bounds__(128, 4)
    gemm_thin_64x8_bf16(void* y, const __nv_bfloat16* x, Bytes codes, Bytes scales, const float* bias, const int* offsets,
    const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_thin<__nv_bfloat16, 8, 4, 1, 3>({y, bias, N, form, alpha, limit}, x, {codes, scales, K},
                                    {offsets, entries, problems, M, x_step, fan});
}
extern "C" __device__ const unsigned gemm_thin_64x16_bf16_shared = thin_shared<__nv_bfloat16, 16, 4, 1, 3>();
extern "C" __global__ void __launch_bounds__(128, 4)
    gemm_thin_64x16_bf16(void* y, const __nv_bfloat16* x, Bytes codes, Bytes scales, const float* bias, const int* offsets,
    const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_thin<__nv_bfloat16, 16, 4, 1, 3>({y, bias, N, form, alpha, limit}, x, {codes, scales, K},
                                    {offsets, entries, problems, M, x_step, fan});
}
extern "C" __device__ const unsigned gemm_thin_64x32_bf16_shared = thin_shared<__nv_bfloat16, 32, 4, 1, 3>();
extern "C" __global__ void __launch_bounds__(128, 3)
    gemm_thin_64x32_bf16(void* y, const __nv_bfloat16* x, Bytes codes, Bytes scales, const float* bias, const int* offsets,
    const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_thin<__nv_bfloat16, 32, 4, 1, 3>({y, bias, N, form, alpha, limit}, x, {codes, scales, K},
                                    {offsets, entries, problems, M, x_step, fan});
}
extern "C" __device__ const unsigned gemm_thin_32x16_bf16_shared = thin_shared<__nv_bfloat16, 16, 2, 4, 4>();
extern "C" __global__ void __launch_bounds__(256, 2)
    gemm_thin_32x16_bf16(void* y, const __nv_bfloat16* x, Bytes codes, Bytes scales, const float* bias, const int* offsets,
    const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_thin<__nv_bfloat16, 16, 2, 4, 4>({y, bias, N, form, alpha, limit}, x, {codes, scales, K},
                                    {offsets, entries, problems, M, x_step, fan});
}
extern "C" __device__ const unsigned gemm_thin_32x32_bf16_shared = thin_shared<__nv_bfloat16, 32, 2, 4, 2>();
extern "C" __global__ void __launch_bounds__(256, 2)
    gemm_thin_32x32_bf16(void* y, const __nv_bfloat16* x, Bytes codes, Bytes scales, const float* bias, const int* offsets,
    const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_thin<__nv_bfloat16, 32, 2, 4, 2>({y, bias, N, form, alpha, limit}, x, {codes, scales, K},
                                    {offsets, entries, problems, M, x_step, fan});
}
extern "C" __device__ const unsigned gemm_thin_64x64_bf16_shared = thin_shared<__nv_bfloat16, 64, 4, 1, 3>();
extern "C" __global__ void __launch_bounds__(128, 3)
    gemm_thin_64x64_bf16(void* y, const __nv_bfloat16* x, Bytes codes, Bytes scales, const float* bias, const int* offsets,
    const int* entries, int problems, int M, int x_step, int fan, int N, int K, int form, float alpha, float limit) {
    multiply_thin<__nv_bfloat16, 64, 4, 1, 3>({y, bias, N, form, alpha, limit}, x, {codes, scales, K},
                                    {offsets, entries, problems, M, x_step, fan});
}
