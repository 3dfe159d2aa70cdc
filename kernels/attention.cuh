// What the schedules of attention share (attention_few.cuh, attention_many.cuh, attention_wide.cuh): which keys a row sees,
// staging of keys and values, and the state that chunks join. attention.cu says what is computed and in which order; that
// does not depend on the schedule.
#pragma once

#include "async.cuh"
#include "kv_cache.cuh"
#include "matrix.cuh"
#include "mma.cuh"
#include "out_of_line.cuh"
#include "warp.cuh"
#include "weights.cuh"

constexpr int THREADS = 128, WARPS = THREADS / WARP, ROWS = 16, CHUNK = 128;
constexpr float LOG2_E = 1.44269504f;
constexpr int P_PITCH = CHUNK / 2 + 4;  // 4-byte words
__host__ __device__ constexpr int pitch(int D) { return D / 2 + 4; }  // of rows of D elements: eight rows, 32 banks

#ifndef __CUDACC__
template <std::size_t size> inline unsigned char* host_arena() {
    __shared__ __align__(1024) unsigned char arena[size];
    return arena;
}
#endif

// A chunk's keys and values: one comes while the other is used. Codes on their way lie in registers, so that both take the
// same place, and what that leaves of shared memory lets more blocks run at once.
template <class Cache> constexpr bool COPIED = true;
template <class T> constexpr bool COPIED<Packed<T>> = false;
template <int DMAX, class Cache> struct Chunk {
    alignas(16) std::uint32_t rows[COPIED<Cache> ? 2 : 1][CHUNK][pitch(DMAX)];
    __device__ auto keys() { return rows[0]; }
    __device__ auto values() { return rows[COPIED<Cache>]; }
};

// Shared memory that the launch brings; on the CPU one block of it, of `size` bytes, for all kernels of a file.
template <class Shared, std::size_t size = 96 * 1024> __device__ inline Shared& brought() {
    static_assert(sizeof(Shared) <= size);
#ifdef __CUDACC__
    extern __shared__ __align__(1024) unsigned char arena[];
#else
    unsigned char* arena = host_arena<size>();
#endif
    return *reinterpret_cast<Shared*>(arena);
}

// Columns to multiply: on a GPU, where loops of a known length pay, the zeros past D too.
#ifdef __CUDACC__
template <int DMAX> __device__ constexpr int columns_of(int) { return DMAX; }
#else
template <int DMAX> constexpr int columns_of(int D) { return D; }
#endif

struct Problem {
    const int* lengths;
    const float* sinks;
    int T, H, D, q_stride;
    float scale;
    int causal, window;
};

// The larger; NaN wins, as with Max. Of zeros of both signs it may give either.
struct Larger {
    __device__ float operator()(float a, float b) const {
#ifdef __CUDACC__
        float larger;
        asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
        return larger;
#else
        return Max()(a, b);
#endif
    }
};
__device__ inline float infinity() { return __uint_as_float(0x7f800000u); }
// What exponents are taken relative to: -inf, where nothing was larger, would make NaN of -inf - -inf.
__device__ inline float base(float m) { return m == -infinity() ? 0.0f : m; }

// Scores are told in powers of 2, as multiples of s = q . k; those of a negative scale change their sign.
struct Scores {
    float factor;  // |scale| log2(e)
    bool negative;

    __device__ explicit Scores(const Problem& problem)
        : factor(fmaxf(__fmul_rn(fabsf(problem.scale), LOG2_E), 1e-45f)), negative(problem.scale < 0.0f) {}
    // The base of a row whose largest s is given.
    __device__ float base_of(float largest) const { return ceilf(__fmul_rn(largest, factor)); }
};
// From here on a product with the factor is a whole number anyway; it is rounded before the base is taken from it, so that
// the largest has a weight.
constexpr float WHOLE = 8388608.0f;
// How many powers of 2 scores lie above their row's base, at most 1: s times factor - top, rounded to a multiple of 2^-12 where
// that matters. Element i is of row i / 2 % 2.
template <int N> __device__ inline void raise(float (&s)[N], float factor, const float (&top)[2]) {
    constexpr float GRID = 3072.0f;  // 1.5 * 2^11: its units in the last place, and those of numbers around it, are 2^-12
    float by[2] = {factor, factor}, from[2] = {__fsub_rn(GRID, base(top[0])), __fsub_rn(GRID, base(top[1]))};
    if (fabsf(top[0]) >= WHOLE || fabsf(top[1]) >= WHOLE) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (!(fabsf(top[half]) >= WHOLE)) continue;
#pragma unroll
            for (int i = 0; i < N; ++i)
                if (i / 2 % 2 == half) s[i] = __fsub_rn(__fmul_rn(s[i], factor), base(top[half]));
            by[half] = 1.0f;
            from[half] = GRID;
        }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = __fsub_rn(__fmaf_rn(s[i], by[i / 2 % 2], from[i / 2 % 2]), GRID);
}

