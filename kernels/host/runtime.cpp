// Fibers, barriers and a pool of operating-system threads: the scheduler behind cuda_on_cpu.h.
//
// A fiber (a stack and a saved context) executes one CUDA thread after another without a switch as long as none
// of them waits; only a thread that waits keeps its fiber. So a kernel without barriers costs one switch a block.
#include "cuda_on_cpu.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace cpu {

thread_local Thread* self = nullptr;

namespace {

constexpr std::size_t stack_bytes = 64 * 1024;
constexpr int warp_size = 32;

struct Launch {
    dim3 grid, block;
    Body body;
    void* const* arguments;
    std::atomic<std::uint64_t> next_block{0};
    std::uint64_t blocks = 0;
    std::mutex error_lock;
    std::string error;
    std::atomic<bool> failed{false};

    void fail(std::string message) {
        const std::lock_guard<std::mutex> guard(error_lock);
        if (error.empty()) error = std::move(message);
        failed = true;
    }
};

struct Fiber {
    jmp_buf context;
    void* stack = nullptr;
    bool started = false;
    Thread thread;
};

struct Warp {
    void* deposits[warp_size];
    Fiber* waiting[warp_size];
    int arrived = 0;
};

class Worker {
public:
    ~Worker() {
        for (Fiber* fiber : all_) {
            munmap(fiber->stack, stack_bytes);
            delete fiber;
        }
    }

    // Runs blocks of `launch` until none is left.
    void work(Launch& launch) {
        launch_ = &launch;
#if defined(__SSE2__)
        const unsigned saved = _mm_getcsr();
        _mm_setcsr(0x1f80);  // round to nearest, subnormals kept, whatever the caller's thread has set
#endif
        while (!launch.failed) {
            const std::uint64_t index = launch.next_block.fetch_add(1);
            if (index >= launch.blocks) break;
            run_block(index);
        }
#if defined(__SSE2__)
        _mm_setcsr(saved);
#endif
    }

    void barrier() {
        at_barrier_.push_back(running_);
        if (static_cast<int>(at_barrier_.size()) < threads_) return wait();
        at_barrier_.pop_back();
        ready_.insert(ready_.end(), at_barrier_.begin(), at_barrier_.end());
        at_barrier_.clear();
    }

    void warp_collective(void* mine, Compute compute) {
        Warp& warp = warps_[static_cast<std::size_t>(running_->thread.warp)];
        const int lane = running_->thread.lane;
        warp.deposits[lane] = mine;
        warp.waiting[lane] = running_;
        if (++warp.arrived < warp_size) return wait();
        compute(warp.deposits);
        warp.arrived = 0;
        for (int i = 0; i < warp_size; ++i)
            if (i != lane) ready_.push_back(warp.waiting[i]);
    }

private:
    void run_block(std::uint64_t index) {
        const dim3 grid = launch_->grid, block = launch_->block;
        block_index_ = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                        static_cast<unsigned>(index / grid.x / grid.y)};
        threads_ = static_cast<int>(block.x * block.y * block.z);
        warps_.assign(static_cast<std::size_t>((threads_ + warp_size - 1) / warp_size), Warp{});
        next_thread_ = finished_ = 0;
        ready_.clear();
        at_barrier_.clear();
        if (_setjmp(home_) == 0)
            if (Fiber* fiber = take_fiber()) resume(fiber);
        self = nullptr;
        if (finished_ == threads_ || launch_->failed) return abandon();
        const std::size_t at_barrier = at_barrier_.size();
        const std::size_t at_warp = static_cast<std::size_t>(threads_ - finished_) - at_barrier;
        launch_->fail("block (" + std::to_string(block_index_.x) + ", " + std::to_string(block_index_.y) + ", " +
                      std::to_string(block_index_.z) + ") never ends: " + std::to_string(finished_) + " of " +
                      std::to_string(threads_) + " threads returned, " + std::to_string(at_barrier) +
                      " wait at __syncthreads and " + std::to_string(at_warp) + " in a warp-wide operation");
        abandon();
    }

    // Fibers that still wait begin afresh.
    void abandon() {
        if (finished_ == threads_) return;
        for (Fiber* fiber : all_) fiber->started = false;
        free_ = all_;
    }

    // A fiber that runs nothing; nullptr, and a failed launch, where the system has no memory for its stack.
    Fiber* take_fiber() {
        if (!free_.empty()) {
            Fiber* fiber = free_.back();
            free_.pop_back();
            return fiber;
        }
        constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK;
        void* stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (stack == MAP_FAILED || mprotect(stack, 4096, PROT_NONE) != 0) {  // an overflow must fault, not corrupt
            launch_->fail("the system has no memory for another thread's stack");
            return nullptr;
        }
        auto* fiber = new Fiber;
        fiber->stack = stack;
        all_.push_back(fiber);
        return fiber;
    }

