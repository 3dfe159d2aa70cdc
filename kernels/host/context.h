// What a fiber keeps while others run: a stack pointer, with the registers that a call preserves saved on that stack.
//
// Switching is a few instructions on x86-64 and AArch64, and the C library's setjmp and longjmp elsewhere or with
// CPU_PORTABLE_CONTEXT, several times as slow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if (defined(__x86_64__) || defined(__aarch64__)) && !defined(CPU_PORTABLE_CONTEXT)
#define CPU_OWN_SWITCH
#else
#include <setjmp.h>
#include <ucontext.h>
#endif

namespace cpu {

#ifdef CPU_OWN_SWITCH

extern "C" __attribute__((visibility("hidden"))) void cpu_switch(void** save, void* const* next);

class Context {
public:
    // Lets the next switch to this context call `main`, which does not return, on an empty stack.
    void prepare(void* stack, std::size_t bytes, void (*main)()) {
        const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(stack) + bytes) & ~std::uintptr_t{15};
        void** top = reinterpret_cast<void**>(end) - kept;
        for (int i = 0; i < kept; ++i) top[i] = nullptr;
        top[entry] = reinterpret_cast<void*>(main);
        pointer_ = top;
    }
    // Returns when somebody switches to `from`, which may be `to` itself.
    static void change(Context& from, const Context& to) { cpu_switch(&from.pointer_, &to.pointer_); }
    // Somebody will soon switch to this.
    void prefetch() const {
        for (int line = 0; line < 4; ++line) __builtin_prefetch(static_cast<const char*>(pointer_) + 64 * line);
    }

private:
#if defined(__x86_64__)
    static constexpr int kept = 8, entry = 6;  // six registers, where to go on, and main's own return address: none
#else
    static constexpr int kept = 20, entry = 11;  // x19 to x28, x29, x30 (where to go on), d8 to d15
#endif
    void* pointer_ = nullptr;
};

#else

class Context {
public:
    void prepare(void* stack, std::size_t bytes, void (*main)()) {
        stack_ = stack;
        bytes_ = bytes;
        main_ = main;
    }
    static void change(Context& from, Context& to) {
        from.main_ = nullptr;
        if (_setjmp(from.saved_) != 0) return;
        if (to.main_ == nullptr) _longjmp(to.saved_, 1);
        ucontext_t fresh;
        getcontext(&fresh);
        fresh.uc_stack.ss_sp = to.stack_;
        fresh.uc_stack.ss_size = to.bytes_;
        fresh.uc_link = nullptr;
        makecontext(&fresh, to.main_, 0);
        setcontext(&fresh);
        std::abort();  // setcontext does not return
    }
    void prefetch() const {}

private:
    jmp_buf saved_;
    void* stack_ = nullptr;
    std::size_t bytes_ = 0;
    void (*main_)() = nullptr;  // while it has not begun
};

#endif

}  // namespace cpu
