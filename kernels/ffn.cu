// What a feed-forward layer does between and after its projections (the projections are gemm.cu's).
//
//   activate        y = f(x)                            x, y  count elements T, f by kind: 0 gelu, 1 gelu_tanh
//   gated           y = silu(gate) up                   gate, up, y  count elements T
//   swiglu          y = swiglu_limited(gate, up)        x (M, 2 I), y (M, I) T; gate and up alternate (interleaved)
//                                                       or are the first and the last I columns
//   add_residual    y = residual + update               residual, y  count elements T; update  count float32
//
// T is bfloat16 or half, for swiglu float32 too. Everything is computed in float32, one rounding an operation
// (activation.cuh), and rounded to T once. One thread an element; there are no sums.
#include "activation.cuh"
#include "convert.cuh"

__device__ inline long long thread() { return static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; }

template <class T> __device__ inline void activate(T* y, const T* x, long long count, int kind) {
    const long long i = thread();
    if (i >= count) return;
    const float value = widen(x[i]);
    narrow(&y[i], kind == 0 ? gelu(value) : gelu_tanh(value));
}

template <class T> __device__ inline void gated(T* y, const T* gate, const T* up, long long count) {
    const long long i = thread();
    if (i < count) narrow(&y[i], swiglu(widen(gate[i]), widen(up[i])));
}

template <class T>
__device__ inline void swiglu_rows(T* y, const T* x, long long count, int I, int interleaved, float alpha, float limit) {
    const long long i = thread();
    if (i >= count) return;
    struct alignas(2 * sizeof(T)) Pair {
        T gate, up;
    } pair;
    if (interleaved) {  // without the row, which would be a division
        pair = reinterpret_cast<const Pair*>(x)[i];
    } else {
        const long long row = i / I, column = i % I;
        pair = {x[row * 2 * I + column], x[row * 2 * I + I + column]};
    }
    narrow(&y[i], swiglu_limited(widen(pair.gate), widen(pair.up), alpha, limit));
}

template <class T> __device__ inline void add_residual(T* y, const T* residual, const float* update, long long count) {
    const long long i = thread();
    if (i < count) narrow(&y[i], __fadd_rn(widen(residual[i]), update[i]));
}

extern "C" __global__ void activate_bf16(__nv_bfloat16* y, const __nv_bfloat16* x, long long count, int kind) {
    activate(y, x, count, kind);
}
extern "C" __global__ void activate_fp16(__half* y, const __half* x, long long count, int kind) {
    activate(y, x, count, kind);
}
extern "C" __global__ void gated_bf16(__nv_bfloat16* y, const __nv_bfloat16* gate, const __nv_bfloat16* up,
                                      long long count) {
    gated(y, gate, up, count);
}
extern "C" __global__ void gated_fp16(__half* y, const __half* gate, const __half* up, long long count) {
    gated(y, gate, up, count);
}
extern "C" __global__ void swiglu_fp32(float* y, const float* x, long long count, int I, int interleaved, float alpha,
                                       float limit) {
    swiglu_rows(y, x, count, I, interleaved, alpha, limit);
}
extern "C" __global__ void swiglu_bf16(__nv_bfloat16* y, const __nv_bfloat16* x, long long count, int I,
                                       int interleaved, float alpha, float limit) {
    swiglu_rows(y, x, count, I, interleaved, alpha, limit);
}
extern "C" __global__ void swiglu_fp16(__half* y, const __half* x, long long count, int I, int interleaved, float alpha,
                                       float limit) {
    swiglu_rows(y, x, count, I, interleaved, alpha, limit);
}
extern "C" __global__ void add_residual_bf16(__nv_bfloat16* y, const __nv_bfloat16* residual, const float* update,
                                             long long count) {
    add_residual(y, residual, update, count);
}
extern "C" __global__ void add_residual_fp16(__half* y, const __half* residual, const float* update, long long count) {
    add_residual(y, residual, update, count);
}
