// Embedding: rows of an MXFP4 table by token id, of the same table dequantised beforehand, and position embeddings.
//
//   lookup     y[t] = table[ids[t]]                         y (T, K)
//   position   y[r] = x[r] + table[p], p = start + offsets[r / span] + r % span      x, y (R, K)
//
//   packed table  codes (V, Kp/2) uint8, low nibble first, scales (V, Kp/32) uint8; Kp = K rounded up to 32
//   dense table   (V, K) of y's type, 16-byte aligned
//   ids, offsets  int32, or int64 where `wide`; offsets may be null (all 0)
//
// A decoded element is rounded once to y's type; a sum is one float32 addition, then that rounding. The row of
// `padding` (-1: none) is +0. An id or a position that the table does not have gives NaN; nothing is read for it.
// One thread writes 8 elements of a row, with 16-byte loads and stores where the rows allow it.
#include "convert.cuh"
#include "mxfp4.cuh"

constexpr int PER_THREAD = 8;

// A row's elements k .. k + 7 between memory and registers; past the end of the row nothing is touched.
template <class T> __device__ inline void load(float* to, const T* row, int k, int K) {
    alignas(16) T values[PER_THREAD];
    if (K % PER_THREAD == 0) {  // then every group is whole and 16-byte aligned
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(values) / 16); ++i)
            reinterpret_cast<uint4*>(values)[i] = reinterpret_cast<const uint4*>(row + k)[i];
    } else {
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i) values[i] = row[min(k + i, K - 1)];
    }
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) to[i] = widen(values[i]);
}

template <class T> __device__ inline void store(T* row, int k, int K, const float* from) {
    alignas(16) T values[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) narrow(&values[i], from[i]);
    if (K % PER_THREAD == 0) {
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(values) / 16); ++i)
            reinterpret_cast<uint4*>(row + k)[i] = reinterpret_cast<const uint4*>(values)[i];
    } else {
        for (int i = 0; i < min(PER_THREAD, K - k); ++i) row[k + i] = values[i];
    }
}

struct Packed {
    const std::uint8_t *codes, *scales;

    __device__ void read(float* to, long long row, int k, int K) const {
        const int blocks = (K + MX_BLOCK - 1) / MX_BLOCK;
        const std::uint32_t packed = *reinterpret_cast<const std::uint32_t*>(codes + row * blocks * (MX_BLOCK / 2) + k / 2);
        const float scale = decode_scale(scales[row * blocks + k / MX_BLOCK]);
#pragma unroll
        for (int i = 0; i < PER_THREAD / 2; ++i) {
            const std::uint32_t pair = scale_pair(decode_byte<__nv_bfloat16>((packed >> (8 * i)) & 0xff), scale);
            to[2 * i] = __uint_as_float(pair << 16);
            to[2 * i + 1] = __uint_as_float(pair & 0xffff0000u);
        }
    }
};

template <class T> struct Dense {
    const T* table;

    __device__ void read(float* to, long long row, int k, int K) const { load(to, table + row * K, k, K); }
};

struct Integers {
    const void* values;
    int wide;

    __device__ long long operator[](long long i) const {
        return wide ? static_cast<const long long*>(values)[i] : static_cast<const int*>(values)[i];
    }
};

// The row and first element of this thread's group; false past the last one.
__device__ inline bool locate(long long& row, int& k, long long rows, int K) {
    const int groups = (K + PER_THREAD - 1) / PER_THREAD;
    const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    row = thread / groups;
    k = static_cast<int>(thread % groups) * PER_THREAD;
    return row < rows;
}

__device__ inline void fill(float* values, float value) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) values[i] = value;
}

template <class T, class Table>
__device__ inline void lookup(T* __restrict__ y, const Table& table, Integers ids, long long tokens, long long V, int K,
                              long long padding) {
    long long token;
    int k;
    if (!locate(token, k, tokens, K)) return;
    const long long id = ids[token];
    float values[PER_THREAD];
    if (id < 0 || id >= V) fill(values, __uint_as_float(0x7fffffffu));
    else if (id == padding) fill(values, 0.0f);
    else table.read(values, id, k, K);
    store(y + token * K, k, K, values);
}

