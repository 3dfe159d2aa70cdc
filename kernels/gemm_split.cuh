// The path for up to some hundred rows on Hopper, where whole tiles are too few to occupy all multiprocessors and one
// warpgroup's walk through K takes too long: a block owns 64 features x TOKENS rows, and four warpgroups take its chunks
// in turn. The bits are those of the other paths (gemm.cuh), because chunks' sums join the totals in ascending order.
//
// A fifth warpgroup brings stages of 512 k, up to three under way. A round is four chunks, a warpgroup's one each: it
// multiplies, and leaves its sums, times their scales, in shared memory as its lanes hold them. In the next round, while
// the tensor core works, each thread adds the four sums of the numbers it owns to their totals.
//
// Every thread of the block meets at the same barriers, 3 and one a round, whatever the data; between the barriers that
// begin rounds r and r + 1
//   read        stage s of round r, which had arrived; the sums of round r - 1
//   written     the sums of round r, into the other half of their place; codes of stage s + 1 and tokens and scales of
//               stage s + 2, over stages s - 2 and s - 1, whose last rounds have ended
#pragma once

#include "gemm_stage.cuh"

constexpr int SPLIT_GROUPS = 4, SPLIT_THREADS = (SPLIT_GROUPS + 1) * GROUP_THREADS, SPLIT_STAGES = 3;
constexpr int SPLIT_K = SCALES_OF * STAGE_K;  // of a stage: what one read of scales covers

template <int TOKENS> struct SplitShared {
    struct alignas(1024) {
        Stage<GROUP_ROWS, TOKENS> parts[SCALES_OF];
        uint4 scales[GROUP_ROWS];
    } stages[SPLIT_STAGES];
    float4 sums[2][SPLIT_GROUPS][TOKENS / 8][GROUP_THREADS];  // of a round with an even and an odd number
    uint4 token_rows[GROUP_THREADS];                          // of loading threads, see Tokens
    int extreme[SPLIT_STAGES];                                // which stage at this place had extreme scales last
};

