// The step function y = value[#{j : scale x > edge[j]}]: codebook lookup, and the activation quantizer.
//
// One pass reads x and writes y, codes and the per-cell statistics, as far as they are wanted. NaN gives
// NaN, code 0, and counts in no cell. Sums: 16 float32 lanes over blocks of kBlock elements, added in double
// in a fixed order; the lanes of up to 8 cells are in registers, of more in memory.
#pragma once

#include "cells.h"
#include "groups.h"

namespace adq {
namespace ADQ_ISA {

struct StatisticsSink {
    double* total;
    std::int64_t* count;
    // 0 .. 7, in memory on purpose: comparisons read them there, and the registers are left to the sums.
    std::int32_t number[8];
};

// The cell of NaN; as a byte it is 255.
constexpr std::int32_t kNoCell = -1;

struct NoStatistics {
    static constexpr bool kCounts = false;  // statistics are those of the weights, whose scale is 1
    struct Memory {};
    NoStatistics(const StatisticsSink&, Memory&) {}
    template <class T>
    ADQ_INLINE void flush(const T*, std::int64_t) {}
    ADQ_INLINE void finish() {}
};

// How often each cell occurs, counted block by block from the cells of all its elements.
template <int kCells>
class CellCounts {
 public:
    CellCounts() { std::memset(seen_, 0, sizeof seen_); }

    ADQ_INLINE void add(const std::uint8_t (&cells)[kBlock]) {
        ByteLanes seen[kCells];
        unroll<kCells>([&](auto k) ADQ_INLINE_LAMBDA { seen[k.value] = ByteLanes{}; });
        for (int i = 0; i < kBlock; i += kRound) {
            const int size = kBlock - i < kRound ? kBlock - i : kRound;
            add_round(seen, cells + i, size);
        }
        unroll<kCells>([&](auto k)
                           ADQ_INLINE_LAMBDA { seen_[k.value] = seen_[k.value] + byte_sums(seen[k.value]); });
    }

    void finish(std::int64_t* count) const {
        for (int k = 0; k < kCells; ++k) {
            std::uint64_t word[sizeof(Words) / 8];
            std::memcpy(word, &seen_[k], sizeof word);
            for (std::uint64_t sum : word) count[k] += static_cast<std::int64_t>(sum);
        }
    }

 private:
    static constexpr int kByteLanes = sizeof(ByteLanes);
    static constexpr int kRound = 15 * kByteLanes;
    static_assert(kBlock / kByteLanes < 256, "the counts of a block fit a byte");

#if ADQ_HAS_PERMUTE
    // Cells k and k + kPairs share a byte, four bits each; a round is as far as four bits count.
    ADQ_INLINE void add_round(ByteLanes (&seen)[kCells], const std::uint8_t* cells, int size) {
        constexpr int kPairs = kCells / 2;
        ByteLanes both[kPairs];
        unroll<kPairs>([&](auto k) ADQ_INLINE_LAMBDA { both[k.value] = ByteLanes{}; });
        for (int i = 0; i < size; i += kByteLanes) {
            ByteLanes cell;
            std::memcpy(&cell, cells + i, sizeof cell);
            unroll<kPairs>([&](auto k) ADQ_INLINE_LAMBDA {
                static constexpr OneOfPair<k.value, kPairs> one;
                both[k.value] = both[k.value] + look_up_bytes(one.at, cell);
            });
        }
        unroll<kPairs>([&](auto k) ADQ_INLINE_LAMBDA {
            const Words words = (Words)both[k.value];
            seen[k.value] = seen[k.value] + (ByteLanes)(words & low_fields(4, 8));
            seen[k.value + kPairs] = seen[k.value + kPairs] + (ByteLanes)((words >> 4) & low_fields(4, 8));
        });
    }

    template <int kCell, int kPairs>
    struct OneOfPair {
        std::int8_t at[16];
        constexpr OneOfPair() : at() { at[kCell] = 1, at[kCell + kPairs] = 16; }
    };
#else
    ADQ_INLINE void add_round(ByteLanes (&seen)[kCells], const std::uint8_t* cells, int size) {
        for (int i = 0; i < size; i += kByteLanes) {
            ByteLanes cell;
            std::memcpy(&cell, cells + i, sizeof cell);
            unroll<kCells>(
                [&](auto k) ADQ_INLINE_LAMBDA { seen[k.value] = count_equal(seen[k.value], cell, k.value); });
        }
    }
#endif

