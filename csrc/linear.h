// Products of a weight in codes with few rows of x: the levels are looked up once for all rows.
//
// Sums: 16 float32 lanes over blocks of kBlock elements, added in double in a fixed order, as everywhere.
#pragma once

#include "groups.h"
#include "levels.h"

namespace adq {
namespace ADQ_ISA {

template <int kLevels, int kRows>
void dot_rows(const LevelTable& table, const std::uint8_t* codes, std::int64_t n, const float* x,
              std::int64_t stride, double* sums) {
    const Levels<kLevels> value(table.value);
    LaneTotals<kRows> totals;
    for (std::int64_t i = 0; i < n;) {
        const std::int64_t end = std::min(n, i + kBlock);
        const std::int64_t whole = i + whole_groups(end - i);
        Floats sum[kRows][kParts];
        for (int r = 0; r < kRows; ++r) {
            for (int p = 0; p < kParts; ++p) sum[r][p] = fill(0.0f);
        }
        for (; i < whole; i += kLanes) {
            unroll<kParts>([&](auto part) ADQ_INLINE_LAMBDA {
                const std::int64_t at = i + kWidth * part.value;
                const Floats level = value.pick(widen(codes + at));
                unroll<kRows>([&](auto row) ADQ_INLINE_LAMBDA {
                    Floats& to = sum[row.value][part.value];
                    to = to + level * load_floats(x + row.value * stride + at);
                });
            });
        }
        float lanes[kRows][kLanes];
        std::memcpy(lanes, sum, sizeof lanes);
        for (; i < end; ++i) {
            for (int r = 0; r < kRows; ++r) lanes[r][i - whole] += table.value[codes[i]] * x[r * stride + i];
        }
        totals.add(lanes);
    }
    totals.finish(sums);
}

// As many rows at a time as have registers for their sums.
template <int kLevels>
void dot_tiles(const LevelTable& table, const std::uint8_t* codes, std::int64_t n, const float* x,
               std::int64_t stride, int rows, double* sums) {
    int row = 0;
    for (; row + 4 <= rows; row += 4)
        dot_rows<kLevels, 4>(table, codes, n, x + row * stride, stride, sums + row);
    for (; row + 2 <= rows; row += 2)
        dot_rows<kLevels, 2>(table, codes, n, x + row * stride, stride, sums + row);
    if (row < rows) dot_rows<kLevels, 1>(table, codes, n, x + row * stride, stride, sums + row);
}

inline void dots(const LevelTable& table, const std::uint8_t* codes, std::int64_t n, const float* x,
                 std::int64_t stride, int rows, double* sums) {
    switch (table.bits) {
        case 1:
        case 2:
        case 3:
        case 4: return dot_tiles<16>(table, codes, n, x, stride, rows, sums);
        case 5: return dot_tiles<32>(table, codes, n, x, stride, rows, sums);
        case 6: return dot_tiles<64>(table, codes, n, x, stride, rows, sums);
        case 7: return dot_tiles<128>(table, codes, n, x, stride, rows, sums);
        default: return dot_tiles<256>(table, codes, n, x, stride, rows, sums);
    }
}

}  // namespace ADQ_ISA
}  // namespace adq