template <class T, class Table>
__device__ inline void add_position(T* __restrict__ y, const T* __restrict__ x, const Table& table, Integers offsets,
                                    long long start, long long rows, int span, long long P, int K) {
    long long row;
    int k;
    if (!locate(row, k, rows, K)) return;
    const long long first = start + (offsets.values == nullptr ? 0 : offsets[row / span]);
    const long long position = first + row % span;
    float values[PER_THREAD], added[PER_THREAD];
    load(values, x + row * K, k, K);
    if (position < 0 || position >= P) fill(added, __uint_as_float(0x7fffffffu));
    else table.read(added, position, k, K);
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) values[i] = __fadd_rn(values[i], added[i]);
    store(y + row * K, k, K, values);
}

// ---------------------------------------------------------------------------------------------- entry points

using Bytes = const std::uint8_t*;

extern "C" __global__ void embedding_packed_fp32(float* y, Bytes codes, Bytes scales, const void* ids, int wide,
                                                 long long tokens, long long V, int K, long long padding) {
    lookup(y, Packed{codes, scales}, {ids, wide}, tokens, V, K, padding);
}
extern "C" __global__ void embedding_packed_bf16(__nv_bfloat16* y, Bytes codes, Bytes scales, const void* ids, int wide,
                                                 long long tokens, long long V, int K, long long padding) {
    lookup(y, Packed{codes, scales}, {ids, wide}, tokens, V, K, padding);
}
extern "C" __global__ void embedding_packed_fp16(__half* y, Bytes codes, Bytes scales, const void* ids, int wide,
                                                 long long tokens, long long V, int K, long long padding) {
    lookup(y, Packed{codes, scales}, {ids, wide}, tokens, V, K, padding);
}
extern "C" __global__ void embedding_dense_fp32(float* y, const float* table, const void* ids, int wide, long long tokens,
                                                long long V, int K, long long padding) {
    lookup(y, Dense<float>{table}, {ids, wide}, tokens, V, K, padding);
}
extern "C" __global__ void embedding_dense_bf16(__nv_bfloat16* y, const __nv_bfloat16* table, const void* ids, int wide,
                                                long long tokens, long long V, int K, long long padding) {
    lookup(y, Dense<__nv_bfloat16>{table}, {ids, wide}, tokens, V, K, padding);
}
extern "C" __global__ void embedding_dense_fp16(__half* y, const __half* table, const void* ids, int wide, long long tokens,
                                                long long V, int K, long long padding) {
    lookup(y, Dense<__half>{table}, {ids, wide}, tokens, V, K, padding);
}
extern "C" __global__ void position_packed_fp32(float* y, const float* x, Bytes codes, Bytes scales, const void* offsets,
                                                int wide, long long start, long long rows, int span, long long P, int K) {
    add_position(y, x, Packed{codes, scales}, {offsets, wide}, start, rows, span, P, K);
}
extern "C" __global__ void position_packed_bf16(__nv_bfloat16* y, const __nv_bfloat16* x, Bytes codes, Bytes scales,
                                                const void* offsets, int wide, long long start, long long rows, int span,
                                                long long P, int K) {
    add_position(y, x, Packed{codes, scales}, {offsets, wide}, start, rows, span, P, K);
}
extern "C" __global__ void position_packed_fp16(__half* y, const __half* x, Bytes codes, Bytes scales, const void* offsets,
                                                int wide, long long start, long long rows, int span, long long P, int K) {
    add_position(y, x, Packed{codes, scales}, {offsets, wide}, start, rows, span, P, K);
}
extern "C" __global__ void position_dense_fp32(float* y, const float* x, const float* table, const void* offsets, int wide,
                                               long long start, long long rows, int span, long long P, int K) {
    add_position(y, x, Dense<float>{table}, {offsets, wide}, start, rows, span, P, K);
}
extern "C" __global__ void position_dense_bf16(__nv_bfloat16* y, const __nv_bfloat16* x, const __nv_bfloat16* table,
                                               const void* offsets, int wide, long long start, long long rows, int span,
                                               long long P, int K) {
    add_position(y, x, Dense<__nv_bfloat16>{table}, {offsets, wide}, start, rows, span, P, K);
}
extern "C" __global__ void position_dense_fp16(__half* y, const __half* x, const __half* table, const void* offsets, int wide,
                                               long long start, long long rows, int span, long long P, int K) {
    add_position(y, x, Dense<__half>{table}, {offsets, wide}, start, rows, span, P, K);
}
