// What a block of attention_wide.cuh has in shared memory, which tiles it takes one after another, and the warpgroup that
// brings them: their queries, keys and values, and what the others have to know of their rows.
//
// The chunks of a block's tiles follow one another, those of a tile in ascending order, a chunk a step; a tile without chunks
// takes a step, too. Keys of step u lie in stage u % STAGES, and so do its values. Of every step the bringer tells when the keys are
// there, and when the values are, and every warp that multiplies tells when it has used either, or that it does not want them; what
// comes STAGES steps later may then take their place. A tile's queries and what is known of its rows come with its first keys. The
// queries take the place of those of two tiles ago, whose last keys have been used when these may come. The rows are needed
// until outputs are written, which is before the second keys that follow are used: they take the place of those of four tiles ago.
#pragma once

#include "attention_wide_rows.cuh"

#include <utility>

constexpr int MOST_TILES = 256, STAGES = 2, KNOWN = 4;         // of a block; of keys, and of values; tiles whose rows are known
static_assert(STAGES == 2 && KNOWN == 4);                      // more stages: queries come too early; fewer places: rows do
template <int D> constexpr int WIDE_GROUPS = D == 64 ? 3 : 2;  // that multiply: as many as registers allow
template <int D> constexpr int WIDE_ROWS = WIDE_GROUPS<D> * GROUP_ROWS;
template <int D> constexpr int WIDE_THREADS = (WIDE_GROUPS<D> + 1) * GROUP_THREADS;

struct WideRow {
    int low, high;  // the keys that it sees; none where the row does not exist
    int at;         // its outputs, in rows of D after the tile's first; -1: the row does not exist
    float sink;
};
template <int D> struct WideTile {
    WideRow rows[WIDE_ROWS<D>];
    int begin[WIDE_GROUPS<D>], end[WIDE_GROUPS<D>];  // chunks that some row of a warpgroup sees
    int first_chunk, steps, last;                    // last: none follows
    long long first_output;
};
template <int D> struct alignas(1024) WideShared {
    using Weights = std::uint32_t[WIDE_GROUPS<D> * WARPS][ROWS][CHUNK / 2];  // of a careful pass
    unsigned char queries[2][WIDE_GROUPS<D>][D / 64 * QUERY_TILE];
    unsigned char keys[STAGES][D / 64 * TILE_BYTES], values[STAGES][D / 64 * TILE_BYTES];
    std::uint32_t ones[8 * 32];  // of T, in pairs: 8 rows of a tile
    unsigned char more[D == 64 ? sizeof(Weights) : 16];
    WideTile<D> tiles[KNOWN];
    Meeting keys_there[STAGES], values_there[STAGES], keys_used[STAGES], values_used[STAGES];
    unsigned char broken[MOST_TILES];

    // A careful pass has one chunk at a time; with heads of 128 its weights take the place of the next one's keys.
    __device__ Weights& weights() {
        static_assert(sizeof(Weights) <= (D == 64 ? sizeof more : sizeof keys[1]));
        return *reinterpret_cast<Weights*>(D == 64 ? more : keys[1]);
    }
};

// The block's n-th tile. Some KV heads are taken at once, whose keys and values the second-level cache holds; of their tiles
// those with most keys come first, and every second round goes through the blocks the other way, so that all have about as
// much to do.
template <int D> struct Walk {
    const Problem& problem;
    const CacheRows& rows;
    int heads, at_once;  // of all sequences

    __device__ int tiles() const { return (problem.T * (problem.H / rows.heads) + WIDE_ROWS<D> - 1) / WIDE_ROWS<D>; }
    __device__ int index(int n) const {
        return static_cast<int>(n % 2 == 0 ? n * gridDim.x + blockIdx.x : (n + 1) * gridDim.x - 1 - blockIdx.x);
    }
    __device__ bool has(int n) const { return index(n) < tiles() * heads; }
    __device__ Tile operator()(int n) const {
        const int first = index(n) / (at_once * tiles()) * at_once, together = min(at_once, heads - first);
        const int rest = index(n) - first * tiles(), head = first + rest % together;
        return tile_at(problem, rows, head / rows.heads, head % rows.heads, (tiles() - 1 - rest / together) * WIDE_ROWS<D>);
    }
};