// Which rows a tile of queries of one KV head holds, and which keys they see.
struct Tile {
    int b, head, first, count, G, length, start;
    const Problem* problem;
    int whole, rest;  // of first / G
    std::uint32_t inverse;

    // r / G for a row of the tile, with one division a block in place of one a row. Right for G up to 46,000.
    __device__ int query(int r) const {
        return whole + static_cast<int>(static_cast<std::uint64_t>(rest + r - first) * inverse >> 31);
    }
    __device__ int position(int r) const { return start + query(r); }
    __device__ int low(int r) const { return problem->window > 0 ? max(position(r) - problem->window + 1, 0) : 0; }
    __device__ int high(int r) const { return r >= count ? 0 : problem->causal ? position(r) + 1 : length; }
    // Chunks that some row of `rows` sees.
    __device__ int begin() const { return low(first) / CHUNK; }
    __device__ int end(int rows) const {
        const int last = min(first + rows, count) - 1;
        return ((problem->causal ? position(last) + 1 : length) + CHUNK - 1) / CHUNK;
    }
    __device__ long long token(int r) const { return static_cast<long long>(b) * problem->T + query(r); }
    __device__ int query_head(int r) const { return head * G + r - query(r) * G; }
    // A row among all rows of the launch.
    __device__ long long row(int r, int heads) const { return (static_cast<long long>(b) * heads + head) * count + r; }
};
__device__ inline Tile tile_at(const Problem& problem, const CacheRows& rows, int b, int head, int first) {
    const int G = problem.H / rows.heads, length = problem.lengths[b];
    return {b, head, first, problem.T * G, G, length, length - problem.T, &problem, first / G, first % G, 0x7fffffffu / G + 1};
}

// The keys or values of a chunk to shared memory, DMAX columns; zeros past the length and past D. `fetch` begins to read a
// chunk, `put` writes the chunk fetched last, of which wait_async and a barrier tell that it is there.
template <int DMAX, class Cache> struct Stage;
template <int DMAX, class T> struct Stage<DMAX, Plain<T>> {
    static constexpr int PIECES = DMAX / 8, STRIDE = THREADS / PIECES;
    const Plain<T>& from;
    const CacheRows& rows;
    const Tile& tile;
    int chunk;

    __device__ void fetch(int next) { chunk = next; }
    __device__ void put(std::uint32_t (*to)[pitch(DMAX)]) const {
        const int D = tile.problem->D, column = threadIdx.x % PIECES * 8, row = threadIdx.x / PIECES;
        const int left = column < D ? tile.length - chunk * CHUNK : 0;
        if (rows.table == nullptr) {
            const T* at = from.values + rows.at(tile.b, tile.head, chunk * CHUNK + row) * D + column;
#pragma unroll
            for (int i = 0; i < CHUNK; i += STRIDE, at += STRIDE * D)
                copy_async<16>(&to[row + i][column / 2], row + i < left ? at : from.values, row + i < left);
        } else {
#pragma unroll 1
            for (int i = 0; i < CHUNK; i += STRIDE) {
                const bool valid = row + i < left;
                const long long at = valid ? rows.at(tile.b, tile.head, chunk * CHUNK + row + i) * D + column : 0;
                copy_async<16>(&to[row + i][column / 2], from.values + at, valid);
            }
        }
    }
};
template <int DMAX, class T> struct Stage<DMAX, Packed<T>> {
    static constexpr int PIECES = DMAX / MX_BLOCK, STRIDE = THREADS / PIECES, COUNT = CHUNK / STRIDE;
    const Packed<T>& from;
    const CacheRows& rows;
    const Tile& tile;
    int chunk;
    uint4 codes[COUNT];
    std::uint8_t scales[COUNT];

    __device__ void fetch(int next) {
        const int piece = threadIdx.x % PIECES, blocks = row_blocks(tile.problem->D);
        chunk = next;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int key = chunk * CHUNK + threadIdx.x / PIECES + i * STRIDE;
            codes[i] = make_uint4(0, 0, 0, 0);
            scales[i] = 127;
            if (piece >= blocks || key >= tile.length) continue;
            const long long block = rows.at(tile.b, tile.head, key) * blocks + piece;
            codes[i] = *reinterpret_cast<const uint4*>(from.codes + block * (MX_BLOCK / 2));
            scales[i] = from.scales[block];
        }
    }
    __device__ void put(std::uint32_t (*to)[pitch(DMAX)]) const {
        const int piece = threadIdx.x % PIECES;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            std::uint32_t* out = &to[threadIdx.x / PIECES + i * STRIDE][piece * (MX_BLOCK / 2)];
            const std::uint32_t words[4] = {codes[i].x, codes[i].y, codes[i].z, codes[i].w};
#pragma unroll
            for (int w = 0; w < 4; ++w) *reinterpret_cast<uint4*>(out + 4 * w) = decode_eight<T>(words[w], scales[i]);
        }
    }
};

