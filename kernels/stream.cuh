// Memory that one thread reads or writes once and nobody else does soon: it need not stay in a cache.
#pragma once

#ifdef __CUDACC__
template <class V> __device__ inline V read_once(const V* from) { return __ldcs(from); }
template <class V> __device__ inline void write_once(V* to, const V& value) { __stcs(to, value); }
// Lets the L2 cache read the line at `from`, which must lie in memory, and does not wait.
__device__ inline void bring(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
#else
template <class V> inline V read_once(const V* from) { return *from; }
template <class V> inline void write_once(V* to, const V& value) { *to = value; }
inline void bring(const void*) {}
#endif
