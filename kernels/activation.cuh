// Activations of feed-forward layers, in float32, one rounding an operation; NaN stays NaN.
//
//   gelu             x (1 + erf(x / sqrt(2))) / 2
//   gelu_tanh        x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
//   silu             x / (1 + e^-x)
//   swiglu           silu(gate) up                                                        Llama
//   swiglu_limited   g / (1 + e^(-alpha g)) (u + 1), g = min(gate, limit),                gpt-oss
//                    u = up held between -limit and limit
#pragma once

#include "math.cuh"

__device__ inline float gelu(float x) {
    const float erf = erf32(__fmul_rn(x, 0.707106781f));
    return __fmul_rn(__fmul_rn(0.5f, x), __fadd_rn(1.0f, erf));
}

__device__ inline float gelu_tanh(float x) {
    const float cubic = __fmul_rn(x, __fmaf_rn(__fmul_rn(0.044715f, x), x, 1.0f));
    const float tanh = tanh32(__fmul_rn(0.797884561f, cubic));
    return __fmul_rn(__fmul_rn(0.5f, x), __fadd_rn(1.0f, tanh));
}

__device__ inline float silu(float x) { return __fmul_rn(x, sigmoid32(x)); }

__device__ inline float swiglu(float gate, float up) { return __fmul_rn(silu(gate), up); }

// The smaller and the larger one, where a NaN x stays.
__device__ inline float at_most(float x, float limit) { return x > limit ? limit : x; }
__device__ inline float at_least(float x, float limit) { return x < limit ? limit : x; }

__device__ inline float swiglu_limited(float gate, float up, float alpha, float limit) {
    const float g = at_most(gate, limit), u = at_least(at_most(up, limit), -limit);
    const float glu = __fmul_rn(g, sigmoid32(__fmul_rn(alpha, g)));
    return __fmul_rn(__fadd_rn(u, 1.0f), glu);
}
