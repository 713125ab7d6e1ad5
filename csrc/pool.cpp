// Free blocks by size, in whole huge pages, from mmap.
#include "pool.h"

#include <iterator>
#include <map>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace adq {

#if defined(__linux__)

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t block_size(std::size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

class Pool {
 public:
    void* take(std::size_t bytes) {
        const std::size_t size = block_size(bytes);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            const auto found = free_.find(size);
            if (found != free_.end()) {
                void* memory = found->second;
                free_.erase(found);
                idle_ -= size;
                return memory;
            }
        }
        void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return nullptr;
        madvise(memory, size, MADV_HUGEPAGE);
        return memory;
    }

    void give(void* memory, std::size_t bytes) {
        const std::size_t size = block_size(bytes);
        const std::lock_guard<std::mutex> lock(mutex_);
        free_.emplace(size, memory);
        idle_ += size;
        shrink();
    }

    void set_limit(std::size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        limit_ = bytes;
        shrink();
    }

    std::size_t idle() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return idle_;
    }

 private:
    // The largest blocks go first: one of them makes the most room.
    void shrink() {
        while (idle_ > limit_) {
            const auto last = std::prev(free_.end());
            munmap(last->second, last->first);
            idle_ -= last->first;
            free_.erase(last);
        }
    }

    std::mutex mutex_;
    std::multimap<std::size_t, void*> free_;
    std::size_t idle_ = 0;
    std::size_t limit_ = std::size_t{1} << 30;
};

// Never destroyed: results may be freed while the process ends.
Pool& pool() {
    static Pool& instance = *new Pool;
    return instance;
}

}  // namespace

bool has_pool() { return true; }
void* pool_take(std::size_t bytes) { return pool().take(bytes); }
void pool_give(void* memory, std::size_t bytes) { pool().give(memory, bytes); }
void set_pool_limit(std::size_t bytes) { pool().set_limit(bytes); }
std::size_t pool_idle() { return pool().idle(); }

#else

bool has_pool() { return false; }
void* pool_take(std::size_t) { return nullptr; }
void pool_give(void*, std::size_t) {}
void set_pool_limit(std::size_t) {}
std::size_t pool_idle() { return 0; }

#endif

}  // namespace adq
