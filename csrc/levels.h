// Levels of codes times a scale: the table in registers where it fits, else in memory.
#pragma once

#include "cells.h"
#include "groups.h"

namespace adq {
namespace ADQ_ISA {

#if ADQ_HAS_PERMUTE
template <int kLevels>
using Levels = CellTable<kLevels>;
#else
template <int kLevels>
using Levels = MemoryTable<kLevels>;
#endif

template <int kLevels>
void scaled_levels(const LevelTable& table, const std::uint8_t* codes, std::int64_t n, float scale,
                   float* y) {
    std::int64_t i = 0;
    if (n >= kWidth) {
        const Levels<kLevels> value(table.value);
        const Floats factor = fill(scale);
        const Output<float> out(y, table.stream);
        for (; i + kWidth <= n; i += kWidth) out.put(i, bits(value.pick(widen(codes + i)) * factor));
    }
    for (; i < n; ++i) y[i] = table.value[codes[i]] * scale;
}

inline void levels(const LevelTable& table, const std::uint8_t* codes, std::int64_t n, float scale,
                   float* y) {
    switch (table.bits) {
        case 1:
        case 2:
        case 3:
        case 4: return scaled_levels<16>(table, codes, n, scale, y);
        case 5: return scaled_levels<32>(table, codes, n, scale, y);
        case 6: return scaled_levels<64>(table, codes, n, scale, y);
        case 7: return scaled_levels<128>(table, codes, n, scale, y);
        default: return scaled_levels<256>(table, codes, n, scale, y);
    }
}

}  // namespace ADQ_ISA
}  // namespace adq