// Keys and values of the chunks `from` .. `to` - 1 to a block, each as soon as there is room. A chunk takes `keys`, `values` and
// `weights`, in this order; all threads of the block call them.
template <int DMAX, class Cache> class Chunks {
    Chunk<DMAX, Cache>& shared;
    Stage<DMAX, Cache> next_keys, next_values;
    const int from, to;

    __device__ void bring_values(int chunk) {
        next_values.fetch(chunk);
        if (!COPIED<Cache>) return;
        next_values.put(shared.values());
        commit_async();
    }

public:
    __device__ Chunks(Chunk<DMAX, Cache>& shared, const Cache& k, const Cache& v, const CacheRows& rows, const Tile& tile, int from,
                      int to)
        : shared(shared), next_keys{k, rows, tile}, next_values{v, rows, tile}, from(from), to(to) {
        if (from >= to) return;
        next_keys.fetch(from);
        if (COPIED<Cache>) {
            next_keys.put(shared.keys());
            commit_async();
        }
        if (COPIED<Cache>) bring_values(from);  // codes would take registers meanwhile
    }
    // Its keys are there, and the values of the chunk before have been used.
    __device__ void keys(int chunk) {
        if (COPIED<Cache>) {
            if (chunk == from) wait_async<1>();
            else wait_async<0>();
        }
        __syncthreads();  // copied keys are there, the last values have been used
        if (!COPIED<Cache>) next_keys.put(shared.keys());
        if (!COPIED<Cache> || chunk > from) bring_values(chunk);
        if (!COPIED<Cache>) __syncthreads();  // decoded keys are there
    }
    // Its keys have been used, and whatever else threads wrote to shared memory is there.
    __device__ void values(int chunk) {
        __syncthreads();  // the keys have been used
        if (!COPIED<Cache>) next_values.put(shared.values());
        if (chunk + 1 < to) {
            next_keys.fetch(chunk + 1);
            if (COPIED<Cache>) next_keys.put(shared.keys());
        }
        if (COPIED<Cache>) commit_async();
    }
    // Its values are there, and what threads wrote since.
    __device__ void weights() {
        if (COPIED<Cache>) wait_async<1>();
        __syncthreads();  // values and weights are there
    }
};

