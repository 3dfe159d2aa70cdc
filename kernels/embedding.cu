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
// A block does a row, a thread a group of neighbours and the groups a whole block of threads further on. On a GPU these are
// 8 elements, 16-byte loads and stores where the rows allow it; on a CPU, where they become vectors, a block of 32.
#include "mxfp4.cuh"

#ifdef __CUDACC__
constexpr int GROUP = 8;
#else
constexpr int GROUP = MX_BLOCK;
#endif

// A row's elements from k on between memory and registers; past the end of the row nothing is touched.
template <class T> __device__ inline void load(T (&to)[GROUP], const T* row, int k, int K) {
    if (K % GROUP == 0) {  // then every group is whole and 16-byte aligned
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(to) / 16); ++i)
            reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(row + k)[i];
    } else {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) to[i] = row[min(k + i, K - 1)];
    }
}

template <class T> __device__ inline void store(T* row, int k, int K, const T (&from)[GROUP]) {
    if (K % GROUP == 0) {
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(from) / 16); ++i)
            reinterpret_cast<uint4*>(row + k)[i] = reinterpret_cast<const uint4*>(from)[i];
    } else {
        for (int i = 0; i < min(GROUP, K - k); ++i) row[k + i] = from[i];
    }
}

struct Packed {
    using Value = float;  // that holds every number of a table
    const std::uint8_t *codes, *scales;

    template <class T> __device__ void read(T (&to)[GROUP], long long row, int k, int K) const {
        const int blocks = (K + MX_BLOCK - 1) / MX_BLOCK;
        alignas(16) std::uint8_t packed[GROUP / 2];
        using Codes = std::conditional_t<GROUP == 8, std::uint32_t, uint4>;
        reinterpret_cast<Codes&>(packed) = *reinterpret_cast<const Codes*>(codes + row * blocks * (MX_BLOCK / 2) + k / 2);
        decode(to, packed, scales[row * blocks + k / MX_BLOCK]);
    }
};

template <class T> struct Dense {
    using Value = T;
    const T* table;

    __device__ void read(T (&to)[GROUP], long long row, int k, int K) const { load(to, table + row * K, k, K); }
};

struct Integers {
    const void* values;
    int wide;

    __device__ long long operator[](long long i) const {
        return wide ? static_cast<const long long*>(values)[i] : static_cast<const int*>(values)[i];
    }
};

template <class T> __device__ inline void fill(T (&values)[GROUP], float value) {
#pragma unroll
    for (int i = 0; i < GROUP; ++i) narrow(&values[i], value);
}

template <class T, class Table>
__device__ inline void lookup(T* __restrict__ y, const Table& table, Integers ids, long long V, int K, long long padding) {
    const long long token = blockIdx.x, id = ids[token];
    for (int k = threadIdx.x * GROUP; k < K; k += static_cast<int>(blockDim.x) * GROUP) {
        alignas(16) T values[GROUP];
        if (id < 0 || id >= V) fill(values, __uint_as_float(0x7fffffffu));
        else if (id == padding) fill(values, 0.0f);
        else table.read(values, id, k, K);
        store(y + token * K, k, K, values);
    }
}

template <class T, class Table>
__device__ inline void add_position(T* __restrict__ y, const T* __restrict__ x, const Table& table, Integers offsets,
                                    long long start, int span, long long P, int K) {
    const long long row = blockIdx.x;
    const long long first = start + (offsets.values == nullptr ? 0 : offsets[row / span]);
    const long long position = first + row % span;
    for (int k = threadIdx.x * GROUP; k < K; k += static_cast<int>(blockDim.x) * GROUP) {
        alignas(16) T values[GROUP];
        alignas(16) typename Table::Value added[GROUP];
        load(values, x + row * K, k, K);
        if (position < 0 || position >= P) fill(added, __uint_as_float(0x7fffffffu));
        else table.read(added, position, k, K);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) narrow(&values[i], __fadd_rn(widen(values[i]), widen(added[i])));
        store(y + row * K, k, K, values);
    }
}

// ---------------------------------------------------------------------------------------------- entry points

using Bytes = const std::uint8_t*;

extern "C" __global__ void embedding_packed_fp32(float* y, Bytes codes, Bytes scales, const void* ids, int wide,
                                                 long long V, int K, long long padding) {
    lookup(y, Packed{codes, scales}, {ids, wide}, V, K, padding);
}
extern "C" __global__ void embedding_packed_bf16(__nv_bfloat16* y, Bytes codes, Bytes scales, const void* ids, int wide,
                                                 long long V, int K, long long padding) {
    lookup(y, Packed{codes, scales}, {ids, wide}, V, K, padding);
}
extern "C" __global__ void embedding_packed_fp16(__half* y, Bytes codes, Bytes scales, const void* ids, int wide,
                                                 long long V, int K, long long padding) {
    lookup(y, Packed{codes, scales}, {ids, wide}, V, K, padding);
}
extern "C" __global__ void embedding_dense_fp32(float* y, const float* table, const void* ids, int wide,
                                                long long V, int K, long long padding) {
    lookup(y, Dense<float>{table}, {ids, wide}, V, K, padding);
}
extern "C" __global__ void embedding_dense_bf16(__nv_bfloat16* y, const __nv_bfloat16* table, const void* ids, int wide,
                                                long long V, int K, long long padding) {
    lookup(y, Dense<__nv_bfloat16>{table}, {ids, wide}, V, K, padding);
}
extern "C" __global__ void embedding_dense_fp16(__half* y, const __half* table, const void* ids, int wide,
                                                long long V, int K, long long padding) {
    lookup(y, Dense<__half>{table}, {ids, wide}, V, K, padding);
}
extern "C" __global__ void position_packed_fp32(float* y, const float* x, Bytes codes, Bytes scales, const void* offsets,
                                                int wide, long long start, int span, long long P, int K) {
    add_position(y, x, Packed{codes, scales}, {offsets, wide}, start, span, P, K);
}
extern "C" __global__ void position_packed_bf16(__nv_bfloat16* y, const __nv_bfloat16* x, Bytes codes, Bytes scales,
                                                const void* offsets, int wide, long long start, int span,
                                                long long P, int K) {
    add_position(y, x, Packed{codes, scales}, {offsets, wide}, start, span, P, K);
}
extern "C" __global__ void position_packed_fp16(__half* y, const __half* x, Bytes codes, Bytes scales, const void* offsets,
                                                int wide, long long start, int span, long long P, int K) {
    add_position(y, x, Packed{codes, scales}, {offsets, wide}, start, span, P, K);
}
extern "C" __global__ void position_dense_fp32(float* y, const float* x, const float* table, const void* offsets, int wide,
                                               long long start, int span, long long P, int K) {
    add_position(y, x, Dense<float>{table}, {offsets, wide}, start, span, P, K);
}
extern "C" __global__ void position_dense_bf16(__nv_bfloat16* y, const __nv_bfloat16* x, const __nv_bfloat16* table,
                                               const void* offsets, int wide, long long start, int span,
                                               long long P, int K) {
    add_position(y, x, Dense<__nv_bfloat16>{table}, {offsets, wide}, start, span, P, K);
}
extern "C" __global__ void position_dense_fp16(__half* y, const __half* x, const __half* table, const void* offsets, int wide,
                                               long long start, int span, long long P, int K) {
    add_position(y, x, Dense<__half>{table}, {offsets, wide}, start, span, P, K);
}
