// The path for many rows of 16-bit weights on Hopper, with the bits of the other paths (gemm.cuh).
//
// A block owns 128 MB features x TOKENS rows. One warpgroup asks the copy engine (tensor_map.cuh) for chunks of 128 k of both, two
// multiply: of every piece of 128 features 64 each, with the chunk's tokens, both from shared memory. Pieces of weights and chunks
// of tokens have a ring of places each. The BLOCKS blocks of a cluster have the same features and neighbouring rows: each asks
// for its share of a piece, which the engine brings to all.
//
// Who multiplies waits until a piece, and the tokens if it is a chunk's first, have arrived, and tells when they have been used:
// of a piece all blocks that bring parts of it. Where all threads of the block meet instead (wgmma.cuh), meeting h is the one
// in which piece h has arrived and piece h - 1 has been used.
#pragma once

#include "gemm_stage.cuh"
#include "tensor_map.cuh"

constexpr int DENSE_GROUPS = 2, DENSE_THREADS = (DENSE_GROUPS + 1) * GROUP_THREADS, PIECE_ROWS = DENSE_GROUPS * GROUP_ROWS;
constexpr int PANEL = 4096;  // features whose blocks come before those of others, so that the second-level cache holds their weights

template <int MB, int TOKENS> struct DenseShared {
    static constexpr int features = MB * PIECE_ROWS;
    static constexpr int chunks = TOKENS > 64 ? 3 : 4, pieces = MB > 1 ? 4 : chunks;  // places
    static_assert(pieces <= MB * (chunks - 1) + 1);  // tokens that come with a piece find their place free if the piece does
    alignas(1024) unsigned char weights[pieces][STAGE_K / SWIZZLE_K][PIECE_ROWS * 2 * SWIZZLE_K];
    unsigned char tokens[chunks][STAGE_K / SWIZZLE_K][TOKENS * 2 * SWIZZLE_K];
    long long written[TOKENS];  // rows of y
    Meeting there[pieces], used[pieces], tokens_used[chunks];
};

// Which features and rows this block has, in blocks: those of a panel first, of these all rows.
struct DensePlace {
    int features, rows;
};
template <int FEATURES, int BLOCKS> __device__ inline DensePlace dense_place() {
    constexpr int wide = PANEL / FEATURES;
    const int across = gridDim.x, down = gridDim.y / BLOCKS, at = blockIdx.y / BLOCKS * across + blockIdx.x;
    const int panel = at / (wide * down), here = at - panel * wide * down, width = min(wide, across - panel * wide);
    return {panel * wide + here % width, here / width * BLOCKS + static_cast<int>(blockIdx.y) % BLOCKS};
}

// Scales of a lane's two rows, of 128 k, a byte each; zeros past K.
struct DenseScales {
    std::uint32_t words[2];
    template <class T> __device__ void read(const Dense<T>& weights, const long long (&rows)[2], int c) {
        const int blocks = weights.K / MX_BLOCK, first = c * (STAGE_K / MX_BLOCK);
        const bool whole = (reinterpret_cast<std::uintptr_t>(weights.scales) | blocks) % 4 == 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const std::uint8_t* const from = weights.scales + rows[i] * blocks + first;
            if (whole) words[i] = *reinterpret_cast<const std::uint32_t*>(from);
            else {
                words[i] = 0;
#pragma unroll
                for (int b = 0; b < 4; ++b)
                    if (first + b < blocks) words[i] |= static_cast<std::uint32_t>(from[b]) << 8 * b;
            }
        }
    }
    // Bytes 26 to 127, with which every product with a sum of half products is exact.
    __device__ bool usual() const {
        const auto rare = [](std::uint32_t bytes) { return (bytes | ((bytes | 0x80808080u) - 0x1a1a1a1au) ^ 0x80808080u) & 0x80808080u; };
        return (rare(words[0]) | rare(words[1])) == 0;
    }
};

