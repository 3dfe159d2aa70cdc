// A launch: a pool of operating-system threads that share its blocks, and what Python calls.
#include "runtime.h"

#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <thread>

namespace cpu {

namespace {

Worker& worker() {
    thread_local Worker mine;
    return mine;
}

// Threads that live as long as the process and help with every launch.
class Pool {
public:
    explicit Pool(unsigned helpers) : pid(getpid()) {
        for (unsigned i = 0; i < helpers; ++i)
            std::thread([this, i] {
                trap_helper(i);
                serve();
            }).detach();
        helpers_ = helpers;
    }

    void run(Launch& launch) {
        if (helpers_ > 0 && launch.blocks > 1 && launch.settings.checks == 0) {
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

// The library that holds `body`, from the loader's own list.
Library library_of(Body body) {
    struct Search {
        std::uintptr_t wanted;
        Library found;
    } search{reinterpret_cast<std::uintptr_t>(body), {}};
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* data) {
            Library here{~std::uintptr_t{0}, 0, 0, 0};
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const auto& header = info->dlpi_phdr[i];
                if (header.p_type == PT_LOAD) {
                    here.begin = std::min<std::uintptr_t>(here.begin, info->dlpi_addr + header.p_vaddr);
                    here.end = std::max<std::uintptr_t>(here.end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
                } else if (header.p_type == PT_TLS) {
                    here.module = info->dlpi_tls_modid;
                    here.shared_bytes = header.p_memsz;
                }
            }
            auto& search = *static_cast<Search*>(data);
            if (search.wanted < here.begin || search.wanted >= here.end) return 0;
            search.found = here;
            return 1;
        },
        &search);
    return search.found;
}

std::mutex launch_lock;
Pool* pool = nullptr;
unsigned pool_threads = 1;
std::uint32_t launches = 0;
thread_local Settings settings;
thread_local std::string last_error;
thread_local std::uintptr_t last_address = 0;
thread_local Failure last_failure = Failure::none;

}  // namespace

const char* run(const unsigned grid[3], const unsigned block[3], Body body, void* const* arguments) {
    const std::lock_guard<std::mutex> guard(launch_lock);
    // After fork() the helpers are gone; the child starts its own and leaves the parent's object alone.
    if (pool == nullptr || pool->pid != getpid()) pool = new Pool(pool_threads - 1);
    static std::map<Body, Library> libraries;  // a library is never unloaded
    auto known = libraries.find(body);
    if (known == libraries.end()) known = libraries.emplace(body, library_of(body)).first;
    Launch launch;
    launch.grid = {grid[0], grid[1], grid[2]};
    launch.block = {block[0], block[1], block[2]};
    launch.body = body;
    launch.arguments = arguments;
    launch.settings = settings;
    launch.library = known->second;
    launch.serial = ++launches;
    launch.blocks = static_cast<std::uint64_t>(grid[0]) * grid[1] * grid[2];
    {
        const Traps traps(launch.settings.seconds);
        pool->run(launch);
    }
    if (!launch.failed) return nullptr;
    last_error = launch.error;
    last_address = launch.address;
    last_failure = launch.failure;
    return last_error.c_str();
}

}  // namespace cpu

// Operating-system threads that share a launch; takes effect before the first one.
extern "C" CPU_SHARED void cpu_set_threads(unsigned threads) { cpu::pool_threads = threads > 0 ? threads : 1; }

// For the launches that the calling thread makes from now on.
extern "C" CPU_SHARED void cpu_settings(std::uint64_t seed, double seconds, int poison, unsigned checks) {
    cpu::settings = {seed, seconds, poison, checks};
}

// What kind the calling thread's last error was.
extern "C" CPU_SHARED int cpu_error_kind() { return static_cast<int>(cpu::last_failure); }

// What the "@" of the calling thread's last error stands for.
extern "C" CPU_SHARED std::uint64_t cpu_error_address() { return cpu::last_address; }