    Words seen_[kCells];
};

// The cells of a block are kept, and its sums and counts made at its end: a search has long latencies, which
// the next elements' searches hide if nothing else comes between them.
template <int kCells>
class ChainStatistics {
 public:
    static constexpr bool kCounts = true;
    struct Memory {
        std::uint8_t cell[kBlock];
        CellCounts<kCells> seen;
        LaneTotals<kCells> total;
    };

    ADQ_INLINE ChainStatistics(const StatisticsSink& sink, Memory& memory) : sink_(sink), memory_(memory) {}

    template <class Part, class Found>
    ADQ_INLINE void add(std::int64_t at, Part, Floats, Ints cell, const Found&) {
        narrow(memory_.cell + at, cell);
    }

    template <class T>
    ADQ_INLINE void flush(const T* x, std::int64_t n) {
        Floats sum[kCells][kParts];
        unroll<kCells>([&](auto k) ADQ_INLINE_LAMBDA {
            for (int p = 0; p < kParts; ++p) sum[k.value][p] = fill(0.0f);
        });
        for (std::int64_t i = 0; i < n; i += kLanes) {
            unroll<kParts>([&](auto part) ADQ_INLINE_LAMBDA {
                const std::int64_t at = i + kWidth * part.value;
                const Floats w = Storage<T>::load(x + at);
                const Ints cell = widen(memory_.cell + at);
                unroll<kCells>([&](auto k) ADQ_INLINE_LAMBDA {
                    Floats& to = sum[k.value][part.value];
                    to = add_where(to, equal(cell, fill(sink_.number[k.value])), w);
                });
            });
        }
        float lanes[kCells][kLanes];
        unroll<kCells>([&](auto k)
                           ADQ_INLINE_LAMBDA { std::memcpy(lanes[k.value], sum[k.value], sizeof lanes[0]); });
        memory_.total.add(lanes);
        if (n < kBlock) std::memset(memory_.cell + n, 0xff, kBlock - n);
        memory_.seen.add(memory_.cell);
    }

    ADQ_INLINE void finish() {
        memory_.total.finish(sink_.total);
        memory_.seen.finish(sink_.count);
    }

 private:
    const StatisticsSink& sink_;
    Memory& memory_;
};

#if ADQ_HAS_PERMUTE

// The search that DigitStatistics adds up with: a cell of 16 is 4 high + low, and each digit is the number of
// edges of three that lie below u.
class DigitCells {
 public:
    static constexpr int kSize = 16;
    using Table = RegisterTable<16>;
    struct Found {
        Ints cell;
        Mask high[4];  // where the high digit is 0 .. 3; NaN has none
        Mask low[4];   // where the low digit is at least 1 .. 3; low[0] is not used
    };

    explicit ADQ_INLINE DigitCells(const EdgeTable& edges)
        : low_{column(edges, 0), column(edges, 1), column(edges, 2)} {
        for (int i = 1; i < 4; ++i) high_[i] = fill(edges.sorted[4 * i - 1]);
    }

    ADQ_INLINE Found find(Floats u) const {
        const Mask above[4] = {is_number(u), greater(u, high_[1]), greater(u, high_[2]),
                               greater(u, high_[3])};
        const Ints high =
            add_where(add_where(add_where(fill(0), above[1], fill(1)), above[2], fill(1)), above[3], fill(1));
        Found found;
        unroll<3>([&](auto i) ADQ_INLINE_LAMBDA {
            found.high[i.value] = and_not(above[i.value], above[i.value + 1]);
        });
        found.high[3] = above[3];
        found.cell = high << 2;
        unroll<3>([&](auto i) ADQ_INLINE_LAMBDA {
            found.low[i.value + 1] = greater(u, low_[i.value].pick(high));
            found.cell = add_where(found.cell, found.low[i.value + 1], fill(1));
        });
        return found;
    }

    ADQ_INLINE Ints number(const Found& found) const { return found.cell; }
    ADQ_INLINE Floats pick(const Table& table, Floats, const Found& found) const {
        return table.pick(found.cell);
    }

 private:
    // Edge `digit` of every high digit.
    static ADQ_INLINE RegisterTable<16> column(const EdgeTable& edges, int digit) {
        float value[16];
        for (int i = 0; i < 16; ++i) value[i] = edges.sorted[4 * (i % 4) + digit];
        return RegisterTable<16>(value);
    }

    Floats high_[4];
    const RegisterTable<16> low_[3];
};

// The sums of 16 cells: x goes to the row of its low digit, and there to the sum of its high digit.
class DigitStatistics {
 public:
    static constexpr bool kCounts = true;
    struct Memory {
        std::uint8_t cell[kBlock];
        CellCounts<16> seen;
        LaneTotals<16> total;
    };