// The warpgroup that brings what the others multiply.
template <int D, class T> class Bringer {
    static constexpr int PIECES = D / 8, STRIDE = GROUP_THREADS / PIECES;
    static constexpr int STAGE_BYTES = sizeof(WideShared<D>::keys[0]);
    static_assert(STRIDE % 8 == 0);  // the rows of a thread have their piece at the same place
    struct Place {  // a chunk of a sequence's keys or values
        long long first;  // this thread's first piece of chunk 0, in elements; where sequences are not in pages
        int chunk, end, length, b, head;
    };
    WideShared<D>& shared;
    const T *const q, *const k, *const v;
    const Walk<D>& walk;
    Tile tile{};
    int number = 0, left = 0, step = 0;  // of the tile; its steps to come; the step whose keys come next
    bool fresh = false;                  // the tile's queries have not been brought
    Place keys{}, values{};

    __device__ int thread() const { return threadIdx.x % GROUP_THREADS; }
    __device__ unsigned char* piece_in(unsigned char* stages, int step) const {
        return stages + step % STAGES * STAGE_BYTES + place<TILE_BYTES>(thread() / PIECES, thread() % PIECES);
    }
    template <int... i>
    __device__ void load_whole(unsigned char* to, const T* from, std::integer_sequence<int, i...>) const {
        (copy_async_at<i * STRIDE * 128, i * STRIDE * D * static_cast<int>(sizeof(T))>(to, from), ...);
    }
    // A chunk to where this thread's first piece of it goes; zeros past the length.
    __device__ void load(unsigned char* to, const T* from, const Place& at) const {
        if (walk.rows.table == nullptr && (at.chunk + 1) * CHUNK <= at.length) {
            const T* const first = from + at.first + static_cast<long long>(at.chunk) * (CHUNK * D);
            load_whole(to, first, std::make_integer_sequence<int, CHUNK / STRIDE>());
            return;
        }
        const int piece = thread() % PIECES, row = at.chunk * CHUNK + thread() / PIECES;
#pragma unroll 1
        for (int i = 0; i < CHUNK; i += STRIDE) {
            const bool valid = row + i < at.length;
            const long long piece_at = valid ? walk.rows.at(at.b, at.head, row + i) * D + piece * 8 : 0;
            copy_async<16>(to + i * 128, from + piece_at, valid);
        }
    }
    __device__ Place begin_of(const Tile& tile) const {
        const bool paged = walk.rows.table != nullptr;
        const long long first = paged ? 0 : walk.rows.at(tile.b, tile.head, thread() / PIECES) * D + thread() % PIECES * 8;
        return {first, tile.begin(), tile.end(WIDE_ROWS<D>), tile.length, tile.b, tile.head};
    }
    __device__ static int steps_of(const Place& at) { return max(at.end - at.chunk, 1); }
    // The tile's queries, zeros for rows that do not exist, and what is known of its rows.
    __device__ void load_queries(unsigned char* to, WideTile<D>& told) const {
        const Problem& problem = *tile.problem;
        const T* const first = q + static_cast<long long>(tile.b) * problem.T * problem.q_stride + tile.head * tile.G * D;
        const int piece = thread() % PIECES, from = thread() / PIECES;
        unsigned char* const piece_to = to + place<QUERY_TILE>(from, piece);
#pragma unroll 4
        for (int i = 0; i < WIDE_ROWS<D>; i += STRIDE) {
            const int r = tile.first + from + i, query = tile.query(r), head = r - query * tile.G;
            const bool exists = r < tile.count;
            const T* at = first + static_cast<long long>(query) * problem.q_stride + (head * D + piece * 8);
            copy_async<16>(piece_to + i / GROUP_ROWS * (D / 64 * QUERY_TILE) + i % GROUP_ROWS * 128, exists ? at : q, exists);
        }
#pragma unroll 1
        for (int row = thread(); row < WIDE_ROWS<D>; row += GROUP_THREADS) {
            const int r = min(tile.first + row, tile.count - 1), query = tile.query(r), head = r - query * tile.G;
            const bool exists = tile.first + row < tile.count;
            told.rows[row] = {tile.low(r), exists ? tile.high(r) : 0, exists ? query * problem.H + head : -1,
                              problem.sinks == nullptr ? 0.0f : problem.sinks[tile.head * tile.G + head]};
            if (row % GROUP_ROWS != 0) continue;
            const int last = min(tile.first + row + GROUP_ROWS, tile.count) - 1;
            told.begin[row / GROUP_ROWS] = exists ? tile.low(r) / CHUNK : tile.begin();
            told.end[row / GROUP_ROWS] = exists ? (tile.high(last) + CHUNK - 1) / CHUNK : tile.begin();
        }
        if (thread() == 0) {
            told.first_chunk = tile.begin();
            told.steps = left;
            told.last = !walk.has(number + 1);
            told.first_output = (static_cast<long long>(tile.b) * problem.T * problem.H + tile.head * tile.G) * D;
        }
    }
    __device__ void enter() {  // the tile
        tile = walk(number);
        keys = begin_of(tile);
        left = steps_of(keys);
        fresh = true;
    }
    // Of the next step; with a tile's first keys what goes with it.
    __device__ void load_keys() {
        if (left > 0) {
            if (keys.chunk < keys.end) load(piece_in(shared.keys[0], step), k, keys);
            if (fresh) load_queries(shared.queries[number % 2][0], shared.tiles[number % KNOWN]);
            fresh = false;
        }
        commit_async();
    }
    // Of the step before.
    __device__ void load_values() {
        if (values.chunk < values.end) load(piece_in(shared.values[0], step - 1), v, values);
        commit_async();
    }
    __device__ void advance() {
        values = keys;
        if (left == 0) return;
        ++step;
        ++keys.chunk;
        if (--left > 0) return;
        keys.chunk = keys.end;
        if (walk.has(++number)) enter();
    }

public:
    __device__ Bringer(WideShared<D>& shared, const T* q, const T* k, const T* v, const Walk<D>& walk)
        : shared(shared), q(q), k(k), v(v), walk(walk) {}

    // The first queries and keys are on their way.
    __device__ void begin() {
        enter();
        load_keys();
        advance();
    }
    // The rest, once the meetings are open.
    __device__ void run() {
        wait_async<0>();
        publish_shared();
        arrive(shared.keys_there[0]);
        __syncthreads();  // the first queries and keys are there
#pragma unroll 1
        for (int u = 1; u <= step; ++u) {
            if (u > 1) meet();
            if (u >= STAGES) await(shared.keys_used[u % STAGES], u / STAGES - 1);
            load_keys();
            if (u > STAGES) await(shared.values_used[(u - 1) % STAGES], (u - 1) / STAGES - 1);
            load_values();
            advance();
            wait_async<1>();
            publish_shared();
            arrive(shared.keys_there[u % STAGES]);
            wait_async<0>();
            publish_shared();
            arrive(shared.values_there[(u - 1) % STAGES]);
        }
        meet();
        __syncthreads();  // all tiles have been multiplied
    }
    // All keys and values of a tile again, one chunk after the other.
    __device__ void run_carefully(int n) {
        number = n;
        enter();
        __syncthreads();  // the tile before has been written
        load_queries(shared.queries[0][0], shared.tiles[0]);
#pragma unroll 1
        for (; keys.chunk < keys.end; ++keys.chunk) {
            __syncthreads();  // the chunk before has been used
            load(piece_in(shared.keys[0], 0), k, keys);
            load(piece_in(shared.values[0], 0), v, keys);
            commit_async();
            wait_async<0>();
            publish_shared();
            __syncthreads();  // the chunk is there
            __syncthreads();  // the values without specials are there
            __syncthreads();  // the weights are there
        }
        __syncthreads();  // the last chunk has been used
    }
};
