// A warpgroup's asynchronous steps (wgmma.cuh) on the CPU: made by the wait that covers them, for all 128 lanes at once, from
// what the registers and the tiles of tokens hold then. A wait that is missing or leaves a group too many, and an operand
// that does not last, give other results, as they may on a GPU.
#pragma once

#include "tensor_core.h"

namespace cpu {

// Columns tiles at once, and steps whose sums need not go back to the registers between them.
constexpr int GROUP_TILES = 4, GROUP_TOGETHER = 2;

struct GroupWork {
    Side<GROUP_ROWS> weights[GROUP_TOGETHER];
    Side<8 * GROUP_TILES> tokens;
    alignas(64) float d[GROUP_ROWS][8 * GROUP_TILES];
};

// Tokens from row 8 j on, as columns in the order of `exchange`.
inline void gather_tokens(Side<8 * GROUP_TILES>& to, const char* tile, int step, int j) {
    using Four = Pack<std::uint32_t, 4>;
    for (int half = 0; half < 2; ++half)
        for (int i = 0; i < GROUP_TILES; ++i)
            for (int piece = 0; piece < 2; ++piece) {
                Four words[4];
                for (int l = 0; l < 4; ++l)
                    words[l] = load<Four>(tile + swizzled(8 * (j + i) + 4 * half + l, 2 * step + piece));
                transpose(words);
                for (int w = 0; w < 4; ++w)
                    store(&to.pairs[4 * piece + w][4 * (half * GROUP_TILES + i)], words[w]);
            }
}

// The same of tiles of 64 columns by 64 k that follow one another.
inline void gather_across(Side<8 * GROUP_TILES>& to, const char* tiles, int step, int j) {
    for (int i = 0; i < GROUP_TILES; ++i)
        for (int pair = 0; pair < 8; ++pair) {
            const char* tile = tiles + (j + i) / 8 * (SWIZZLE_K * 128);
            const int k = MMA_K * step + 2 * pair;
            std::uint16_t rows[2][8];
            for (int odd = 0; odd < 2; ++odd) std::memcpy(rows[odd], tile + swizzled(k + odd, (j + i) % 8), sizeof rows[odd]);
            for (int column = 0; column < 8; ++column)
                to.pairs[pair][4 * (column / 4 * GROUP_TILES + i) + column % 4] = rows[0][column] | std::uint32_t{rows[1][column]} << 16;
        }
}

// The 64 rows of a tile, as `gather_rows` would have them.
inline void gather_tile_rows(Side<GROUP_ROWS>& to, const char* tile, int step) {
    for (int row = 0; row < GROUP_ROWS; ++row)
        for (int pair = 0; pair < 8; ++pair)
            std::memcpy(&to.pairs[pair][row], tile + swizzled(row, 2 * step + pair / 4) + pair % 4 * 4, 4);
}

// `count` steps of 128 lanes, from their at-th on, that add to the same registers.
template <class T, int NT, bool across = false> void group_steps(const Steps* const* lanes, unsigned at, unsigned count) {
    static_assert(sizeof(GroupWork) <= SCRATCH && NT % GROUP_TILES == 0);
    auto& [weights, tokens, d] = *static_cast<GroupWork*>(scratch());
    const GroupStep& one = lanes[0]->at(at);
    for (unsigned i = 0; i < count; ++i) {
        const GroupStep& now = lanes[0]->at(at + i);
        if (now.rows != nullptr) gather_tile_rows(weights[i], static_cast<const char*>(now.rows), now.step);
        for (int warp = 0; now.rows == nullptr && warp < GROUP_ROWS / 16; ++warp)
            gather_rows(weights[i], 16 * warp, [&](int lane) { return lanes[32 * warp + lane]->at(at + i).a; });
        prepare<T>(weights[i]);
    }
    for (int j = 0; j < NT; j += GROUP_TILES) {
        const bool live = 8 * j < one.live;
        if (!live && !one.first) continue;
        const auto move = [&](auto back) {
            for (int warp = 0; warp < GROUP_ROWS / 16; ++warp)
                exchange<decltype(back)::value, GROUP_TILES>(
                    d + 16 * warp, [&](int lane) { return lanes[32 * warp + lane]->at(at).d + 4 * j; });
        };
        if (one.first) std::memset(d, 0, sizeof d);
        else move(std::false_type());
        for (unsigned i = 0; i < count && live; ++i) {
            const GroupStep& now = lanes[0]->at(at + i);
            (across ? gather_across : gather_tokens)(tokens, static_cast<const char*>(now.tile), now.step, j);
            prepare<T>(tokens);
            multiply<T>(d, weights[i], tokens);
        }
        move(std::true_type());
    }
}

inline void run_steps(void* const* deposits) {
    const auto lanes = reinterpret_cast<const Steps* const*>(deposits);
    const Steps& mine = *lanes[0];
    for (unsigned at = 0, count; at < mine.due; at += count) {
        const GroupStep& one = mine.at(at);
        const auto joins = [&](const GroupStep& next) { return next.run == one.run && next.d == one.d && !next.first; };
        for (count = 1; count < GROUP_TOGETHER && at + count < mine.due && joins(mine.at(at + count));) ++count;
        one.run(lanes, at, count);
    }
}

// What a lane's own unit would read of the tokens, for those who check every access (checker.cpp): all columns, also those
// that are not wanted; but none past K, where this CPU has no step.
inline void look_at([[maybe_unused]] const GroupStep& asked) {
#ifdef __SANITIZE_THREAD__
    if (asked.across) {
        for (int i = threadIdx.x % 128; i < MMA_K * asked.columns / 2; i += 128) {
            const int k = MMA_K * asked.step + i / (asked.columns / 2), column = i % (asked.columns / 2) * 2;
            const char* tile = static_cast<const char*>(asked.tile) + column / 64 * (SWIZZLE_K * 128);
            const std::uint32_t word =
                *reinterpret_cast<const std::uint32_t*>(tile + swizzled(k, column % 64 / 8) + column % 8 * 2);
            asm volatile("" ::"r"(word));
        }
        return;
    }
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int first_row = threadIdx.x % 128 / 32 * 16 + g;  // and the one 8 further on
    for (int row = first_row; asked.rows != nullptr && asked.live > 0 && row < first_row + 16; row += 8)
        for (int piece = 2 * asked.step; piece < 2 * asked.step + 2; ++piece) {
            const std::uint32_t word = *reinterpret_cast<const std::uint32_t*>(
                static_cast<const char*>(asked.rows) + swizzled(row, piece) + 4 * t);
            asm volatile("" ::"r"(word));
        }
    for (int row = g; asked.live > 0 && row < asked.columns; row += 8)
        for (int piece = 2 * asked.step; piece < 2 * asked.step + 2; ++piece) {
            const std::uint32_t word = *reinterpret_cast<const std::uint32_t*>(
                static_cast<const char*>(asked.tile) + swizzled(row, piece) + 4 * t);
            asm volatile("" ::"r"(word));
        }
#endif
}

// The oldest `due` steps of all lanes.
inline void make_steps(Steps& steps, unsigned due) {
    for (unsigned i = 0; i < due; ++i) look_at(steps.at(i));
    steps.due = due;
    group_collective(&steps, &run_steps);
    for (unsigned i = 0; i < due; ++i) steps.pop();
}

// One more step, in the group that the next commit ends.
inline void ask(GroupStep step) {
    Steps& steps = self->steps;
    if (steps.full()) make_steps(steps, steps.size());
    step.group = steps.groups;
    steps.push(step);
    look_at(steps.at(steps.size() - 1));
}

}  // namespace cpu

