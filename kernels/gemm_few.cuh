// Up to 8 rows: a block owns 16 features, a warp multiplies spans of 128 k of them. The WARPS warps of a block take the spans
// of K in turn and leave their chunks' sums in shared memory.
//
// Four lanes read a span of a feature, each of them a block of 32 codes in one load. The tensor core wants 4 k of every
// step of 16 in each of the four, so they exchange pieces of four codes. Inside a step the assignment of k to the
// fragment's slots is free: lane t has 4t .. 4t + 3, weights and tokens alike, and in the pairs that decoding gives.
#pragma once

#include "gemm.cuh"

constexpr int SPAN = 128, STEPS = SPAN / MMA_K, BLOCKS = SPAN / MX_BLOCK;

// A lane's share of a span of features g and g + 8: `read` from memory, made `ready`, taken as the `operands` of a
// block's two steps. Past K there are zeros, which add nothing.
template <class Weights> struct Span;

template <class T> struct Span<Packed<T>> {
    static constexpr bool alternate = true;  // a lane's 4 k of a step are the pairs 0, 2 and 1, 3
    static constexpr bool scaled = Order<T>::scale_operand;
    static constexpr std::uint32_t flags = 0x80008000u;

    // The first feature's weights, and where those of the lane's two features begin from there, in bytes of codes.
    struct From {
        const std::uint8_t *codes, *scales;
        int at[2];
    };
    std::uint32_t words[2][BLOCKS];  // as read: a block's; then, of each block's two steps in turn, the lane's codes
    std::uint32_t scales;            // of the lane's block, a half word a feature
    std::uint32_t factors[BLOCKS];   // 2^(s - 1) in bfloat16; the byte where there is none, and for half
    bool special;                    // some factor is no such number

    static __device__ From from(const Packed<T>& weights, long long row, int last) {
        const int g = threadIdx.x % WARP / 4, bytes = weights.K / 2;
        return {weights.codes + row * bytes,
                weights.scales + row * (bytes / 16),
                {min(g, last) * bytes, min(g + 8, last) * bytes}};
    }
    __device__ void read(const From& from, int k, int K) {
        k += threadIdx.x % 4 * MX_BLOCK;
        uint4 codes[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
        scales = 0;
        if (k < K) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                codes[i] = read_once(reinterpret_cast<const uint4*>(from.codes + (from.at[i] + k / 2)));
                scales |= static_cast<std::uint32_t>(from.scales[(from.at[i] + k / 2) / 16]) << 16 * i;
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            words[i][0] = codes[i].x;
            words[i][1] = codes[i].y;
            words[i][2] = codes[i].z;
            words[i][3] = codes[i].w;
        }
    }
    __device__ void ready() {
        // Up to byte 127 a factor is a number; half wants bytes that are floats once shifted, 1 to 127. Others are flagged.
        if (scaled) scales = (scales & 0x00800080u) != 0 ? scales | flags : (scales + 0x007e007eu) << 7;
        else if ((scales + 0x007f007fu & ~scales & 0x00800080u) != 0x00800080u) scales |= flags;
        quad_gather(factors, scales);
        special = ((factors[0] | factors[1] | factors[2] | factors[3]) & flags) != 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const std::uint32_t a = words[i][0], b = words[i][1], c = words[i][2], d = words[i][3];  // steps ab and cd
            words[i][0] = __byte_perm(a, c, 0x5140);
            words[i][1] = __byte_perm(a, c, 0x7362);
            words[i][2] = __byte_perm(b, d, 0x5140);
            words[i][3] = __byte_perm(b, d, 0x7362);
            quad_transpose(words[i]);
        }
    }
    __device__ std::uint32_t byte(int block, int i) const { return factors[block] >> 16 * i & 0xff; }
    __device__ float scale(int block, int i) const {
        return special ? decode_scale(byte(block, i)) : __uint_as_float(byte(block, i) << 23);
    }
    __device__ void operands(std::uint32_t (&a)[2][4], int block) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            std::uint32_t pairs[4];
            decode_astride<T>(pairs, words[i][block]);
            const std::uint32_t mine = __byte_perm(factors[block], 0, i == 0 ? 0x1010 : 0x3232);
            const std::uint32_t factor = scaled ? mine : 0x74007400u;  // 2^14
#pragma unroll
            for (int pair = 0; pair < 4; ++pair)
                a[pair / 2][i + pair % 2 * 2] = multiply_pairs(pairs[pair], factor, T());
        }
        if (!special || (factors[block] & flags) == 0) return;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int s = static_cast<int>(byte(block, i));
            // bfloat16: 2^(s - 1) in two factors. half: what is past float32's range is made Inf, all else as it was.
            const int first = scaled ? min(s + 126, 254) << 7 : s == 254 ? 0x7800 : s == 253 ? 0x7400 : 0x3c00;
            const int back = s == 254 ? 0x0200 : 0x7800 - first;
            const int second = !scaled ? back : s == 255 ? 0x7fff : max(s - 1, 127) << 7;
            std::uint32_t pairs[4];
            decode_astride<T>(pairs, words[i][block]);
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                std::uint32_t& to = a[pair / 2][i + pair % 2 * 2];
                to = multiply_pairs(scaled ? pairs[pair] : to, first * 0x00010001u, T());
                to = multiply_pairs(to, second * 0x00010001u, T());
            }
        }
    }
};

