// A parallel loop over chunks whose grid does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

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

// A loop whose iterations are independent of each other.
struct Phase {
    std::size_t count;
    std::function<void(std::size_t)> body;
};

// One parallel region for all phases; each begins when the one before it has ended.
inline void for_phases(int threads, const std::vector<Phase>& phases) {
    std::size_t most = 1;
    for (const Phase& phase : phases) most = std::max(most, phase.count);
    const int team = static_cast<int>(std::min<std::size_t>(std::max(threads, 1), most));
#ifdef _OPENMP
    if (team > 1) {
#pragma omp parallel num_threads(team)
        for (const Phase& phase : phases) {
#pragma omp for schedule(static)
            for (std::size_t i = 0; i < phase.count; ++i) phase.body(i);
        }
        return;
    }
#else
    (void)team;
#endif
    for (const Phase& phase : phases) {
        for (std::size_t i = 0; i < phase.count; ++i) phase.body(i);
    }
}

}  // namespace adq
