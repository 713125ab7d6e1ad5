// Memory for large results that outlives them: a fresh mapping costs a page fault every few kilobytes, which
// takes several times as long as filling the memory does.
#pragma once

#include <cstddef>

namespace adq {

// Bytes of the smallest result that comes from the pool.
constexpr std::size_t kPoolFrom = std::size_t{1} << 20;

// Whether there is a pool on this system; without one `pool_take` returns null.
bool has_pool();

// At least `bytes` bytes, aligned to a page, with whatever they held last; null if there are none to be had.
void* pool_take(std::size_t bytes);

// Give back what pool_take returned for the same number of bytes.
void pool_give(void* memory, std::size_t bytes);

// Memory that waits to be taken again is at most this; more of it goes back to the system.
void set_pool_limit(std::size_t bytes);

// Bytes that wait to be taken again.
std::size_t pool_idle();

}  // namespace adq
