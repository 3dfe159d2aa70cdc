// What ends a launch that goes wrong without ending the process: a fault of a kernel's memory access, a division by
// zero, a kernel that runs for ever.
//
// The signal handlers are installed for the time of a launch only. A fault outside a kernel goes to the handler that
// was there before. A timer that expires signals every thread that works on the launch; one that is within the
// scheduler is left to find out for itself.
#include "runtime.h"

#include <pthread.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <array>

namespace cpu {

namespace {

constexpr std::array<int, 4> fault_signals{SIGSEGV, SIGBUS, SIGFPE, SIGILL};
constexpr std::size_t signal_stack_bytes = 64 * 1024;
constexpr unsigned most_helpers = 1024;

struct sigaction previous[fault_signals.size()];
std::atomic<bool> expired{false};
pthread_t caller, helpers[most_helpers];
std::atomic<bool> is_helper[most_helpers];

int time_signal() { return SIGRTMAX - 2; }

// 1 for a write, 0 for a read, -1 where the processor does not tell.
int is_write([[maybe_unused]] void* context) {
#if defined(__x86_64__)
    const auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    constexpr long page_fault = 14;
    return registers[REG_TRAPNO] == page_fault ? registers[REG_ERR] >> 1 & 1 : -1;
#else
    return -1;
#endif
}

void on_fault(int signal, siginfo_t* info, void* context) {
    Worker* worker = current_worker;
    const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
    if (worker != nullptr && (worker->in_kernel() || (signal == SIGSEGV && worker->holds(address)))) {
        const Trap kind = signal == SIGFPE ? Trap::arithmetic : signal == SIGILL ? Trap::instruction : Trap::memory;
        worker->trap(kind, address, is_write(context));
    }
    for (std::size_t i = 0; i < fault_signals.size(); ++i)  // the access is repeated when this returns
        if (fault_signals[i] == signal) sigaction(signal, &previous[i], nullptr);
}

void on_time(int signal, siginfo_t* info, void*) {
    if (info->si_code == SI_TIMER) {
        expired = true;
        pthread_kill(caller, signal);
        for (unsigned i = 0; i < most_helpers && is_helper[i]; ++i) pthread_kill(helpers[i], signal);
        return;
    }
    Worker* worker = current_worker;
    if (!expired || worker == nullptr) return;
    if (worker->in_kernel()) worker->trap(Trap::time, 0, -1);
}

// One timer for the process; a forked child makes its own.
timer_t timer() {
    static timer_t made;
    static pid_t owner = 0;
    if (owner != getpid()) {
        sigevent event{};
        event.sigev_notify = SIGEV_SIGNAL;
        event.sigev_signo = time_signal();
        struct sigaction action {};
        action.sa_sigaction = on_time;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART;
        sigaction(time_signal(), &action, nullptr);  // stays: a signal may still be under way after a launch
        if (timer_create(CLOCK_MONOTONIC, &event, &made) == 0) owner = getpid();
    }
    return made;
}

void arm(double seconds) {
    itimerspec when{};
    when.it_value.tv_sec = static_cast<time_t>(seconds);
    when.it_value.tv_nsec = static_cast<long>((seconds - static_cast<double>(when.it_value.tv_sec)) * 1e9);
    if (seconds > 0) when.it_interval.tv_nsec = 50'000'000;  // again, for a thread that was within the scheduler
    timer_settime(timer(), 0, &when, nullptr);
}

}  // namespace

Traps::Traps(double seconds) {
    caller = pthread_self();
    expired = false;
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler is left by a jump
    for (std::size_t i = 0; i < fault_signals.size(); ++i) sigaction(fault_signals[i], &action, &previous[i]);
    if (seconds > 0) arm(seconds);
}

Traps::~Traps() {
    arm(0);
    for (std::size_t i = 0; i < fault_signals.size(); ++i) sigaction(fault_signals[i], &previous[i], nullptr);
}

SignalStack::SignalStack() : memory_(nullptr) {
    stack_t had{};
    sigaltstack(nullptr, &had);
    if (!(had.ss_flags & SS_DISABLE)) return;  // Python's fault handler has made one
    constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK;
    void* memory = mmap(nullptr, signal_stack_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) return;
    memory_ = memory;
    const stack_t mine{memory_, 0, signal_stack_bytes};
    sigaltstack(&mine, nullptr);
}

SignalStack::~SignalStack() {
    if (memory_ == nullptr) return;
    stack_t none{};
    none.ss_flags = SS_DISABLE;
    sigaltstack(&none, nullptr);
    munmap(memory_, signal_stack_bytes);
}

void trap_helper(unsigned index) {
    if (index >= most_helpers) return;
    helpers[index] = pthread_self();
    is_helper[index] = true;
}

}  // namespace cpu