    [[noreturn]] void resume(Fiber* fiber) {
        running_ = fiber;
        self = &fiber->thread;
        if (fiber->started) _longjmp(fiber->context, 1);
        fiber->started = true;
        ucontext_t fresh;
        getcontext(&fresh);
        fresh.uc_stack.ss_sp = fiber->stack;
        fresh.uc_stack.ss_size = stack_bytes;
        fresh.uc_link = nullptr;
        current_ = this;
        makecontext(&fresh, &Worker::fiber_main, 0);
        setcontext(&fresh);
        std::abort();  // setcontext does not return
    }

    static void fiber_main() { current_->serve(); }

    // The life of a fiber: take the next thread that has not begun; when none is left, let others run.
    [[noreturn]] void serve() {
        Fiber* mine = running_;
        for (;;) {
            while (next_thread_ < threads_) {
                begin(mine->thread, next_thread_++);
                launch_->body(launch_->arguments);
                ++finished_;
            }
            free_.push_back(mine);
            if (_setjmp(mine->context) == 0) go_on();
        }
    }

    void begin(Thread& thread, int index) const {
        const dim3 block = launch_->block;
        const auto i = static_cast<unsigned>(index);
        thread.thread_index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        thread.block_index = block_index_;
        thread.block_size = block;
        thread.grid_size = launch_->grid;
        thread.lane = index % warp_size;
        thread.warp = index / warp_size;
    }

    void wait() {
        if (_setjmp(running_->context) == 0) {
            if (next_thread_ < threads_) {
                if (Fiber* fiber = take_fiber()) resume(fiber);
                _longjmp(home_, 1);
            }
            go_on();
        }
    }

    [[noreturn]] void go_on() {
        if (ready_.empty()) _longjmp(home_, 1);  // the block has ended, or nobody can go on
        Fiber* fiber = ready_.front();
        ready_.pop_front();
        resume(fiber);
    }

    static thread_local Worker* current_;
    Launch* launch_ = nullptr;
    jmp_buf home_;
    uint3 block_index_{};
    int threads_ = 0, next_thread_ = 0, finished_ = 0;
    Fiber* running_ = nullptr;
    std::vector<Fiber*> all_, free_, at_barrier_;
    std::deque<Fiber*> ready_;
    std::vector<Warp> warps_;
};

thread_local Worker* Worker::current_ = nullptr;

Worker& worker() {
    thread_local Worker mine;
    return mine;
}

// Threads that live as long as the process and help with every launch.
class Pool {
public:
    explicit Pool(unsigned helpers) : pid(getpid()) {
        for (unsigned i = 0; i < helpers; ++i) std::thread([this] { serve(); }).detach();
        helpers_ = helpers;
    }

    void run(Launch& launch) {
        if (helpers_ > 0 && launch.blocks > 1) {
            const std::lock_guard<std::mutex> guard(lock_);
            launch_ = &launch;
            ++generation_;
            busy_ = helpers_;
            wake_.notify_all();
        } else {
            return worker().work(launch);
        }
        worker().work(launch);
        std::unique_lock<std::mutex> guard(lock_);
        done_.wait(guard, [this] { return busy_ == 0; });
    }

    const pid_t pid;

private:
    void serve() {
        std::uint64_t seen = 0;
        std::unique_lock<std::mutex> guard(lock_);
        for (;;) {
            wake_.wait(guard, [&] { return generation_ != seen; });
            seen = generation_;
            Launch* launch = launch_;
            guard.unlock();
            worker().work(*launch);
            guard.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex lock_;
    std::condition_variable wake_, done_;
    Launch* launch_ = nullptr;
    std::uint64_t generation_ = 0;
    unsigned busy_ = 0, helpers_ = 0;
};

std::mutex launch_lock;
Pool* pool = nullptr;
unsigned pool_threads = 1;
thread_local std::string last_error;

}  // namespace

void barrier() { worker().barrier(); }
void warp_collective(void* mine, Compute compute) { worker().warp_collective(mine, compute); }

const char* run(const unsigned grid[3], const unsigned block[3], Body body, void* const* arguments) {
    const std::lock_guard<std::mutex> guard(launch_lock);
    // After fork() the helpers are gone; the child starts its own and leaves the parent's object alone.
    if (pool == nullptr || pool->pid != getpid()) pool = new Pool(pool_threads - 1);
    Launch launch;
    launch.grid = {grid[0], grid[1], grid[2]};
    launch.block = {block[0], block[1], block[2]};
    launch.body = body;
    launch.arguments = arguments;
    launch.blocks = static_cast<std::uint64_t>(grid[0]) * grid[1] * grid[2];
    pool->run(launch);
    if (!launch.failed) return nullptr;
    last_error = launch.error;
    return last_error.c_str();
}

}  // namespace cpu

// Operating-system threads that share a launch; takes effect before the first one.
extern "C" CPU_SHARED void cpu_set_threads(unsigned threads) { cpu::pool_threads = threads > 0 ? threads : 1; }
