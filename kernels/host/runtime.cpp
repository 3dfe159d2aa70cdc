// Fibers and barriers: the scheduler of one block, behind cuda_on_cpu.h.
//
// A fiber (a stack and a saved context) executes one CUDA thread after another without a switch as long as none
// of them waits; only a thread that waits keeps its fiber. So a kernel without barriers costs one switch a block.
// With a seed the order is drawn instead: of blocks, of threads within a block, of who goes on after a wait.
#include "runtime.h"

#include <sys/mman.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <new>
#include <numeric>

struct tls_index {
    unsigned long module, offset;
};
extern "C" void* __tls_get_addr(tls_index* index);  // glibc's, in no header

namespace cpu {

#if defined(CPU_OWN_SWITCH) && defined(__x86_64__)
asm(R"(
    .text
    .p2align 4
    .globl cpu_switch
    .hidden cpu_switch
    .type cpu_switch, @function
cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size cpu_switch, .-cpu_switch
)");
#elif defined(CPU_OWN_SWITCH)
asm(R"(
    .text
    .p2align 4
    .globl cpu_switch
    .hidden cpu_switch
    .type cpu_switch, %function
cpu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    ldr x9, [x1]
    mov sp, x9
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size cpu_switch, .-cpu_switch
)");
#endif

__thread Thread* self = nullptr;
__thread Worker* current_worker = nullptr;

namespace {

std::uint64_t mixed(std::uint64_t x) {  // splitmix64
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

std::string three(const uint3& at) {
    return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

}  // namespace

std::string name_of(const uint3& thread, const uint3& block) {
    return "thread " + three(thread) + " of block " + three(block);
}

Worker::~Worker() {
    if (stacks_ != 0) munmap(reinterpret_cast<void*>(stacks_), most_threads * stack_stride);
}

void Worker::work(Launch& launch) {
    launch_ = &launch;
    const SignalStack signal_stack;
#if defined(__SSE2__)
    const unsigned saved = _mm_getcsr();
    _mm_setcsr(0x1f80);  // round to nearest, subnormals kept, whatever the caller's thread has set
#endif
    prepare_shared();
    if (launch.settings.checks != 0) check_launch_begin();
    current_worker = this;
    // A drawn order of blocks: a step that shares no divisor with their number visits each once.
    const std::uint64_t seed = launch.settings.seed, drawn = mixed(seed);
    std::uint64_t step = seed == 0 ? 1 : drawn % launch.blocks | 1;
    while (std::gcd(step, launch.blocks) != 1) step += 2;
    const std::uint64_t first = seed == 0 ? 0 : mixed(drawn) % launch.blocks;
    while (!launch.failed) {
        const std::uint64_t index = launch.next_block.fetch_add(1);
        if (index >= launch.blocks) break;
        run_block(static_cast<std::uint64_t>((first + static_cast<unsigned __int128>(step) * index) % launch.blocks));
    }
    current_worker = nullptr;
#if defined(__SSE2__)
    _mm_setcsr(saved);
#endif
}

// Where the __shared__ variables of the launch's library lie for this operating-system thread.
void Worker::prepare_shared() {
    tls_index index{launch_->library.module, 0};
    shared_ = index.module == 0 ? 0 : reinterpret_cast<std::uintptr_t>(__tls_get_addr(&index));
}

void Worker::barrier() {
    in_runtime_ = 1;
    at_barrier_.push_back(running_);
    if (static_cast<int>(at_barrier_.size()) < threads_) {
        wait();
    } else {
        ++epoch_;
        if (launch_->settings.seed == 0) at_barrier_.pop_back();  // the last to arrive goes on at once
        for (Fiber* fiber : at_barrier_) ready_.push(fiber);
        at_barrier_.clear();
        if (launch_->settings.seed != 0) wait();
    }
    in_runtime_ = 0;
}

void Worker::meet(std::vector<Meeting>& meetings, int size, void* mine, Compute compute) {
    in_runtime_ = 1;
    const int number = running_->thread.warp * warp_size + running_->thread.lane, place = number % size;
    Meeting& meeting = meetings[static_cast<std::size_t>(number / size)];
    meeting.deposits[place] = mine;
    meeting.waiting[place] = running_;
    if (++meeting.arrived < size) {
        wait();
    } else {
        in_runtime_ = 0;
        in_collective_ = true;
        compute(meeting.deposits);
        in_collective_ = false;
        in_runtime_ = 1;
        meeting.arrived = 0;
        const bool yields = launch_->settings.seed != 0;
        for (int i = 0; i < size; ++i)
            if (i != place || yields) ready_.push(meeting.waiting[i]);
        if (yields) wait();
    }
    in_runtime_ = 0;
}

void Worker::run_block(std::uint64_t index) {
    const dim3 grid = launch_->grid, block = launch_->block;
    block_index_ = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                    static_cast<unsigned>(index / grid.x / grid.y)};
    threads_ = static_cast<int>(block.x * block.y * block.z);
    const auto count = [&](int size) { return static_cast<std::size_t>((threads_ + size - 1) / size); };
    warps_.resize(count(warp_size));
    groups_.resize(count(group_size));
    for (auto* meetings : {&warps_, &groups_})
        for (Meeting& meeting : *meetings) meeting.arrived = 0;
    next_thread_ = finished_ = 0;
    epoch_ = 0;
    ++serial_;
    block_ = static_cast<std::uint32_t>(index);
    trap_ = Trap::none;
    in_collective_ = false;
    ready_.clear();
    at_barrier_.clear();
    if (launch_->settings.poison >= 0 && shared_ != 0)
        std::memset(reinterpret_cast<void*>(shared_), launch_->settings.poison, launch_->library.shared_bytes);
    if (launch_->settings.seed != 0) {
        random_ = mixed(launch_->settings.seed ^ mixed(index));
        draw_order();
    }
    running_ = nullptr;
    Context& first = unused();
    if (running_ != nullptr) Context::change(home_, first);
    in_runtime_ = 1;
    if (trap_ != Trap::none) report_trap();
    self = nullptr;
    if (finished_ == threads_ || launch_->failed) return abandon();
    const std::size_t at_barrier = at_barrier_.size();
    const std::size_t at_warp = static_cast<std::size_t>(threads_ - finished_) - at_barrier;
    launch_->fail(Failure::kernel, "block " + three(block_index_) + " never ends: " + std::to_string(finished_) + " of " +
                  std::to_string(threads_) + " threads returned, " + std::to_string(at_barrier) +
                  " wait at __syncthreads and " + std::to_string(at_warp) + " in an operation of a warp or warpgroup");
    abandon();
}

void Worker::trap(Trap kind, std::uintptr_t address, int write) {
    trap_ = kind;
    trap_address_ = address;
    trap_write_ = write;
    go_home();
}

void Worker::stop(Failure kind, std::string message, std::uintptr_t address) {
    in_runtime_ = 1;
    launch_->fail(kind, std::move(message), address);
    message.~basic_string();  // whoever is left for good runs no destructor
    go_home();
}

void Worker::report_trap() {
    const std::string who = name_of(running_->thread.thread_index, block_index_);
    const auto stack = reinterpret_cast<std::uintptr_t>(running_->stack);
    if (trap_address_ - stack < stack_guard) trap_ = Trap::stack;
    switch (trap_) {
        case Trap::memory: {
            const char* verb = trap_write_ < 0 ? " accessed @" : trap_write_ > 0 ? " wrote @" : " read @";
            return launch_->fail(Failure::access, who + verb, trap_address_);
        }
        case Trap::stack:
            return launch_->fail(Failure::kernel, who + " used more than its stack of " + std::to_string(stack_bytes / 1024) + " KiB");
        case Trap::arithmetic: return launch_->fail(Failure::kernel, who + " divided an integer by zero");
        case Trap::instruction: return launch_->fail(Failure::kernel, who + " reached an instruction that does not exist");
        default: {
            std::string seconds = std::to_string(launch_->settings.seconds);
            seconds.resize(seconds.find('.') + 2);
            launch_->fail(Failure::time, "did not end within " + seconds + " s: " + who + " still runs");
        }
    }
}

// Fibers that still wait begin afresh.
void Worker::abandon() {
    if (finished_ == threads_) return;
    for (Fiber* fiber : all_) fiber->prepare(&Worker::fiber_main);
    free_ = all_;
}

// nullptr, and a failed launch, where the system has no memory for another stack.
//
// The threads of a warp run the same code in turn, so the same variables lie at the same depth of every stack. Were the
// stacks alike modulo a page, these would share a few sets of the processor's caches and drive each other out; their
// upper ends are spread evenly over the 64 lines of a page instead.
Fiber* Worker::make_fiber() {
    constexpr std::size_t line = 64, lines = page / line, apart = 13;
    if (stacks_ == 0) {
        constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK | MAP_NORESERVE;
        void* range = mmap(nullptr, most_threads * stack_stride, PROT_NONE, flags, -1, 0);
        if (range != MAP_FAILED) stacks_ = reinterpret_cast<std::uintptr_t>(range);
    }
    char* stack = reinterpret_cast<char*>(stacks_) + all_.size() * stack_stride;
    const std::size_t usable = stack_stride - stack_guard;  // an overflow must fault, not corrupt
    if (stacks_ == 0 || mprotect(stack + stack_guard, usable, PROT_READ | PROT_WRITE) != 0) {
        launch_->fail(Failure::kernel, "the system has no memory for another thread's stack");
        return nullptr;
    }
    char* end = stack + stack_stride - line * ((lines - 1 + apart * all_.size()) % lines);
    auto* fiber = new (end - (sizeof(Fiber) + line - 1) / line * line) Fiber;
    fiber->stack = stack;
    fiber->thread.worker = this;
    fiber->prepare(&Worker::fiber_main);
    all_.push_back(fiber);
    return fiber;
}

void Worker::fiber_main() { current_worker->serve(); }

// The life of a fiber: take the next threads that have not begun; when none is left, let others run.
void Worker::serve() {
    Fiber* mine = running_;
    for (;;) {
        if (begin_thread()) launch_->body(launch_->arguments);
        free_.push_back(mine);
        Context::change(mine->context, next());
    }
}

bool Worker::begin_thread() {
    if (next_thread_ >= threads_ || launch_->failed) return false;
    const int next = next_thread_++;
    begin(*running_, launch_->settings.seed == 0 ? next : order_[static_cast<std::size_t>(next)]);
    in_runtime_ = 0;
    return true;
}

// The running thread has ended.
bool Worker::next_thread() {
    in_runtime_ = 1;
    if (launch_->settings.checks != 0) check_block_end();
    if (!running_->thread.copies.empty() || !running_->thread.steps.empty()) refuse_pending();
    ++finished_;
    return begin_thread();
}

// The running thread ends, and something that it asked for has not been made.
void Worker::refuse_pending() {
    const Thread& thread = running_->thread;
    const bool copies = !thread.copies.empty();
    const unsigned left = copies ? thread.copies.size() : thread.steps.size();
    const char* what = copies ? " asynchronous copies on their way" : " steps of its warpgroup's tensor core under way";
    stop(Failure::kernel, name_of(thread.thread_index, thread.block_index) + " ended with " + std::to_string(left) + what +
                          ", for which it never waited");
}

void Worker::begin(Fiber& fiber, int index) const {
    Thread& thread = fiber.thread;
    const dim3 block = launch_->block;
    if (fiber.block != serial_) {
        fiber.block = serial_;
        thread.block_index = block_index_;
        thread.block_size = block;
        thread.grid_size = launch_->grid;
    }
    const auto i = static_cast<unsigned>(index);
    thread.thread_index = i < block.x ? uint3{i, 0, 0} : uint3{i % block.x, i / block.x % block.y, i / block.x / block.y};
    thread.lane = index % warp_size;
    thread.warp = index / warp_size;
    thread.copies.clear();
    thread.steps.clear();
    thread.copies.poison = launch_->settings.poison;
}

std::uint64_t Worker::random() { return random_ = mixed(random_); }

// Warps begin in a drawn order, and the lanes within each.
void Worker::draw_order() {
    std::vector<int> warps(warps_.size());
    std::iota(warps.begin(), warps.end(), 0);
    for (std::size_t i = warps.size(); i > 1; --i) std::swap(warps[i - 1], warps[random() % i]);
    order_.clear();
    for (const int warp : warps) {
        const std::size_t first = order_.size();
        for (int i = warp * warp_size; i < std::min((warp + 1) * warp_size, threads_); ++i) order_.push_back(i);
        for (std::size_t i = order_.size() - first; i > 1; --i)
            std::swap(order_[first + i - 1], order_[first + random() % i]);
    }
}

// Whether a thread that has not begun goes on next, rather than one that waited.
bool Worker::begins_thread() {
    if (next_thread_ >= threads_) return false;
    return launch_->settings.seed == 0 || ready_.empty() || random() % 4 == 0;
}

// Brings a drawn thread to the front: mostly one of the warp that ran, so that a warp gets far ahead of the others, as
// they do on a GPU; a fair choice would keep them in step and hide what a missing barrier allows.
void Worker::draw_ready() {
    const auto first = static_cast<unsigned>(random() % ready_.size());
    unsigned chosen = first;
    if (random() % 16 != 0)
        for (unsigned i = 0; i < ready_.size(); ++i) {
            const unsigned here = (first + i) % ready_.size();
            if (ready_[here]->thread.warp != running_->thread.warp) continue;
            chosen = here;
            break;
        }
    std::swap(ready_[0], ready_[chosen]);
}

// Lets others run until the running thread can go on.
void Worker::wait() {
    if (launch_->settings.checks != 0) check_block_end();
    Fiber* mine = running_;
    Context::change(mine->context, begins_thread() ? unused() : next());
}

Context& Worker::enter(Fiber* fiber) {
    running_ = fiber;
    self = &fiber->thread;
    return fiber->context;
}

// Of a fiber that runs nothing, which takes a thread that has not begun.
Context& Worker::unused() {
    Fiber* fiber = nullptr;
    if (free_.empty()) {
        fiber = make_fiber();
    } else {
        fiber = free_.back();
        free_.pop_back();
        if (free_.size() > 1) __builtin_prefetch(free_[free_.size() - 2]);
        if (!free_.empty()) free_.back()->context.prefetch();
    }
    return fiber == nullptr ? home_ : enter(fiber);
}

// Of the fiber that goes on now; home, where the block has ended or nobody can go on. A block's stacks lie in the
// second-level cache: the one after comes nearer meanwhile.
Context& Worker::next() {
    if (ready_.empty() || launch_->failed) return home_;
    if (launch_->settings.seed != 0) draw_ready();
    Fiber* fiber = ready_.pop();
    if (ready_.size() > 1) __builtin_prefetch(ready_[1]);
    if (!ready_.empty()) ready_[0]->context.prefetch();
    return enter(fiber);
}

// Leaves the running fiber for good.
void Worker::go_home() {
    Context left;
    Context::change(left, home_);
    std::abort();  // nobody comes back
}

bool next_thread(const Thread& self) { return self.worker->next_thread(); }
void barrier(const Thread& self) { self.worker->barrier(); }
void misaligned(unsigned bytes) {
    const std::string size = std::to_string(bytes);
    current_worker->stop(Failure::kernel, name_of(self->thread_index, self->block_index) + " accessed a vector of " + size +
                         " bytes at an address that is no multiple of " + size);
}
void warp_collective(const Thread& self, void* mine, Compute compute) { self.worker->warp_collective(mine, compute); }
void group_collective(const Thread& self, void* mine, Compute compute) { self.worker->group_collective(mine, compute); }
void* scratch(const Thread& self) { return self.worker->scratch(); }

}  // namespace cpu