    ADQ_INLINE DigitStatistics(const StatisticsSink& sink, Memory& memory) : sink_(sink), memory_(memory) {
        clear();
    }

    template <class Part>
    ADQ_INLINE void add(std::int64_t at, Part, Floats x, Ints cell, const DigitCells::Found& found) {
        narrow(memory_.cell + at, cell);
        unroll<4>([&](auto low) ADQ_INLINE_LAMBDA {
            Floats row = x;
            if constexpr (low.value > 0) row = only_where(found.low[low.value], row);
            if constexpr (low.value < 3) row = select(found.low[low.value + 1], fill(0.0f), row);
            unroll<4>([&](auto high) ADQ_INLINE_LAMBDA {
                Floats& sum = sum_[4 * high.value + low.value][Part::value];
                sum = add_where(sum, found.high[high.value], row);
            });
        });
    }

    template <class T>
    ADQ_INLINE void flush(const T*, std::int64_t n) {
        float sum[16][kLanes];
        unroll<16>([&](auto k)
                       ADQ_INLINE_LAMBDA { std::memcpy(sum[k.value], sum_[k.value], sizeof sum[0]); });
        clear();
        memory_.total.add(sum);
        if (n < kBlock) std::memset(memory_.cell + n, 0xff, kBlock - n);
        memory_.seen.add(memory_.cell);
    }

    ADQ_INLINE void finish() {
        memory_.total.finish(sink_.total);
        memory_.seen.finish(sink_.count);
    }

 private:
    ADQ_INLINE void clear() {
        unroll<16>([&](auto k) ADQ_INLINE_LAMBDA {
            for (int p = 0; p < kParts; ++p) sum_[k.value][p] = fill(0.0f);
        });
    }

    Floats sum_[16][kParts];
    const StatisticsSink& sink_;
    Memory& memory_;
};

#endif

// Sum and count side by side, one histogram a lane, so that no two lanes of a group meet: an addition of two
// floats takes both. The additions of a group wait for the next group's search, whose latencies they fill.
template <int kCells>
class HistogramStatistics {
 public:
    static constexpr bool kCounts = true;
    struct Memory {
        static constexpr int kRow = 2 * (kCells + 1);  // the last entry takes the NaNs
        float block[kLanes][kRow];
        double total[kLanes][kRow];
    };

    ADQ_INLINE HistogramStatistics(const StatisticsSink& sink, Memory& memory)
        : sink_(sink), memory_(memory) {
        std::memset(&memory_, 0, sizeof memory_);
        for (int i = 0; i < kLanes; ++i) row_[i] = i * Memory::kRow;
        discard();
    }

    template <class Part, class Found>
    ADQ_INLINE void add(std::int64_t, Part, Floats x, Ints cell, const Found&) {
        constexpr int part = Part::value;
        drain(part);
        cell = select(equal(cell, fill(kNoCell)), fill(kCells), cell);
        Ints row;
        std::memcpy(&row, row_ + kWidth * part, sizeof row);
        const Ints place = cell + cell + row;
        std::memcpy(place_ + kWidth * part, &place, sizeof place);
        std::memcpy(value_ + kWidth * part, &x, sizeof x);
    }

    template <class T>
    ADQ_INLINE void flush(const T*, std::int64_t) {
        for (int part = 0; part < kParts; ++part) drain(part);
        for (int i = 0; i < kLanes; ++i) {
            for (int k = 0; k < 2 * kCells; ++k) memory_.total[i][k] += memory_.block[i][k];
        }
        discard();
        std::memset(memory_.block, 0, sizeof memory_.block);
    }

    ADQ_INLINE void finish() {
        for (int i = 0; i < kLanes; ++i) {
            for (int k = 0; k < kCells; ++k) {
                sink_.total[k] += memory_.total[i][2 * k];
                sink_.count[k] += static_cast<std::int64_t>(memory_.total[i][2 * k + 1]);
            }
        }
    }

 private:
    ADQ_INLINE void drain(int part) {
        for (int i = kWidth * part; i < kWidth * (part + 1); ++i) {
            float* both = memory_.block[0] + static_cast<std::uint32_t>(place_[i]);
            Pair sum;
            std::memcpy(&sum, both, sizeof sum);
            sum = sum + Pair{value_[i], 1.0f};
            std::memcpy(both, &sum, sizeof sum);
        }
    }