template <class T, int TOKENS>
__device__ inline void multiply_split(const Output<T>& output, const T* __restrict__ x, const Packed<T>& weights, const Rows& rows) {
    using Shared = SplitShared<TOKENS>;
    constexpr int NT = TOKENS / 8, OWN = NT / SPLIT_GROUPS, chunk = Order<T>::chunk, blocks = chunk / MX_BLOCK;
    constexpr int rounds_of = SPLIT_K / (SPLIT_GROUPS * chunk), blocks_of = STAGE_K / MX_BLOCK;
    static_assert(NT % SPLIT_GROUPS == 0 && blocks_of % blocks == 0);
    SHARED_ARENA(arena, sizeof(Shared));
    Shared& shared = *reinterpret_cast<Shared*>(arena);
    const int thread = threadIdx.x, place = thread % GROUP_THREADS;
    const int group = shuffle(thread / GROUP_THREADS, 0);  // one number a warp, as the compiler now knows
    const int n0 = blockIdx.x * GROUP_ROWS, N = output.N, K = weights.K;
    Tile tile;
    if (!locate(tile, rows, TOKENS)) return;
    const int live = min(tile.count - tile.first, TOKENS), features_live = min(N - n0, GROUP_ROWS);
    const long long first_row = static_cast<long long>(tile.problem) * N + n0;
    if (thread < SPLIT_STAGES) shared.extreme[thread] = -1;
    __syncthreads();

    const int chunks = (K + chunk - 1) / chunk, rounds = (chunks + SPLIT_GROUPS - 1) / SPLIT_GROUPS;
    if (group == SPLIT_GROUPS) {
        const std::uint8_t* const all_codes = weights.codes + first_row * (K / 2);
        CodesAhead<GROUP_ROWS, SCALES_OF> codes;
        const Tokens<TOKENS, 16> tokens = {&shared.token_rows[place]};
        tokens.find(tile, live, K);
        const auto load = [&](int s) {
            auto& stage = shared.stages[s % SPLIT_STAGES];
            const uint4* from = reinterpret_cast<const uint4*>(x);
            if (place < GROUP_ROWS)
                load_scales(&stage.scales[place], weights, first_row + place, place < features_live, s * SPLIT_K);
            if ((s + 1) * SPLIT_K <= K) tokens.template load<true, SCALES_OF>(stage.parts, from, s * SCALES_OF, K, live);
            else tokens.template load<false, SCALES_OF>(stage.parts, from, s * SCALES_OF, K, live);
            commit_async();
        };
        const auto read_codes = [&](int s) { codes.read(all_codes, min(s, (K - 1) / SPLIT_K) * SCALES_OF, K, features_live); };
        const auto write_codes = [&](int s) {
#pragma unroll
            for (int part = 0; part < SCALES_OF; ++part) codes.write(shared.stages[s % SPLIT_STAGES].parts[part].codes, part);
        };
        read_codes(0);
        load(0);
        load(1);
        write_codes(0);
        read_codes(1);
#pragma unroll 1
        for (int r = 0; r < rounds; ++r) {
            const int s = r / rounds_of, left = K / MX_BLOCK - s * SCALES;
            if (r % rounds_of == 0) {
                wait_async<1>();
                // Each thread looks at what it brought.
                if (place < features_live && has_extreme<T>(shared.stages[s % SPLIT_STAGES].scales[place], left))
                    shared.extreme[s % SPLIT_STAGES] = s;
                publish_shared();
            }
            __syncthreads();  // the stage has arrived; the one before has been read
            if (r % rounds_of != 0) continue;
            write_codes(s + 1);
            read_codes(s + 2);
            load(s + 2);
        }
        wait_async<0>();
        __syncthreads();
        __syncthreads();
    } else {
        const int lane = thread % 32, g = lane / 4, t = lane % 4, row = place / 32 * 16 + g;
        float total[OWN][4] = {};
        const auto add = [&](int r, int parts) {
#pragma unroll
            for (int own = 0; own < OWN; ++own)
#pragma unroll
                for (int part = 0; part < SPLIT_GROUPS; ++part) {
                    if (part >= parts) break;
                    const float4 sum = shared.sums[r % 2][part][group + SPLIT_GROUPS * own][place];
                    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
                    for (int i = 0; i < 4; ++i) total[own][i] = __fadd_rn(total[own][i], values[i]);
                }
        };
        const auto multiply = [&](int r, auto extreme) {
            constexpr bool any_scale = decltype(extreme)::value;
            const int s = r / rounds_of, first = (r % rounds_of * SPLIT_GROUPS + group) * blocks;  // block of the stage
            const auto& stage = shared.stages[s % SPLIT_STAGES];
            const auto& part = stage.parts[first / blocks_of];
            const int within = first % blocks_of;
            Operand32<T> operands[2];  // one for the tensor core, one that is being decoded
            std::uint32_t words[2];
            std::uint32_t codes[2];
            float sum[NT][4], scales[2];
            const auto fetch = [&](int block) {
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    codes[i] = *reinterpret_cast<const std::uint32_t*>(
                        part.codes[row + 8 * i] + (lane_codes_at(g, t) ^ 16 * (within + block)));
            };
            fetch(0);
#pragma unroll
            for (int i = 0; i < 2; ++i)
                words[i] = reinterpret_cast<const std::uint32_t*>(&stage.scales[row + 8 * i])[first / blocks_of];
            operands[0].template decode<any_scale>(codes, words, within);
#pragma unroll
            for (int block = 0; block < blocks; ++block) {
                if (block + 1 < blocks) fetch(block + 1);
                const Columns tokens = columns_of(part.tokens[(within + block) / 2]);
                // Past K there are zeros, which change no bit; on the CPU they are left out.
                const int columns = s * SPLIT_K + (first + block) * MX_BLOCK < K ? live : 0;
                group_fence();
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    group_step<T, NT>(sum, operands[block % 2].a[half], tokens, (within + block) % 2 * 2 + half, block + half == 0, columns);
                group_commit();
                if (block == 0 && r > 0) add(r - 1, SPLIT_GROUPS);
                if (block + 1 == blocks) continue;
                group_wait<1>(sum);  // the block before is done
                operands[(block + 1) % 2].template decode<any_scale>(codes, words, within + block + 1);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const std::uint32_t byte = Operand32<T>::byte_of(words[i], within);
                scales[i] = any_scale ? decode_scale(byte) : plain_scale(byte);
            }
            group_wait<0>(sum);
#pragma unroll
            for (int j = 0; j < NT; ++j) {
                float values[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) values[i] = Order<T>::scale_operand ? sum[j][i] : __fmul_rn(sum[j][i], scales[i / 2]);
                shared.sums[r % 2][group][j][place] = make_float4(values[0], values[1], values[2], values[3]);
            }
        };
#pragma unroll 1
        for (int r = 0; r < rounds; ++r) {
            __syncthreads();  // this stage has arrived, and the sums of the round before
            const int s = r / rounds_of;
            if (r * SPLIT_GROUPS + group >= chunks) {  // of the last round
                if (r > 0) add(r - 1, SPLIT_GROUPS);
            } else if (shared.extreme[s % SPLIT_STAGES] == s) {
                multiply(r, std::true_type());
            } else {
                multiply(r, std::false_type());
            }
        }
        __syncthreads();
        add(rounds - 1, chunks - (rounds - 1) * SPLIT_GROUPS);

        // Results go through shared memory so that neighbours are written together.
        constexpr int pitch = GROUP_ROWS + 4;
        float* results = reinterpret_cast<float*>(arena);
        static_assert(sizeof shared.stages >= sizeof(float) * pitch * TOKENS);
#pragma unroll
        for (int own = 0; own < OWN; ++own)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                results[(8 * (group + SPLIT_GROUPS * own) + 2 * t + i % 2) * pitch + row + 8 * (i / 2)] = total[own][i];
        __syncthreads();
        write_rows<GROUP_ROWS, SPLIT_GROUPS * GROUP_THREADS>(output, tile, n0, live, results, pitch, thread,
                                                             [&](int m) { return tile.y_row(m); });
    }
}
