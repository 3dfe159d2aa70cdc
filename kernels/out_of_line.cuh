// A function that is rare, or has registers of its own: not inlined where it is called.
#pragma once

#ifdef __CUDACC__
#define OUT_OF_LINE __noinline__
#else
#define OUT_OF_LINE __attribute__((noinline))
#endif
