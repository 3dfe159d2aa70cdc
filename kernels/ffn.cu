// What a feed-forward layer does between and after its projections (the projections are gemm.cu's).
//
//   activate        y = f(x)                            x, y  count elements T, f by kind: 0 gelu, 1 gelu_tanh
//   gated           y = silu(gate) up                   gate, up, y  count elements T
//   swiglu          y = swiglu_limited(gate, up)        x (M, 2 I), y (M, I) T; gate and up alternate (interleaved)
//                                                       or are the first and the last I columns
//   add_residual    y = residual + update               residual, y  count elements T; update  count float32
//
// T is bfloat16 or half, for swiglu float32 too. Everything is computed in float32, one rounding an operation
// (activation.cuh), and rounded to T once. One thread an element, in swiglu four of them; there are no sums.
#include "activation.cuh"

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

constexpr int SWIGLU_WIDTH = 4;  // neighbouring elements of a thread

// N neighbouring elements, as wide as can be read at once.
template <class T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Run {
    T of[N];
};

// The first `own` of a thread's elements of y.
__device__ inline void write_swiglu(float* y, const float (&gate)[SWIGLU_WIDTH], const float (&up)[SWIGLU_WIDTH], int own, float alpha,
                                    float limit) {
#pragma unroll
    for (int i = 0; i < SWIGLU_WIDTH; ++i)
        if (i < own) y[i] = swiglu_limited(gate[i], up[i], alpha, limit);
}
template <class T>
__device__ inline void write_swiglu(T* y, const float (&gate)[SWIGLU_WIDTH], const float (&up)[SWIGLU_WIDTH], int own, float alpha,
                                    float limit) {
    using Own = Run<T, SWIGLU_WIDTH>;
    union {
        std::uint32_t pairs[SWIGLU_WIDTH / 2];
        Own all;
    } made;
    swiglu_pairs<T>(made.pairs, gate, up, alpha, limit);
    if (own == SWIGLU_WIDTH) {
        *reinterpret_cast<Own*>(y) = made.all;
        return;
    }
#pragma unroll
    for (int i = 0; i < SWIGLU_WIDTH; ++i)
        if (i < own) y[i] = made.all.of[i];
}

template <class T>
__device__ inline void swiglu_rows(T* y, const T* x, long long count, int I, int interleaved, float alpha, float limit) {
    const long long first = thread() * SWIGLU_WIDTH;
    if (first >= count) return;
    const int own = static_cast<int>(min(count - first, static_cast<long long>(SWIGLU_WIDTH)));
    float gate[SWIGLU_WIDTH] = {}, up[SWIGLU_WIDTH] = {};
    if (interleaved) {  // without the row, which would be a division
        const T* const from = x + 2 * first;
        if (own == SWIGLU_WIDTH) {
            const auto both = *reinterpret_cast<const Run<T, 2 * SWIGLU_WIDTH>*>(from);
#pragma unroll
            for (int i = 0; i < SWIGLU_WIDTH; ++i) gate[i] = widen(both.of[2 * i]), up[i] = widen(both.of[2 * i + 1]);
        } else {
#pragma unroll
            for (int i = 0; i < SWIGLU_WIDTH; ++i)
                if (i < own) gate[i] = widen(from[2 * i]), up[i] = widen(from[2 * i + 1]);
        }
    } else {
        const long long row = first / I;
        int column = static_cast<int>(first - row * I);
        const T* from = x + row * 2 * I;
        if (I % SWIGLU_WIDTH == 0) {
            const auto gates = *reinterpret_cast<const Run<T, SWIGLU_WIDTH>*>(from + column);
            const auto ups = *reinterpret_cast<const Run<T, SWIGLU_WIDTH>*>(from + I + column);
#pragma unroll
            for (int i = 0; i < SWIGLU_WIDTH; ++i) gate[i] = widen(gates.of[i]), up[i] = widen(ups.of[i]);
        } else {
#pragma unroll
            for (int i = 0; i < SWIGLU_WIDTH; ++i) {
                if (i < own) gate[i] = widen(from[column]), up[i] = widen(from[I + column]);
                if (++column == I) column = 0, from += 2 * I;
            }
        }
    }
    write_swiglu(y + first, gate, up, own, alpha, limit);
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
