// Every memory access of a kernel, one by one: the checker behind libraries that were compiled with
// -fsanitize=thread,undefined for its calls alone (hooks.cpp), without the compiler's own runtime.
//
//   memory     an access outside the watched buffers, to the byte
//   race       two threads touch a byte, one of them writes, and nothing orders them: in one block a barrier does,
//              between blocks of one launch nothing does. Warp-wide operations order no memory. Two writes of the same
//              value are let pass, as by NVIDIA's racecheck.
//   init       a read of a byte of shared memory that nothing wrote in this block, or of a buffer that nothing wrote
//   undefined  what C++ does not define: overflow, shifts, alignment, indices of arrays
//
// Excluded: stacks, what the library itself holds (constants, a launch's arguments), this runtime. One
// operating-system thread runs a checked launch, so nothing here is locked while it runs.
#include "runtime.h"

#include <sys/mman.h>

#include <algorithm>

namespace cpu {

namespace {

enum Check : unsigned { MEMORY = 1, RACE = 2, INIT = 4, UNDEFINED = 8 };

struct Access {  // the latest of its kind, if the stamp is today's: a launch's number, a block's for shared memory
    std::uint32_t stamp = 0, block = 0, epoch = 0;
    std::uint16_t thread = 0;
    bool several_threads = false, several_blocks = false;  // in that epoch; in that launch
};
struct Cell {  // of one byte
    Access write, read;
};

// Bytes and their cells; the system gives pages of cells as they are touched, all zero.
class Shadow {
public:
    explicit Shadow(std::size_t bytes) : bytes_(std::max<std::size_t>(bytes, 1)) {
        constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* memory = mmap(nullptr, bytes_ * sizeof(Cell), PROT_READ | PROT_WRITE, flags, -1, 0);
        cells_ = memory == MAP_FAILED ? nullptr : static_cast<Cell*>(memory);
    }
    Shadow(Shadow&& other) noexcept : bytes_(other.bytes_), cells_(std::exchange(other.cells_, nullptr)) {}
    Shadow& operator=(Shadow&& other) noexcept {
        std::swap(bytes_, other.bytes_);
        std::swap(cells_, other.cells_);
        return *this;
    }
    ~Shadow() {
        if (cells_ != nullptr) munmap(cells_, bytes_ * sizeof(Cell));
    }
    Cell& operator[](std::size_t byte) const { return cells_[byte]; }
    bool exists() const { return cells_ != nullptr; }

private:
    std::size_t bytes_;
    Cell* cells_;
};

struct Buffer {
    std::uintptr_t begin, end;
    std::vector<bool> written;  // empty: all of it
    Shadow shadow;
};

struct SharedShadow {  // of one library
    std::size_t module;
    Shadow shadow;
};

std::vector<Buffer> buffers;  // by address
std::vector<SharedShadow> shared_shadows;
std::uint64_t checked_launches = 0;
bool launch_is_counted = false;

struct {  // a write over another thread's write: a race if it changes the bytes
    std::uintptr_t address = 0, shown = 0;
    std::size_t size = 0;
    unsigned char old[64];
    Failure kind = Failure::none;
    std::string message;
} suspect;

Buffer* buffer_at(std::uintptr_t address) {
    auto after = std::upper_bound(buffers.begin(), buffers.end(), address,
                                  [](std::uintptr_t value, const Buffer& buffer) { return value < buffer.begin; });
    if (after == buffers.begin() || address >= std::prev(after)->end) return nullptr;
    return &*std::prev(after);
}

uint3 block_at(const Worker& worker, std::uint32_t block) {
    const dim3 grid = worker.launch().grid;
    return {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
}
uint3 thread_at(const Worker& worker, unsigned thread) {
    const dim3 size = worker.launch().block;
    return {thread % size.x, thread / size.x % size.y, thread / size.x / size.y};
}
unsigned thread_number() { return static_cast<unsigned>(self->warp * warp_size + self->lane); }

std::string who() { return name_of(self->thread_index, self->block_index); }

bool meets(const Access& before, const Access& now) {
    if (before.stamp != now.stamp) return false;
    if (before.block != now.block || before.several_blocks) return true;
    return before.epoch == now.epoch && (before.thread != now.thread || before.several_threads);
}

void remember(Access& before, const Access& now) {
    Access next = now;
    if (before.stamp == now.stamp) {
        next.several_blocks = before.several_blocks || before.block != now.block;
        next.several_threads = before.block == now.block && before.epoch == now.epoch &&
                               (before.several_threads || before.thread != now.thread);
    }
    before = next;
}

std::string race(const Worker& worker, const Access& before, const char* kinds, std::size_t size, bool shared) {
    const std::string bytes = std::to_string(size) + (size == 1 ? " byte" : " bytes");
    const std::string other = name_of(thread_at(worker, before.thread), block_at(worker, before.block));
    const char* where = shared ? " of shared memory" : "";
    return std::string(kinds) + " of the same " + bytes + where + (shared ? "" : ", @,") +
           " without a barrier between: " + other + ", then " + who();
}

// What a set of cells says about an access; stops the launch where it is wrong.
void check_cells(Worker& worker, const Shadow& shadow, std::size_t first, std::uintptr_t address, std::size_t size,
                 bool write, bool shared) {
    const unsigned checks = worker.launch().settings.checks;
    const Failure kind = shared ? Failure::kernel : Failure::access;
    Access now;
    now.stamp = shared ? worker.serial() : worker.launch().serial;
    now.block = worker.block();
    now.epoch = worker.epoch();
    now.thread = static_cast<std::uint16_t>(thread_number());
    for (std::size_t i = 0; i < size; ++i) {
        Cell& cell = shadow[first + i];
        const bool fresh = shared && cell.write.stamp != now.stamp;
        if (!write && fresh && (checks & INIT))
            worker.stop(Failure::kernel,
                        who() + " read " + std::to_string(size) + " bytes of shared memory that nothing has written");
        if (checks & RACE) {
            if (!write && meets(cell.write, now))
                worker.stop(kind, race(worker, cell.write, "a write and a read", size, shared), address + i);
            if (write && meets(cell.read, now))
                worker.stop(kind, race(worker, cell.read, "a read and a write", size, shared), address + i);
            if (write && suspect.size == 0 && meets(cell.write, now)) {
                suspect.kind = kind;
                suspect.message = race(worker, cell.write, "two writes", size, shared);
                if (size > sizeof suspect.old) worker.stop(kind, suspect.message, address + i);
                suspect.address = address;
                suspect.shown = address + i;
                suspect.size = size;
                std::memcpy(suspect.old, reinterpret_cast<const void*>(address), size);
            }
        }
        remember(write ? cell.write : cell.read, now);
    }
}

void settle(Worker& worker) {
    if (suspect.size == 0) return;
    const std::size_t size = std::exchange(suspect.size, 0);
    if (std::memcmp(suspect.old, reinterpret_cast<const void*>(suspect.address), size) != 0)
        worker.stop(suspect.kind, suspect.message, suspect.shown);
}

Shadow& shared_shadow(const Library& library) {
    for (auto& known : shared_shadows)
        if (known.module == library.module) return known.shadow;
    shared_shadows.push_back({library.module, Shadow(library.shared_bytes)});
    return shared_shadows.back().shadow;
}

bool is_argument(const Launch& launch, std::uintptr_t address) {
    const auto first = reinterpret_cast<std::uintptr_t>(launch.arguments);
    return address - first < 4096;  // the addresses of the values, then the values themselves
}

}  // namespace

void check_launch_begin() {
    suspect.size = 0;
    launch_is_counted = false;
}
void check_block_end() { settle(*current_worker); }

// Called before a kernel reads or writes.
CPU_SHARED void check_access(const void* pointer, std::size_t size, bool write) {
    Worker* worker = current_worker;
    if (worker == nullptr || self == nullptr || worker->in_collective()) return;
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    const Launch& launch = worker->launch();
    if (worker->holds(address) || address == reinterpret_cast<std::uintptr_t>(&self)) return;
    if (!std::exchange(launch_is_counted, true)) ++checked_launches;
    if ((launch.settings.checks & (MEMORY | RACE | INIT)) == 0) return;
    settle(*worker);
    if (worker->shared() != 0 && address - worker->shared() < launch.library.shared_bytes)
        return check_cells(*worker, shared_shadow(launch.library), address - worker->shared(), address, size, write, true);
    Buffer* buffer = buffer_at(address);
    if (buffer == nullptr && ((address >= launch.library.begin && address < launch.library.end) || is_argument(launch, address)))
        return;
    if (buffer == nullptr || address + size > buffer->end) {
        if (!(launch.settings.checks & MEMORY)) return;  // a wrong access still faults in a guard page
        worker->stop(Failure::access, who() + (write ? " wrote @" : " read @"), buffer == nullptr ? address : buffer->end);
    }
    if (launch.settings.checks & RACE)
        check_cells(*worker, buffer->shadow, address - buffer->begin, address, size, write, false);
    if (buffer->written.empty()) return;
    for (std::size_t i = 0; i < size; ++i) {
        const std::size_t byte = address - buffer->begin + i;
        if (write) buffer->written[byte] = true;
        else if ((launch.settings.checks & INIT) && !buffer->written[byte])
            worker->stop(Failure::access, who() + " read @, which nothing has written", address + i);
    }
}

CPU_SHARED void check_undefined(const char* what, const char* file, unsigned line) {
    Worker* worker = current_worker;
    if (worker == nullptr || self == nullptr || !(worker->launch().settings.checks & UNDEFINED)) return;
    const std::string path = file == nullptr ? "" : file;
    worker->stop(Failure::kernel, who() + ": " + what + " at " + path.substr(path.rfind('/') + 1) + ":" + std::to_string(line));
}

}  // namespace cpu

// A buffer that kernels may touch; `written`: its bytes count as written. False where there is no memory for its cells.
extern "C" CPU_SHARED bool cpu_watch(std::uint64_t address, std::uint64_t size, bool written) {
    cpu::Buffer buffer{address, address + size, std::vector<bool>(written ? 0 : size), cpu::Shadow(size)};
    const auto place = std::upper_bound(cpu::buffers.begin(), cpu::buffers.end(), address,
                                        [](std::uintptr_t value, const cpu::Buffer& other) { return value < other.begin; });
    const bool exists = buffer.shadow.exists();
    cpu::buffers.insert(place, std::move(buffer));
    return exists;
}

extern "C" CPU_SHARED void cpu_unwatch(std::uint64_t address) {
    const auto found = std::find_if(cpu::buffers.begin(), cpu::buffers.end(),
                                    [&](const cpu::Buffer& buffer) { return buffer.begin == address; });
    if (found != cpu::buffers.end()) cpu::buffers.erase(found);
}

// Bytes that differ from the poison were written by somebody outside the kernels.
extern "C" CPU_SHARED void cpu_note_written(std::uint64_t address, unsigned char poison) {
    cpu::Buffer* buffer = cpu::buffer_at(address);
    if (buffer == nullptr) return;
    const auto* bytes = reinterpret_cast<const unsigned char*>(buffer->begin);
    for (std::size_t i = 0; i < buffer->written.size(); ++i)
        if (bytes[i] != poison) buffer->written[i] = true;
}

// Launches of which the checker saw an access, since the process began.
extern "C" CPU_SHARED std::uint64_t cpu_checked_launches() { return cpu::checked_launches; }
