// Copies from global to shared memory that run while the thread goes on: cp.async, and its meaning on the CPU.
//
// A thread's copies since the last commit_async form a group. wait_async<pending>() returns when all groups of this
// thread but the last `pending` have arrived; other threads see them after the barrier that follows. Until then the bytes
// they go to belong to nobody, and those they come from must last.
#pragma once

#include <cstdint>

// BYTES (4, 8 or 16) from `global` to `shared`, both multiples of BYTES; zeros, and nothing is read, unless `valid`.
#ifdef __CUDACC__

template <int BYTES> __device__ inline void copy_async(void* shared, const void* global, bool valid) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    const int read = valid ? BYTES : 0;  // the rest of BYTES is filled with zeros
    if constexpr (BYTES == 16)           // past the first-level cache
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(read) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "r"(read)
                     : "memory");
}
// 16 bytes at constant distances, which cost no instruction.
template <int to, int from> __device__ inline void copy_async_at(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
                 "l"(global), "n"(to), "n"(from)
                 : "memory");
}
__device__ inline void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending> __device__ inline void wait_async() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#else

#include "host/async.h"

#endif
