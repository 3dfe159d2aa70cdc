// Few rows: a warp multiplies spans of 128 k of 16 MT features by 8 NT rows, with AHEAD spans of weights on their way
// from memory. Either WARPS_K warps of a block take the spans of K in turn and leave their chunks' sums in shared memory,
// or each of WARPS_N warps has features of its own and all of K.
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

// Columns of tokens as `span` wants them, b[step][j]: of row 8 j + g the lane's 4 k of a step. Past K there are zeros.
template <class T, bool alternate, int NT>
__device__ inline void read_tokens(std::uint32_t (&b)[STEPS][NT][2], const T* const (&rows)[NT], int k, int K) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int j = 0; j < NT; ++j) {
            uint2 piece = make_uint2(0, 0);
            if (k + step * MMA_K < K) piece = *reinterpret_cast<const uint2*>(rows[j] + k + step * MMA_K);
            b[step][j][0] = alternate ? __byte_perm(piece.x, piece.y, 0x5410) : piece.x;
            b[step][j][1] = alternate ? __byte_perm(piece.x, piece.y, 0x7632) : piece.y;
        }
}

template <class T, class Weights, int WARPS_K, int WARPS_N, int MT, int NT, int AHEAD>
__device__ inline void multiply_few(const Output<T>& output, const T* __restrict__ x, const Weights& weights,
                                    const Rows& rows) {
    constexpr int chunk = Order<T>::chunk, PARTS = SPAN / chunk;  // chunks of a span
    static_assert(SPAN % chunk == 0 && chunk % MX_BLOCK == 0);
    constexpr int TILE_N = 16 * MT, TILE_M = 8 * NT;
    constexpr int PITCH = TILE_N + 4;  // spreads a warp's sums over the banks
    constexpr int THREADS = WARPS_K * WARP, EACH = (TILE_N * TILE_M + THREADS - 1) / THREADS;
    constexpr bool split = WARPS_K > 1;
    static_assert(!split || WARPS_N == 1);
    __shared__ float sums[split ? WARPS_K * PARTS : 1][TILE_M * PITCH];  // a round's, times their scale
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int warp_k = warp % WARPS_K, n0 = (blockIdx.x * WARPS_N + warp / WARPS_K) * TILE_N;
    const int N = output.N, K = weights.K;
    Tile tile;
    if (!locate(tile, rows, TILE_M)) return;
    const int count = min(tile.count - tile.first, TILE_M);

    // Past the last feature or row the last or first is read instead: what comes of it is not written.
    typename Span<Weights>::From from[MT];
#pragma unroll
    for (int i = 0; i < MT; ++i) {
        const int first = min(n0 + 16 * i, N - 1);
        from[i] = Span<Weights>::from(weights, static_cast<long long>(tile.problem) * N + first, N - 1 - first);
    }
    const T* tokens[NT];
#pragma unroll
    for (int j = 0; j < NT; ++j) tokens[j] = x + tile.x_row(8 * j + g < count ? 8 * j + g : 0) * K + 4 * t;

    const int chunks = (K + chunk - 1) / chunk, rounds = (K + WARPS_K * SPAN - 1) / (WARPS_K * SPAN);
    Span<Weights> spans[AHEAD][MT];
#pragma unroll
    for (int ahead = 0; ahead < AHEAD; ++ahead)
#pragma unroll
        for (int i = 0; i < MT; ++i) spans[ahead][i].read(from[i], (ahead * WARPS_K + warp_k) * SPAN, K);

    float total[MT][NT][4] = {};  // of a warp's features, where K is not split
    float result[EACH] = {};      // where it is: of number threadIdx.x, + THREADS, .., a row's features first
    for (int first = 0; first < rounds; first += AHEAD)
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ++ahead) {
            const int round = first + ahead, k = (round * WARPS_K + warp_k) * SPAN;
            if (round >= rounds) break;
            if (k < K) {
                std::uint32_t b[STEPS][NT][2];
                read_tokens<T, Span<Weights>::alternate>(b, tokens, k, K);
#pragma unroll
                for (int i = 0; i < MT; ++i) spans[ahead][i].ready();
                float sum[MT][NT][4] = {};
#pragma unroll
                for (int block = 0; block < BLOCKS; ++block) {
                    std::uint32_t both[MT][2][4];
#pragma unroll
                    for (int i = 0; i < MT; ++i) spans[ahead][i].operands(both[i], block);
#pragma unroll
                    for (int step = 0; step < 2; ++step) {
                        std::uint32_t a[MT][4];
#pragma unroll
                        for (int i = 0; i < 4 * MT; ++i) a[i / 4][i % 4] = both[i / 4][step][i % 4];
                        mma_step(Fragments<T, MT, NT>{sum, a, b[2 * block + step]});
                    }
                    if ((block + 1) % (BLOCKS / PARTS) != 0) continue;
                    const int part = warp_k * PARTS + block * PARTS / BLOCKS;
#pragma unroll
                    for (int i = 0; i < MT; ++i)
#pragma unroll
                        for (int j = 0; j < NT; ++j)
#pragma unroll
                            for (int r = 0; r < 4; ++r) {
                                const int m = 8 * j + 2 * t + r % 2, n = 16 * i + g + 8 * (r / 2);
                                const float scale = spans[ahead][i].scale(block, r / 2);
                                if (!split) total[i][j][r] = add_chunk<T>(total[i][j][r], sum[i][j][r], scale);
                                else sums[part][m * PITCH + n] = add_chunk<T>(0.0f, sum[i][j][r], scale);
                                sum[i][j][r] = 0;
                            }
                }
            }
#pragma unroll
            for (int i = 0; i < MT; ++i) spans[ahead][i].read(from[i], k + AHEAD * WARPS_K * SPAN, K);
            if (!split) continue;
            __syncthreads();
            const int parts = min(WARPS_K * PARTS, chunks - round * WARPS_K * PARTS);
#pragma unroll
            for (int each = 0; each < EACH; ++each) {
                const int number = threadIdx.x + each * THREADS;
                if (number >= TILE_N * count) break;
                const float* first_sum = &sums[0][number / TILE_N * PITCH + number % TILE_N];
#pragma unroll 4
                for (int part = 0; part < parts; ++part)
                    result[each] = __fadd_rn(result[each], first_sum[part * TILE_M * PITCH]);
            }
            __syncthreads();
        }
    if (!split) {
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int j = 0; j < NT; ++j)
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    output.write(tile, 8 * j + 2 * t + r % 2, n0 + 16 * i + g + 8 * (r / 2), total[i][j][r]);
    } else {
#pragma unroll
        for (int each = 0; each < EACH; ++each) {
            const int number = threadIdx.x + each * THREADS;
            if (number < TILE_N * count) output.write(tile, number / TILE_N, n0 + number % TILE_N, result[each]);
        }
    }
}