template <class T> struct Span<Dense<T>> {
    static constexpr bool alternate = false;
    struct From {
        const T* operands;
        const std::uint8_t* scales;
        int at[2];
    };
    uint2 pieces[STEPS][2];
    std::uint32_t scales[BLOCKS][2];
    bool scaled;

    static __device__ From from(const Dense<T>& weights, long long row, int last) {
        const int g = threadIdx.x % WARP / 4, K = weights.K;
        const std::uint8_t* scales = weights.scales == nullptr ? nullptr : weights.scales + row * (K / MX_BLOCK);
        return {weights.operands + row * K, scales, {min(g, last) * K, min(g + 8, last) * K}};
    }
    __device__ void read(const From& from, int k, int K) {
        const int piece = threadIdx.x % 4 * 4;
        scaled = from.scales != nullptr;
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int at = k + step * MMA_K;
                pieces[step][i] = make_uint2(0, 0);
                if (step % 2 == 0) scales[step / 2][i] = 0;
                if (at >= K) continue;
                pieces[step][i] = read_once(reinterpret_cast<const uint2*>(from.operands + (from.at[i] + at + piece)));
                if (step % 2 == 0 && scaled) scales[step / 2][i] = from.scales[(from.at[i] + at) / MX_BLOCK];
            }
    }
    __device__ void ready() {}
    __device__ float scale(int block, int i) const { return scaled ? decode_scale(scales[block][i]) : 1.0f; }
    __device__ void operands(std::uint32_t (&a)[2][4], int block) const {
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                a[step][i] = pieces[2 * block + step][i].x;
                a[step][i + 2] = pieces[2 * block + step][i].y;
            }
    }
};

// Columns of tokens as `span` wants them, b[step]: of row g the lane's 4 k of a step. Past K there are zeros.
template <class T, bool alternate> __device__ inline void read_tokens(std::uint32_t (&b)[STEPS][1][2], const T* row, int k, int K) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        uint2 piece = make_uint2(0, 0);
        if (k + step * MMA_K < K) piece = *reinterpret_cast<const uint2*>(row + k + step * MMA_K);
        b[step][0][0] = alternate ? __byte_perm(piece.x, piece.y, 0x5410) : piece.x;
        b[step][0][1] = alternate ? __byte_perm(piece.x, piece.y, 0x7632) : piece.y;
    }
}

template <class T, class Weights, int WARPS>
__device__ inline void multiply_few(const Output<T>& output, const T* __restrict__ x, const Weights& weights, const Rows& rows) {
    constexpr int chunk = Order<T>::chunk, PARTS = SPAN / chunk;  // chunks of a span
    static_assert(SPAN % chunk == 0 && chunk % MX_BLOCK == 0);
    constexpr int TILE_N = 16, TILE_M = 8, PITCH = TILE_N + 4;  // the pitch spreads a warp's sums over the banks
    static_assert(TILE_N * TILE_M <= WARPS * WARP);
    __shared__ float sums[WARPS * PARTS][TILE_M * PITCH];  // a round's, times their scale
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int n0 = blockIdx.x * TILE_N, N = output.N, K = weights.K;
    Tile tile;
    if (!locate(tile, rows, TILE_M)) return;
    const int count = min(tile.count - tile.first, TILE_M);

    // Past the last feature or row the last or first is read instead: what comes of it is not written.
    const int first = min(n0, N - 1);
    const typename Span<Weights>::From from =
        Span<Weights>::from(weights, static_cast<long long>(tile.problem) * N + first, N - 1 - first);
    const T* const tokens = x + tile.x_row(g < count ? g : 0) * K + 4 * t;

    const int chunks = (K + chunk - 1) / chunk, rounds = (K + WARPS * SPAN - 1) / (WARPS * SPAN);
    Span<Weights> span;
    span.read(from, warp * SPAN, K);

    float result = 0;  // of number threadIdx.x, a row's features first
    const int number = threadIdx.x, m = number / TILE_N, n = number % TILE_N;
    for (int round = 0; round < rounds; ++round) {
        const int k = (round * WARPS + warp) * SPAN;
        if (k < K) {
            std::uint32_t b[STEPS][1][2];
            read_tokens<T, Span<Weights>::alternate>(b, tokens, k, K);
            span.ready();
            float sum[1][1][4] = {};
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block) {
                std::uint32_t both[2][4];
                span.operands(both, block);
#pragma unroll
                for (int step = 0; step < 2; ++step) {
                    const std::uint32_t a[1][4] = {{both[step][0], both[step][1], both[step][2], both[step][3]}};
                    mma_step(Fragments<T, 1, 1>{sum, a, b[2 * block + step]});
                }
                if ((block + 1) % (BLOCKS / PARTS) != 0) continue;
                const int part = warp * PARTS + block * PARTS / BLOCKS;
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const int row = 2 * t + r % 2, feature = g + 8 * (r / 2);
                    sums[part][row * PITCH + feature] = add_chunk<T>(0.0f, sum[0][0][r], span.scale(block, r / 2));
                    sum[0][0][r] = 0;
                }
            }
        }
        span.read(from, k + WARPS * SPAN, K);
        __syncthreads();
        const int parts = min(WARPS * PARTS, chunks - round * WARPS * PARTS);
        if (number < TILE_N * count) {
            const float* first_sum = &sums[0][m * PITCH + n];
#pragma unroll 4
            for (int part = 0; part < parts; ++part) result = __fadd_rn(result, first_sum[part * TILE_M * PITCH]);
        }
        __syncthreads();
    }
    if (number < TILE_N * count && n0 + n < N) output.write(tile, tile.y_row(m), n0 + n, result);
}
