// Boxes of a matrix (tensor_map.cuh) on the CPU, where a warpgroup's threads copy them, as late as copies are made at all
// (async.h); who brings them waits for them like for other copies.
#pragma once

struct TensorMap {  // device/tensor_map.py
    const char* matrix;
    std::int64_t rows, columns, box_rows;
    char rest[96];
};

// None past the box, so that one of another size gives other results, as on a GPU.
template <int ROWS>
inline void bring_tiles(unsigned char (&tiles)[2][ROWS * 128], const TensorMap& map, int row, int column, Meeting&) {
    for (int i = threadIdx.x % GROUP_THREADS; i < min<int>(ROWS, map.box_rows) * 16; i += GROUP_THREADS) {
        const int m = i / 16, piece = i % 16, k = column + 8 * piece;
        const bool valid = row + m < map.rows && k < map.columns;
        const std::int64_t at = valid ? (row + m) * map.columns + k : 0;
        copy_async<16>(tiles[piece / 8] + swizzled(m, piece % 8), map.matrix + 2 * at, valid);
    }
}
