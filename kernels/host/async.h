// Asynchronous copies on the CPU. Where shared memory is poisoned (runtime.h) they are made as late as async.cuh allows: by
// the wait that covers their group. Elsewhere they are made at once, which costs less.
//
// Until then there is poison where they go to, neither what was there nor what will be, and their source may still change:
// a wait that is missing or leaves a group too many, a copy outside its group, a place that others still read or a source
// that does not last give other results, as they may on a GPU. A thread that ends with copies on their way ends the
// launch (runtime.cpp). Where more than Copies holds are on their way the oldest is made, as a GPU may, too.
#pragma once

namespace cpu {

template <int BYTES> struct Piece;  // what one access reads or writes, so that its address is looked at as on the GPU
template <> struct Piece<4> { using type = std::uint32_t; };
template <> struct Piece<8> { using type = uint2; };
template <> struct Piece<16> { using type = uint4; };

template <int BYTES> inline void copy(const Copy& asked) {
    using Bytes = typename Piece<BYTES>::type;
    *static_cast<Bytes*>(asked.to) = asked.from != nullptr ? *static_cast<const Bytes*>(asked.from) : Bytes();
}
inline void make(const Copy& asked) {
    switch (asked.bytes) {
        case 4: return copy<4>(asked);
        case 8: return copy<8>(asked);
        default: return copy<16>(asked);
    }
}

}  // namespace cpu

template <int BYTES> inline void copy_async(void* shared, const void* global, bool valid) {
    cpu::Copies& copies = cpu::self->copies;
    const cpu::Copy asked{shared, valid ? global : nullptr, BYTES, copies.groups};
    if (copies.poison < 0) return cpu::copy<BYTES>(asked);
    typename cpu::Piece<BYTES>::type poison;
    std::memset(&poison, copies.poison, BYTES);
    *static_cast<decltype(poison)*>(shared) = poison;
    if (copies.full()) cpu::make(copies.pop());
    copies.push(asked);
}
template <int to, int from> inline void copy_async_at(void* shared, const void* global) {
    copy_async<16>(static_cast<char*>(shared) + to, static_cast<const char*>(global) + from, true);
}
inline void commit_async() { ++cpu::self->copies.groups; }
template <int pending> inline void wait_async() {
    cpu::Copies& copies = cpu::self->copies;
    while (!copies.empty() && copies.at(0).group + pending < copies.groups) cpu::make(copies.pop());
}
