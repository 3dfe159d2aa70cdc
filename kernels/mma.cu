// The tensor core itself: D = C + A B^T over an unbroken chain of steps of 16, for probing its arithmetic.
//
//   a  (P, 16, K) bf16 or fp16     b  (P, 8, K)     c, d  (P, 16, 8) float32     K a multiple of 16
//
// One warp computes one of the P problems.
#include "mma.cuh"

template <class T>
__device__ inline void mma(float* __restrict__ d, const T* __restrict__ a, const T* __restrict__ b,
                           const float* __restrict__ c, int K) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    const long long problem = blockIdx.x;
    const T* rows = a + problem * 16 * K;
    const T* columns = b + problem * 8 * K;
    const long long first = problem * 128 + g * 8 + 2 * t;  // of the fragment's four results

    float sum[1][1][4] = {{{c[first], c[first + 1], c[first + 64], c[first + 65]}}};
    for (int k = 0; k < K; k += MMA_K) {
        const auto pair = [&](const T* row, int at) { return *reinterpret_cast<const std::uint32_t*>(row + k + at); };
        const std::uint32_t x[1][4] = {{pair(rows + g * K, 2 * t), pair(rows + (g + 8) * K, 2 * t),
                                        pair(rows + g * K, 2 * t + 8), pair(rows + (g + 8) * K, 2 * t + 8)}};
        const std::uint32_t y[1][2] = {{pair(columns + g * K, 2 * t), pair(columns + g * K, 2 * t + 8)}};
        mma_step(Fragments<T, 1, 1>{sum, x, y});
    }
    d[first] = sum[0][0][0];
    d[first + 1] = sum[0][0][1];
    d[first + 64] = sum[0][0][2];
    d[first + 65] = sum[0][0][3];
}

extern "C" __global__ void mma_bf16(float* d, const __nv_bfloat16* a, const __nv_bfloat16* b, const float* c, int K) {
    mma(d, a, b, c, K);
}
extern "C" __global__ void mma_fp16(float* d, const __half* a, const __half* b, const float* c, int K) {
    mma(d, a, b, c, K);
}
