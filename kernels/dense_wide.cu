// Many rows of unquantised weights on Hopper (dense_wide.cuh), with the arguments and bits of gemm.cu's "dense" paths; the copy
// engine is told of x and w.
// A name tells the features and the rows that a block owns; <name>_shared is the shared memory that a launch must bring.
#include "dense_wide.cuh"

using Bytes = const std::uint8_t*;
extern "C" __device__ const unsigned dense_wide_256x128_bf16_shared = sizeof(DenseShared<2, 128>);
extern "C" __global__ void CLUSTER_OF(2) __launch_bounds__(DENSE_THREADS, 1)
    dense_wide_256x128_bf16(void* y, const __nv_bfloat16* x, const __nv_bfloat16* w, Bytes scales, const float* bias, const int* offsets,
    const __grid_constant__ TensorMap of_x, const __grid_constant__ TensorMap of_w, const int* entries, int problems, int M, int x_step,
    int fan, int N, int K, int form, float alpha, float limit) {
    multiply_dense_wide<__nv_bfloat16, 2, 128, 2>({y, bias, N, form, alpha, limit}, {w, scales, K},
                                    {offsets, entries, problems, M, x_step, fan}, of_x, of_w);
}
extern "C" __device__ const unsigned dense_wide_128x128_bf16_shared = sizeof(DenseShared<1, 128>);
extern "C" __global__ void CLUSTER_OF(2) __launch_bounds__(DENSE_THREADS, 1)
    dense_wide_128x128_bf16(void* y, const __nv_bfloat16* x, const __nv_bfloat16* w, Bytes scales, const float* bias, const int* offsets,
    const __grid_constant__ TensorMap of_x, const __grid_constant__ TensorMap of_w, const int* entries, int problems, int M, int x_step,
    int fan, int N, int K, int form, float alpha, float limit) {
    multiply_dense_wide<__nv_bfloat16, 1, 128, 2>({y, bias, N, form, alpha, limit}, {w, scales, K},
                                    {offsets, entries, problems, M, x_step, fan}, of_x, of_w);
}
extern "C" __device__ const unsigned dense_wide_128x64_bf16_shared = sizeof(DenseShared<1, 64>);
extern "C" __global__ void __launch_bounds__(DENSE_THREADS, 1)
    dense_wide_128x64_bf16(void* y, const __nv_bfloat16* x, const __nv_bfloat16* w, Bytes scales, const float* bias, const int* offsets,
    const __grid_constant__ TensorMap of_x, const __grid_constant__ TensorMap of_w, const int* entries, int problems, int M, int x_step,
    int fan, int N, int K, int form, float alpha, float limit) {
    multiply_dense_wide<__nv_bfloat16, 1, 64, 1>({y, bias, N, form, alpha, limit}, {w, scales, K},
                                    {offsets, entries, problems, M, x_step, fan}, of_x, of_w);
}
extern "C" __device__ const unsigned dense_wide_128x128_fp16_shared = sizeof(DenseShared<1, 128>);
extern "C" __global__ void CLUSTER_OF(2) __launch_bounds__(DENSE_THREADS, 1)
    dense_wide_128x128_fp16(void* y, const __half* x, const __half* w, Bytes scales, const float* bias, const int* offsets,
    const __grid_constant__ TensorMap of_x, const __grid_constant__ TensorMap of_w, const int* entries, int problems, int M, int x_step,
    int fan, int N, int K, int form, float alpha, float limit) {
    multiply_dense_wide<__half, 1, 128, 2>({y, bias, N, form, alpha, limit}, {w, scales, K},
                                    {offsets, entries, problems, M, x_step, fan}, of_x, of_w);
}
extern "C" __device__ const unsigned dense_wide_128x64_fp16_shared = sizeof(DenseShared<1, 64>);
extern "C" __global__ void __launch_bounds__(DENSE_THREADS, 1)
    dense_wide_128x64_fp16(void* y, const __half* x, const __half* w, Bytes scales, const float* bias, const int* offsets,
    const __grid_constant__ TensorMap of_x, const __grid_constant__ TensorMap of_w, const int* entries, int problems, int M, int x_step,
    int fan, int N, int K, int form, float alpha, float limit) {
    multiply_dense_wide<__half, 1, 64, 1>({y, bias, N, form, alpha, limit}, {w, scales, K},
                                    {offsets, entries, problems, M, x_step, fan}, of_x, of_w);
}
