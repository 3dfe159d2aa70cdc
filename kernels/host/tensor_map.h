// Boxes of a matrix (tensor_map.cuh) on the CPU, where a warpgroup's threads copy them, as late as copies are made at all
// (async.h); who brings them waits for them like for other copies.
#pragma once

struct TensorMap {  // device/tensor_map.py
    const char* matrix;
    std::int64_t rows, columns, box_rows;
    char rest[96];
};

namespace cpu {

// None past a box, so that one of another size gives other results, as on a GPU.
template <int ROWS, int BOXES> void copy_boxes(unsigned char (&tiles)[2][ROWS * 128], const TensorMap& map, int row, int column) {
    for (int i = threadIdx.x % GROUP_THREADS; i < ROWS * 16; i += GROUP_THREADS) {
        const int m = i / 16, piece = i % 16, k = column + 8 * piece;
        if (m % (ROWS / BOXES) >= map.box_rows) continue;
        const bool valid = row + m < map.rows && k < map.columns;
        const std::int64_t at = valid ? (row + m) * map.columns + k : 0;
        copy_async<16>(tiles[piece / 8] + swizzled(m, piece % 8), map.matrix + 2 * at, valid);
    }
}

}  // namespace cpu

template <int ROWS>
inline void bring_tiles(unsigned char (&tiles)[2][ROWS * 128], const TensorMap& map, int row, int column, Meeting&) {
    cpu::copy_boxes<ROWS, 1>(tiles, map, row, column);
}
// Here a block of a cluster brings all boxes.
template <int ROWS, int BLOCKS>
inline void bring_tiles_to_all(unsigned char (&tiles)[2][ROWS * 128], const TensorMap& map, int row, int column, Meeting&) {
    cpu::copy_boxes<ROWS, BLOCKS>(tiles, map, row, column);
}
