// What the parts of the host runtime know of each other: the scheduler (runtime.cpp), the launch and its threads
// (launch.cpp), what ends a launch that goes wrong (traps.cpp) and the checker of single accesses (checker.cpp).
#pragma once

#include "context.h"
#include "cuda_on_cpu.h"

#include <atomic>
#include <csignal>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace cpu {

// A page that must not be touched lies below every stack, and its upper end is up to a page lower than it could be: see
// `Worker::make_fiber`.
constexpr std::size_t page = 4096, stack_guard = page, stack_bytes = 64 * 1024, stack_stride = stack_bytes + page;
constexpr int warp_size = 32, group_size = 128, most_threads = 1024;  // of a block, CUDA's limit

struct Settings {
    std::uint64_t seed = 0;  // of the order of blocks and threads; 0: ascending
    double seconds = 300;    // a launch may take; 0: for ever
    int poison = -1;         // the byte that fills shared memory when a block begins, and where a copy is on its way; -1: none
    unsigned checks = 0;     // of a checked library: see checker.cpp
};

// A kernel library as the loader placed it. Its thread-local block holds its __shared__ variables and nothing else.
struct Library {
    std::uintptr_t begin = 0, end = 0;
    std::size_t module = 0, shared_bytes = 0;
};

enum class Failure : int { none, kernel, access, time };  // device/host.py knows the numbers

struct Launch {
    dim3 grid, block;
    Body body;
    void* const* arguments;
    Settings settings;
    Library library;
    std::uint32_t serial = 0;
    std::atomic<std::uint64_t> next_block{0};
    std::uint64_t blocks = 0;
    std::mutex error_lock;
    Failure failure = Failure::none;
    std::string error;  // of an access: "@" stands for what lies at the address
    std::uintptr_t address = 0;
    std::atomic<bool> failed{false};

    void fail(Failure kind, std::string message, std::uintptr_t where = 0) {
        const std::lock_guard<std::mutex> guard(error_lock);
        if (failure == Failure::none) {
            failure = kind;
            error = std::move(message);
            address = where;
        }
        failed = true;
    }
};

// Lies at the upper end of its own stack, so that the stacks' address range covers it.
struct Fiber {
    Context context;
    void* stack = nullptr;
    std::uint32_t block = 0;  // the worker's serial number of the block that `thread` tells of
    Thread thread;

    // Lets it begin afresh, whatever it did.
    void prepare(void (*main)()) {
        context.prepare(stack, static_cast<std::size_t>(reinterpret_cast<char*>(this) - static_cast<char*>(stack)), main);
    }
};

// Fibers that can go on, in this order.
class Queue {
public:
    bool empty() const { return count_ == 0; }
    unsigned size() const { return count_; }
    Fiber*& operator[](unsigned i) { return ring_[(first_ + i) % most_threads]; }
    void push(Fiber* fiber) { ring_[(first_ + count_++) % most_threads] = fiber; }
    Fiber* pop() {
        --count_;
        return ring_[first_++ % most_threads];
    }
    void clear() { count_ = 0; }

private:
    Fiber* ring_[most_threads];
    unsigned first_ = 0, count_ = 0;
};

struct Meeting {  // of a warp or a warpgroup
    void* deposits[group_size];
    Fiber* waiting[group_size];
    int arrived = 0;
};

enum class Trap : int { none, memory, stack, arithmetic, instruction, time };

// Runs blocks, one at a time, on one operating-system thread.
class Worker {
public:
    ~Worker();
    void work(Launch& launch);  // blocks of `launch` until none is left
    bool next_thread();
    void barrier();
    void warp_collective(void* mine, Compute compute) { meet(warps_, warp_size, mine, compute); }
    void group_collective(void* mine, Compute compute) { meet(groups_, group_size, mine, compute); }
    void* scratch() { return scratch_; }

    // Ends the launch from within a signal handler; the message is made once the handler is left.
    [[noreturn]] void trap(Trap kind, std::uintptr_t address, int write);
    // Ends the launch with a message, from the thread that runs.
    [[noreturn]] void stop(Failure kind, std::string message, std::uintptr_t address = 0);
    bool in_kernel() const { return self != nullptr && !in_runtime_; }
    bool holds(std::uintptr_t address) const { return address - stacks_ < most_threads * stack_stride; }

    bool in_collective() const { return in_collective_; }  // works on the deposits, which are no kernel's memory

    Launch& launch() const { return *launch_; }
    std::uintptr_t shared() const { return shared_; }
    std::uint32_t block() const { return block_; }    // counts the blocks within the grid
    std::uint32_t serial() const { return serial_; }  // counts the blocks ever run by this worker
    std::uint32_t epoch() const { return epoch_; }    // counts the barriers of this block

private:
    void run_block(std::uint64_t index);
    void prepare_shared();
    void report_trap();
    void abandon();
    Fiber* make_fiber();
    static void fiber_main();
    void meet(std::vector<Meeting>& meetings, int size, void* mine, Compute compute);
    void refuse_pending();
    [[noreturn]] void serve();
    bool begin_thread();
    void begin(Fiber& fiber, int index) const;
    void wait();
    Context& enter(Fiber* fiber);
    Context& unused();
    Context& next();
    [[noreturn]] void go_home();
    void draw_order();
    void draw_ready();
    bool begins_thread();
    std::uint64_t random();

    Launch* launch_ = nullptr;
    Context home_;  // of `run_block`
    uint3 block_index_{};
    int threads_ = 0, next_thread_ = 0, finished_ = 0;
    Fiber* running_ = nullptr;
    std::uintptr_t stacks_ = 0;  // one range for all stacks, begun at most once
    std::vector<Fiber*> all_, free_, at_barrier_;
    Queue ready_;
    std::vector<Meeting> warps_, groups_;
    alignas(64) unsigned char scratch_[SCRATCH];
    std::vector<int> order_;
    std::uint64_t random_ = 0;
    std::uintptr_t shared_ = 0;
    std::uint32_t block_ = 0, serial_ = 0, epoch_ = 0;
    volatile std::sig_atomic_t in_runtime_ = 1;
    bool in_collective_ = false;
    Trap trap_ = Trap::none;
    std::uintptr_t trap_address_ = 0;
    int trap_write_ = 0;
};

extern __thread Worker* current_worker;  // while this operating-system thread works on a launch
std::string name_of(const uint3& thread, const uint3& block);

// traps.cpp
class Traps {  // signal handlers, for the time of one launch
public:
    explicit Traps(double seconds);
    ~Traps();
};
class SignalStack {  // handlers of this operating-system thread run on it, since a fiber's stack may be used up
public:
    SignalStack();
    ~SignalStack();

private:
    void* memory_;
};
void trap_helper(unsigned index);  // called once by each helper thread of a pool

// checker.cpp
void check_launch_begin();
void check_block_end();  // the running thread has reached a barrier, a warp-wide operation or its end

}  // namespace cpu