// The A fragments of 16 rows of queries from r0 on; zeros for rows and columns that do not exist.
template <int DMAX, class T>
__device__ inline void load_queries(std::uint32_t (&a)[DMAX / MMA_K][1][4], const T* q, const Tile& tile, int r0) {
    const int lane = threadIdx.x % WARP, D = tile.problem->D;
    const T* row[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int r = r0 + lane / 4 + 8 * half;
        row[half] = r < tile.count ? q + tile.token(r) * tile.problem->q_stride + tile.query_head(r) * D : nullptr;
    }
#pragma unroll
    for (int step = 0; step < DMAX / MMA_K; ++step)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int column = step * MMA_K + lane % 4 * 2 + 8 * (r >> 1);
            const bool exists = column < D && row[r & 1] != nullptr;
            a[step][0][r] = exists ? *reinterpret_cast<const std::uint32_t*>(row[r & 1] + column) : 0;
        }
}

// One row's state after some keys: outputs and their weights are multiples of 2^m.
struct State {
    float m, l;
};
// What the outputs of the state and of a chunk are multiplied by to join them: powers of 2, one of them 1.
struct Factors {
    float kept, joined;
};
// 2^d for a whole number up to 0, 0 below 2^-126. Of NaN it may be anything: the weights are NaN then, and so is their sum.
__device__ inline float power_of(float d) {
    return __uint_as_float(__float_as_uint(__fadd_rn(fmaxf(d, -127.0f), 12583039.0f)) << 23);  // 1.5 * 2^23 + 127
}
__device__ inline Factors factors_of(float m, float top) {
    const float zero = base(Larger()(m, top));
    return {power_of(__fsub_rn(m, zero)), power_of(__fsub_rn(top, zero))};
}
__device__ inline float joined(float o, float part, const Factors& by) {
    return __fmaf_rn(part, by.joined, __fmul_rn(o, by.kept));
}
// Joins a chunk's base and sum to the state; what the outputs of either are multiplied by.
__device__ inline Factors join(State& state, float top, float sum) {
    const Factors by = factors_of(state.m, top);
    state = {Larger()(state.m, top), joined(state.l, sum, by)};
    return by;
}
// A sink has the weight that a key of its score would have, not rounded.
template <class T> __device__ inline State start_state(bool has_sink, float sink) {
    if (!has_sink) return {-infinity(), 0.0f};
    const float top = ceilf(__fmul_rn(sink, LOG2_E));
    float z[1] = {sink};
    raise(z, LOG2_E, {top, top});
    return {top, __fmul_rn(exp2_32(z[0]), Weight<T>::FACTOR)};
}
template <class T> __device__ inline State start_state(const Problem& problem, const Tile& tile, int r) {
    const bool has_sink = problem.sinks != nullptr;
    return start_state<T>(has_sink, has_sink ? problem.sinks[tile.query_head(r)] : 0.0f);
}

// What a row's outputs are multiplied by at last. A row that sees no key has outputs of 0, whatever its sink.
__device__ inline float inverse_of(float l, bool sees) { return sees || l != 0.0f ? __fdiv_rn(1.0f, l) : 0.0f; }

// The exponent bits of the 16-bit types: all set in NaN and Inf.
template <class T> struct Exponent;
template <> struct Exponent<__nv_bfloat16> { static constexpr std::uint32_t bits = 0x7f80u; };
template <> struct Exponent<__half> { static constexpr std::uint32_t bits = 0x7c00u; };
template <class T> __device__ inline bool special(std::uint32_t value) {
    return (value & Exponent<T>::bits) == Exponent<T>::bits;
}
// A pair of values, those that are NaN or Inf replaced by 0.
template <class T> __device__ inline std::uint32_t without_specials(std::uint32_t pair) {
    return (special<T>(pair) ? 0 : pair & 0xffffu) | (special<T>(pair >> 16) ? 0 : pair & 0xffff0000u);
}
__device__ inline bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// `sum` and the special values of one column that a row sees, each times its weight, in ascending order of keys.
// Not inlined: it is rare, and there are many columns.
template <class T>
__device__ OUT_OF_LINE float add_specials(float sum, const std::uint32_t* values, int words,
                                           const std::uint32_t* weights, int column, int low, int high) {
    for (int n = max(low, 0); n < min(high, CHUNK); ++n) {
        const T value = reinterpret_cast<const T*>(values + n * words)[column];
        if (!special<T>(*reinterpret_cast<const std::uint16_t*>(&value))) continue;
        sum = __fadd_rn(sum, __fmul_rn(widen(reinterpret_cast<const T*>(weights)[n]), widen(value)));
    }
    return sum;
}
