// Fragments of mma.cuh from shared memory: ldmatrix, and on the CPU its meaning.
//
// Four matrices of 8 rows by 8 16-bit elements; place(8 i + r) tells where row r of matrix i lies, 16 bytes, aligned.
// load_matrices: register i of lane 4 g + t holds elements 2t and 2t + 1 of row g of matrix i.
// load_transposed: register i holds elements g of rows 2t and 2t + 1. All 32 lanes must call.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

template <class Place> __device__ inline void load_matrices(std::uint32_t (&to)[4], Place place) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(place(threadIdx.x % 32))))
                 : "memory");
}
template <class Place> __device__ inline void load_transposed(std::uint32_t (&to)[4], Place place) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(place(threadIdx.x % 32))))
                 : "memory");
}

#else

template <class Place> inline void load_matrices(std::uint32_t (&to)[4], Place place) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; ++i) {
        const void* row = place(8 * i + g);
        to[i] = static_cast<const std::uint32_t*>(row)[t];
    }
}
template <class Place> inline void load_transposed(std::uint32_t (&to)[4], Place place) {
    const int g = threadIdx.x % 32 / 4, two = threadIdx.x % 4 * 2;
    const auto element = [&](int from) -> std::uint32_t {
        const void* row = place(from);
        return static_cast<const std::uint16_t*>(row)[g];
    };
    for (int i = 0; i < 4; ++i) to[i] = element(8 * i + two) | element(8 * i + two + 1) << 16;
}

#endif