template <class T, int MB, int TOKENS, int BLOCKS>
__device__ inline void multiply_dense_wide(const Output<T>& output, const Dense<T>& weights, const Rows& rows, const TensorMap& of_x,
                                           const TensorMap& of_w) {
    using Shared = DenseShared<MB, TOKENS>;
    constexpr int NT = TOKENS / 8, features = Shared::features, PIECES = Shared::pieces, CHUNKS = Shared::chunks;
    constexpr int warps = GROUP_THREADS / WARP, most = 240;
    constexpr int SPANS = STAGE_K / Order<T>::chunk, STEPS = Order<T>::chunk / MMA_K;  // sums of a piece; steps of a sum
    static_assert(SPANS == 1 || MB == 1);
    SHARED_ARENA(arena, sizeof(Shared));
    Shared& shared = *reinterpret_cast<Shared*>(arena);
    const int thread = opaque(threadIdx.x), group = thread / GROUP_THREADS, N = output.N, K = weights.K;
    const DensePlace place = dense_place<features, BLOCKS>();
    Tile tile = {static_cast<int>(blockIdx.z), place.rows * TOKENS, rows.M, 0, &rows};
    const int live = max(min(tile.count - tile.first, TOKENS), 0), n0 = place.features * features;
    if (thread < PIECES) {
        open_meeting(shared.there[thread], warps);
        open_meeting(shared.used[thread], BLOCKS * DENSE_GROUPS * warps);
        if (thread < CHUNKS) open_meeting(shared.tokens_used[thread], DENSE_GROUPS * warps);
        publish_meetings();
    }
    meet_cluster<BLOCKS>();  // the meetings are open

    const int chunks = (K + STAGE_K - 1) / STAGE_K, pieces = chunks * MB;
    if (group == DENSE_GROUPS) {
        keep_registers<3 * 168 - DENSE_GROUPS * most>();
        const int first_feature = tile.problem * N + n0, first_token = tile.problem * rows.x_step + tile.first;
#pragma unroll 1
        for (int h = 0; h < pieces; ++h) {
            const int at = h % PIECES, c = h / MB;
            wait_async<PIECES - 2>();
            if (h >= PIECES - 1) meet();
            if (h >= PIECES) await(shared.used[at], h / PIECES - 1);
            bring_tiles_to_all<PIECE_ROWS, BLOCKS>(shared.weights[at], of_w, first_feature + h % MB * PIECE_ROWS, c * STAGE_K, shared.there[at]);
            if (h % MB == 0) {
                if (c >= CHUNKS) await(shared.tokens_used[c % CHUNKS], c / CHUNKS - 1);
                bring_tiles<TOKENS>(shared.tokens[c % CHUNKS], of_x, first_token, c * STAGE_K, shared.there[at]);
            }
            commit_async();
            arrive(shared.there[at]);
        }
        wait_async<0>();
        for (int left = min(pieces, PIECES - 1); left > 0; --left) meet();
        __syncthreads();  // all pieces have been used
        __syncthreads();
    } else {
        keep_registers<most>();
        if (thread < live) shared.written[thread] = tile.y_row(thread);
        const int lane = thread % 32, g = lane / 4, t = lane % 4, first_feature = thread / 32 * 16 + g;
        float total[MB][NT][4] = {}, sums[SPANS > 1 ? 2 : 1][NT][4];
        long long feature_rows[2];
        DenseScales now = {{0x7f7f7f7fu, 0x7f7f7f7fu}}, next = now;
        const bool scaled = SPANS > 1 && weights.scales != nullptr;
        if (scaled) {
#pragma unroll
            for (int i = 0; i < 2; ++i) feature_rows[i] = static_cast<long long>(tile.problem) * N + min(n0 + first_feature + 8 * i, N - 1);
            next.read(weights, feature_rows, 0);
        }
        // A span's sums join the total. Past K there are zeros, but their scale may be none.
        const auto add = [&](int mb, int span, int k) {
            const auto join = [&](auto exactly) {
                float scales[2] = {1, 1};
                if (SPANS > 1) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) scales[i] = decode_scale(now.words[i] >> 8 * span & 0xff);
                }
#pragma unroll
                for (int j = 0; j < NT; ++j)
#pragma unroll
                    for (int r = 0; r < 4; ++r)
                        total[mb][j][r] = join_chunk<T, decltype(exactly)::value>(total[mb][j][r], sums[span % 2][j][r], scales[r / 2]);
            };
            if (SPANS == 1 || now.usual()) join(std::true_type());
            else if (k < K) join(std::false_type());
        };
#pragma unroll 1
        for (int c = 0; c < chunks; ++c) {
            if (scaled) {
                now = next;
                next.read(weights, feature_rows, min(c + 1, chunks - 1));
            }
#pragma unroll
            for (int mb = 0; mb < MB; ++mb) {
                const int h = c * MB + mb, at = h % PIECES;
                const auto& tiles = shared.tokens[c % CHUNKS];
                meet();
                await(shared.there[at], h / PIECES);
                Columns weights_at[2], tokens_at[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    weights_at[half] = columns_of(shared.weights[at][half] + group * (GROUP_ROWS * 2 * SWIZZLE_K));
                    tokens_at[half] = columns_of(tiles[half]);
                }
                // Past K there are zeros, which change no bit, and past the features nobody's rows; on the CPU both are left out.
                const bool whose = n0 + (mb * DENSE_GROUPS + group) * GROUP_ROWS < N;
#pragma unroll
                for (int span = 0; span < SPANS; ++span) {
                    group_fence();
#pragma unroll
                    for (int i = 0; i < STEPS; ++i) {
                        const int step = span * STEPS + i;
                        const bool wanted = whose && c * STAGE_K + step * MMA_K < K;
                        group_step_shared<T>(sums[span % 2], weights_at[step / 4], tokens_at[step / 4], step % 4, i == 0, wanted ? live : 0);
                    }
                    group_commit();
                    if (span == 0) continue;
                    group_wait<1>(sums[(span - 1) % 2]);
                    belongs(sums[(span - 1) % 2]);
                    add(mb, span - 1, c * STAGE_K + (span - 1) * MX_BLOCK);
                }
                group_wait<0>(sums[(SPANS - 1) % 2]);
                arrive_everywhere<BLOCKS>(shared.used[at]);
                if (mb == MB - 1) arrive(shared.tokens_used[c % CHUNKS]);
                add(mb, SPANS - 1, c * STAGE_K + (SPANS - 1) * MX_BLOCK);
            }
        }

        // Results go through shared memory so that neighbours are written together.
        constexpr int pitch = features + 4;
        float* results = reinterpret_cast<float*>(arena);
        static_assert(sizeof shared.weights + sizeof shared.tokens >= sizeof(float) * pitch * TOKENS);
        __syncthreads();  // all pieces have been used
#pragma unroll
        for (int mb = 0; mb < MB; ++mb)
#pragma unroll
            for (int j = 0; j < NT; ++j)
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    results[(8 * j + 2 * t + r % 2) * pitch + first_feature + mb * PIECE_ROWS + 8 * (r / 2)] = total[mb][j][r];
        __syncthreads();
        write_rows<features, DENSE_GROUPS * GROUP_THREADS>(output, tile, n0, live, results, pitch, thread,
                                                           [&](int m) { return shared.written[m]; });
    }
    meet_cluster<BLOCKS>();  // nobody tells a block that is gone
}
