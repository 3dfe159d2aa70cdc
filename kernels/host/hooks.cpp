// What a kernel compiled with -fsanitize=thread,undefined calls: linked into its library, hidden there, so that a real
// sanitizer in the same process is not disturbed. Compiled without these flags itself. See checker.cpp.
#include <cstddef>
#include <cstdint>

namespace cpu {
#define SHARED __attribute__((visibility("default")))  // with the runtime's library
SHARED void check_access(const void* pointer, std::size_t size, bool write);
SHARED void check_undefined(const char* what, const char* file, unsigned line);
}  // namespace cpu

struct Location {  // how every report of the compiler begins
    const char* file;
    std::uint32_t line, column;
};

extern "C" {

#define ACCESS(size)                                                                               \
    void __tsan_read##size(void* p) { cpu::check_access(p, size, false); }                         \
    void __tsan_write##size(void* p) { cpu::check_access(p, size, true); }                         \
    void __tsan_unaligned_read##size(void* p) { cpu::check_access(p, size, false); }               \
    void __tsan_unaligned_write##size(void* p) { cpu::check_access(p, size, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, std::size_t size) { cpu::check_access(p, size, false); }
void __tsan_write_range(void* p, std::size_t size) { cpu::check_access(p, size, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}

void* __tsan_memcpy(void* to, const void* from, std::size_t size) {
    cpu::check_access(from, size, false);
    cpu::check_access(to, size, true);
    return __builtin_memcpy(to, from, size);
}
void* __tsan_memmove(void* to, const void* from, std::size_t size) {
    cpu::check_access(from, size, false);
    cpu::check_access(to, size, true);
    return __builtin_memmove(to, from, size);
}
void* __tsan_memset(void* to, int value, std::size_t size) {
    cpu::check_access(to, size, true);
    return __builtin_memset(to, value, size);
}

#define UNDEFINED(name, what)                                                                      \
    void __ubsan_handle_##name(const Location* at) { cpu::check_undefined(what, at->file, at->line); }
UNDEFINED(add_overflow, "a signed addition overflows")
UNDEFINED(sub_overflow, "a signed subtraction overflows")
UNDEFINED(mul_overflow, "a signed multiplication overflows")
UNDEFINED(negate_overflow, "a negation overflows")
UNDEFINED(divrem_overflow, "a division by zero, or one that overflows")
UNDEFINED(shift_out_of_bounds, "a shift past the width of the type, or of a negative number")
UNDEFINED(out_of_bounds, "an index outside its array")
UNDEFINED(type_mismatch_v1, "a misaligned or null pointer")
UNDEFINED(pointer_overflow, "pointer arithmetic that overflows")
UNDEFINED(load_invalid_value, "a value that its type does not have")
UNDEFINED(builtin_unreachable, "code that cannot be reached was")
UNDEFINED(missing_return, "a function ends without a result")
UNDEFINED(vla_bound_not_positive, "an array of no elements")
UNDEFINED(float_cast_overflow, "a number past the range of the integer type it is converted to")
UNDEFINED(nonnull_arg, "a null pointer where none may be")
UNDEFINED(nonnull_return_v1, "a null pointer where none may be")
UNDEFINED(invalid_builtin, "a builtin called with a value it does not take")
UNDEFINED(alignment_assumption, "a pointer less aligned than promised")
}