inline void group_fence() {}
inline void group_commit() { ++cpu::self->steps.groups; }
template <int pending, int NT> inline void group_wait(float (&)[NT][4]) {
    cpu::Steps& steps = cpu::self->steps;
    unsigned due = 0;
    while (due < steps.size() && steps.at(due).group + pending < steps.groups) ++due;
    if (due > 0) cpu::make_steps(steps, due);
}
template <int NT> inline void belongs(float (&)[NT][4]) {}
template <int N> inline void keep_until_here(const std::uint32_t (&)[N][4], std::uint32_t) {}
inline void open_meeting(Meeting&, int) {}
inline void arrive(Meeting&) {}
inline void await(Meeting&, int) {}
inline void meet() { __syncthreads(); }
inline void publish_shared() {}
#define CLUSTER_OF(blocks)
inline void publish_meetings() {}
template <int BLOCKS> inline void meet_cluster() { __syncthreads(); }
template <int BLOCKS> inline void arrive_everywhere(Meeting&) {}
template <int count, int launched = 168> inline void keep_registers() {}

template <class T, int NT>
inline void group_step(float (&d)[NT][4], const std::uint32_t (&a)[4], const void* tile, int step, bool first, int live) {
    cpu::ask({&cpu::group_steps<T, NT>, d[0], a, nullptr, tile, step, live, 8 * NT, first, false, 0});
}
template <class T, int NT>
inline void group_step_shared(float (&d)[NT][4], const void* rows, const void* tile, int step, bool first, int live) {
    cpu::ask({&cpu::group_steps<T, NT>, d[0], nullptr, rows, tile, step, live, 8 * NT, first, false, 0});
}
template <class T, int NT>
inline void group_step_across(float (&d)[NT][4], const std::uint32_t (&a)[4], const void* tiles, int step, bool first) {
    cpu::ask({&cpu::group_steps<T, NT, true>, d[0], a, nullptr, tiles, step, 8 * NT, 8 * NT, first, true, 0});
}
