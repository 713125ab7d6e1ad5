// A parallel loop over chunks whose grid does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace adq {

inline std::int64_t chunk_count(std::int64_t n, std::int64_t chunk) { return (n + chunk - 1) / chunk; }

// Calls body(index, begin, count) for each chunk of 0..n; in parallel if there is more than one.
template <class Body>
void for_chunks(std::int64_t n, std::int64_t chunk, int threads, const Body& body) {
    const std::int64_t chunks = chunk_count(n, chunk);
    const int team = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), chunks));
    const auto run = [&](std::int64_t i) { body(i, i * chunk, std::min(chunk, n - i * chunk)); };
#ifdef _OPENMP
    if (team > 1) {
#pragma omp parallel for num_threads(team) schedule(static)
        for (std::int64_t i = 0; i < chunks; ++i) run(i);
        return;
    }
#else
    (void)team;
#endif
    for (std::int64_t i = 0; i < chunks; ++i) run(i);
}

}  // namespace adq