    // Let the waiting group be one of NaNs.
    ADQ_INLINE void discard() {
        for (int i = 0; i < kLanes; ++i) place_[i] = row_[i] + 2 * kCells;
    }

    const StatisticsSink& sink_;
    Memory& memory_;
    std::int32_t row_[kLanes];    // where a lane's histogram begins
    std::int32_t place_[kLanes];  // of the waiting group
    float value_[kLanes];
};

// n is a multiple of 16. Tables and sums are local, and apart from what is indexed, to stay in registers.
template <class T, class Cells, class Statistics>
void sweep_steps(const StepTable& table, const T* x, std::int64_t n, T* y, std::uint8_t* codes,
                 const StatisticsSink& sink) {
    const Cells cells(table.edges);
    const typename Cells::Table value(table.value);
    const Floats scale = fill(table.scale);
    const Output<T> out(y, table.stream);
    typename Statistics::Memory memory;
    Statistics statistics(sink, memory);
    for (std::int64_t begin = 0; begin < n; begin += kBlock) {
        const std::int64_t size = n - begin < kBlock ? n - begin : kBlock;
        for (std::int64_t i = 0; i < size; i += kLanes) {
            unroll<kParts>([&](auto part) ADQ_INLINE_LAMBDA {
                const std::int64_t at = begin + i + kWidth * part.value;
                const Floats w = Storage<T>::load(x + at);
                // a block is read while the one before it is worked on, of which its loads alone would make a
                // gap
                if constexpr (Statistics::kCounts) prefetch(x + at + kBlock, kWidth);
                const Floats u = Statistics::kCounts ? w : w * scale;
                const auto found = cells.find(u);
                const Mask known = is_number(u);
                if (out.wanted()) {
                    const Ints word = bits(cells.pick(value, u, found));
                    out.put(at, select(known, word, fill(Storage<T>::kNan)));
                }
                if (codes != nullptr) narrow(codes + at, cells.number(found));
                if constexpr (Statistics::kCounts) {
                    const Ints cell = select(known, cells.number(found), fill(kNoCell));
                    statistics.add(i + kWidth * part.value, part, w, cell, found);
                }
            });
        }
        statistics.flush(x + begin, size);
    }
    statistics.finish();
}

template <class T, class Cells, class Statistics>
void run_sweeps(const StepTable& table, const T* x, std::int64_t n, T* y, std::uint8_t* codes,
                const StatisticsSink& sink) {
    sweep_steps<T, Cells, Statistics>(table, x, whole_groups(n), y, codes, sink);
    if (whole_groups(n) == n) return;
    const InputTail<T> x_tail(x, n);
    OutputTail<T> y_tail(y, n);
    OutputTail<std::uint8_t> codes_tail(codes, n);
    sweep_steps<T, Cells, Statistics>(table, x_tail.lane, kLanes, y_tail.data(), codes_tail.data(), sink);
    y_tail.copy();
    codes_tail.copy();
}

template <class T, int kCells>
void run_steps(const StepTable& table, const T* x, std::int64_t n, T* y, std::uint8_t* codes, double* total,
               std::int64_t* count) {
    const StatisticsSink sink{total, count, {0, 1, 2, 3, 4, 5, 6, 7}};
    if (total == nullptr) {
        run_sweeps<T, Cells<kCells>, NoStatistics>(table, x, n, y, codes, sink);
    } else if constexpr (kCells <= 8) {
        run_sweeps<T, Cells<kCells>, ChainStatistics<kCells>>(table, x, n, y, codes, sink);
#if ADQ_HAS_PERMUTE
    } else if constexpr (kCells == 16) {
        run_sweeps<T, DigitCells, DigitStatistics>(table, x, n, y, codes, sink);
#endif
    } else {
        run_sweeps<T, Cells<kCells>, HistogramStatistics<kCells>>(table, x, n, y, codes, sink);
    }
}

template <class T>
void steps(const StepTable& table, const T* x, std::int64_t n, T* y, std::uint8_t* codes, double* total,
           std::int64_t* count) {
    switch (table.edges.cells) {
        case 4: return run_steps<T, 4>(table, x, n, y, codes, total, count);
        case 8: return run_steps<T, 8>(table, x, n, y, codes, total, count);
        case 16: return run_steps<T, 16>(table, x, n, y, codes, total, count);
        case 32: return run_steps<T, 32>(table, x, n, y, codes, total, count);
        case 64: return run_steps<T, 64>(table, x, n, y, codes, total, count);
        default: return run_steps<T, 256>(table, x, n, y, codes, total, count);
    }
}

}  // namespace ADQ_ISA
}  // namespace adq
