// The functions of math.cuh, element by element: the door through which they are measured.
//
//   y[i] = f(x[i])     x, y  count float32
//
// One thread an element.
#include "math.cuh"

template <class Function>
__device__ inline void each(float* y, const float* x, long long count, Function function) {
    const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) y[i] = function(x[i]);
}

extern "C" __global__ void elementary_exp(float* y, const float* x, long long count) { each(y, x, count, exp32); }
extern "C" __global__ void elementary_exp2(float* y, const float* x, long long count) { each(y, x, count, exp2_32); }
extern "C" __global__ void elementary_sigmoid(float* y, const float* x, long long count) { each(y, x, count, sigmoid32); }
extern "C" __global__ void elementary_tanh(float* y, const float* x, long long count) { each(y, x, count, tanh32); }
extern "C" __global__ void elementary_erf(float* y, const float* x, long long count) { each(y, x, count, erf32); }
extern "C" __global__ void elementary_rsqrt(float* y, const float* x, long long count) { each(y, x, count, rsqrt32); }
