// RMSNorm and LayerNorm of rows, with the residual added first if there is one.
//
//   s = x + residual, rounded to T and kept in `sum`; s = x where residual and sum are null
//   rms_norm     y = s / sqrt(mean(s^2) + eps) weight
//   layer_norm   y = (s - mean(s)) / sqrt(mean((s - mean(s))^2) + eps) weight + bias
//
//   x, residual, sum, y  (M, K) T, bfloat16 or half     weight, bias  (K) float32 (wide) or T, bias may be null
//
// One block a row: a warp ("short") where K <= 256, else 256 threads. Everything between s and y is float32, and y is
// rounded once. ORDER OF SUMS: thread t of B adds the elements t, t + B, .. in that order, then block_reduce; so a
// row's bits depend on K alone. The variance is taken in a second pass around the mean, so that a mean far from zero
// does not cancel it away.
#include "convert.cuh"
#include "math.cuh"
#include "warp.cuh"

constexpr int LONG = 256, SHORT = WARP;

template <class T> struct Row {
    const T* s;
    T* y;
    int K, wide;

    __device__ float load(const void* vector, int k) const {
        return wide ? static_cast<const float*>(vector)[k] : widen(static_cast<const T*>(vector)[k]);
    }
};

// This block's row, after the addition; each thread reads later only what it has written here.
template <int THREADS, class T>
__device__ inline Row<T> add_residual(T* y, T* sum, const T* x, const T* residual, int K, int wide) {
    const long long first = static_cast<long long>(blockIdx.x) * K;
    if (residual != nullptr) {
        for (int k = threadIdx.x; k < K; k += THREADS)
            narrow(&sum[first + k], __fadd_rn(widen(x[first + k]), widen(residual[first + k])));
    }
    return {(residual != nullptr ? sum : x) + first, y + first, K, wide};
}

// The mean over the row of what `term` makes of an element. Each `term` has scratch of its own.
template <int THREADS, class T, class Term> __device__ inline float mean(const Row<T>& row, Term term) {
    __shared__ float scratch[THREADS / WARP];
    float total = 0.0f;
    for (int k = threadIdx.x; k < row.K; k += THREADS) total = __fadd_rn(total, term(widen(row.s[k])));
    return __fdiv_rn(block_reduce<THREADS>(total, Sum(), scratch), static_cast<float>(row.K));
}

template <int THREADS, class T>
__device__ inline void rms_norm(T* y, T* sum, const T* x, const T* residual, const void* weight, int K, int wide,
                                float eps) {
    const Row<T> row = add_residual<THREADS>(y, sum, x, residual, K, wide);
    const float square = mean<THREADS>(row, [](float s) { return __fmul_rn(s, s); });
    const float inverse = rsqrt32(__fadd_rn(square, eps));
    for (int k = threadIdx.x; k < K; k += THREADS)
        narrow(&row.y[k], __fmul_rn(__fmul_rn(widen(row.s[k]), inverse), row.load(weight, k)));
}

template <int THREADS, class T>
__device__ inline void layer_norm(T* y, T* sum, const T* x, const T* residual, const void* weight, const void* bias,
                                  int K, int wide, float eps) {
    const Row<T> row = add_residual<THREADS>(y, sum, x, residual, K, wide);
    const float centre = mean<THREADS>(row, [](float s) { return s; });
    const float variance = mean<THREADS>(row, [centre](float s) {
        const float distance = __fsub_rn(s, centre);
        return __fmul_rn(distance, distance);
    });
    const float inverse = rsqrt32(__fadd_rn(variance, eps));
    for (int k = threadIdx.x; k < K; k += THREADS) {
        const float normal = __fmul_rn(__fsub_rn(widen(row.s[k]), centre), inverse);
        const float scaled = __fmul_rn(normal, row.load(weight, k));
        narrow(&row.y[k], bias == nullptr ? scaled : __fadd_rn(scaled, row.load(bias, k)));
    }
}

extern "C" __global__ void __launch_bounds__(LONG)
    rms_norm_bf16(__nv_bfloat16* y, __nv_bfloat16* sum, const __nv_bfloat16* x, const __nv_bfloat16* residual,
        const void* weight, int K, int wide, float eps) {
    rms_norm<LONG>(y, sum, x, residual, weight, K, wide, eps);
}
extern "C" __global__ void __launch_bounds__(SHORT)
    rms_norm_short_bf16(__nv_bfloat16* y, __nv_bfloat16* sum, const __nv_bfloat16* x, const __nv_bfloat16* residual,
        const void* weight, int K, int wide, float eps) {
    rms_norm<SHORT>(y, sum, x, residual, weight, K, wide, eps);
}
extern "C" __global__ void __launch_bounds__(LONG)
    rms_norm_fp16(__half* y, __half* sum, const __half* x, const __half* residual,
        const void* weight, int K, int wide, float eps) {
    rms_norm<LONG>(y, sum, x, residual, weight, K, wide, eps);
}
extern "C" __global__ void __launch_bounds__(SHORT)
    rms_norm_short_fp16(__half* y, __half* sum, const __half* x, const __half* residual,
        const void* weight, int K, int wide, float eps) {
    rms_norm<SHORT>(y, sum, x, residual, weight, K, wide, eps);
}
extern "C" __global__ void __launch_bounds__(LONG)
    layer_norm_bf16(__nv_bfloat16* y, __nv_bfloat16* sum, const __nv_bfloat16* x, const __nv_bfloat16* residual,
        const void* weight, const void* bias, int K, int wide, float eps) {
    layer_norm<LONG>(y, sum, x, residual, weight, bias, K, wide, eps);
}
extern "C" __global__ void __launch_bounds__(SHORT)
    layer_norm_short_bf16(__nv_bfloat16* y, __nv_bfloat16* sum, const __nv_bfloat16* x, const __nv_bfloat16* residual,
        const void* weight, const void* bias, int K, int wide, float eps) {
    layer_norm<SHORT>(y, sum, x, residual, weight, bias, K, wide, eps);
}
extern "C" __global__ void __launch_bounds__(LONG)
    layer_norm_fp16(__half* y, __half* sum, const __half* x, const __half* residual,
        const void* weight, const void* bias, int K, int wide, float eps) {
    layer_norm<LONG>(y, sum, x, residual, weight, bias, K, wide, eps);
}
extern "C" __global__ void __launch_bounds__(SHORT)
    layer_norm_short_fp16(__half* y, __half* sum, const __half* x, const __half* residual,
        const void* weight, const void* bias, int K, int wide, float eps) {
    layer_norm<SHORT>(y, sum, x, residual, weight, bias, K, wide, eps);
}
