// The step function y = value[#{j : scale x > edge[j]}]: codebook lookup, and the activation quantizer.
//
// One pass reads x and writes y, codes and the per-cell statistics, as far as they are wanted. NaN gives
// NaN, code 0, and counts in no cell. Sums: 16 float32 lanes over blocks of kBlock elements (or, above 16
// cells, one histogram a lane over the chunk), added in double in a fixed order.
#pragma once

#include "cells.h"
#include "groups.h"

namespace adq {
namespace ADQ_ISA {

// One histogram a lane, so that no two lanes of a group meet. Entry `cells` of a row takes the NaNs.
struct Histograms {
    static constexpr int kRow = kMaxLevels + 1;
    double sum[kLanes][kRow];  // float32 would lose bits over the chunk where the weights are alike
    std::int32_t seen[kLanes][kRow];

    explicit Histograms(int cells) {
        for (int l = 0; l < kLanes; ++l) {
            std::memset(sum[l], 0, (cells + 1) * sizeof sum[0][0]);
            std::memset(seen[l], 0, (cells + 1) * sizeof seen[0][0]);
        }
    }
};

struct StatisticsSink {
    int cells;
    double* total;
    std::int64_t* count;
    Histograms* histograms;
    // 0 .. 15, in memory on purpose: comparisons read them there, and the registers are left to the sums.
    std::int32_t number[16];
};

struct NoStatistics {
    struct Memory {};
    NoStatistics(const StatisticsSink&, Memory&) {}
    ADQ_INLINE void add(std::int64_t, int, Floats, Ints) {}
    ADQ_INLINE void flush(std::int64_t) {}
    ADQ_INLINE void finish() {}
};

// How often each cell occurs in `cells`: one byte a lane counts up to 255.
template <int kCells>
inline void count_cells(const std::uint8_t (&cells)[kBlock], std::int64_t* count) {
    constexpr int lanes = sizeof(ByteLanes);
    static_assert(kBlock / lanes < 256, "the counts of a block fit a byte");
    ByteLanes seen[kCells];
    unroll<kCells>([&](auto k) ADQ_INLINE_LAMBDA { seen[k.value] = ByteLanes{}; });
    for (int i = 0; i < kBlock; i += lanes) {
        ByteLanes cell;
        std::memcpy(&cell, cells + i, sizeof cell);
        unroll<kCells>([&](auto k)
                           ADQ_INLINE_LAMBDA { seen[k.value] = count_equal(seen[k.value], cell, k.value); });
    }
    std::uint8_t byte[kCells][lanes];
    unroll<kCells>([&](auto k) ADQ_INLINE_LAMBDA { std::memcpy(byte[k.value], &seen[k.value], lanes); });
    for (int k = 0; k < kCells; ++k) {
        std::int32_t sum = 0;
        for (int i = 0; i < lanes; ++i) sum += byte[k][i];
        count[k] += sum;
    }
}

// A sum for each cell and lane in registers; the cells of a block are kept and counted at its end.
template <int kCells>
class ChainStatistics {
 public:
    struct Memory {
        std::uint8_t cell[kBlock];  // 255 for NaN
        LaneTotals<kCells> total;
    };

    ADQ_INLINE ChainStatistics(const StatisticsSink& sink, Memory& memory) : sink_(sink), memory_(memory) {
        clear();
    }

    ADQ_INLINE void add(std::int64_t at, int part, Floats x, Ints cell) {
        cell = select(is_number(x), cell, fill(-1));
        narrow(memory_.cell + at, cell);
        unroll<kCells>([&](auto k) ADQ_INLINE_LAMBDA {
            sum_[k.value][part] = add_where(sum_[k.value][part], equal(cell, fill(sink_.number[k.value])), x);
        });
    }

    ADQ_INLINE void flush(std::int64_t n) {
        float sum[kCells][kLanes];
        unroll<kCells>([&](auto k)
                           ADQ_INLINE_LAMBDA { std::memcpy(sum[k.value], sum_[k.value], sizeof sum[0]); });
        clear();
        memory_.total.add(sum);
        if (n < kBlock) std::memset(memory_.cell + n, 0xff, kBlock - n);
        count_cells<kCells>(memory_.cell, sink_.count);
    }

    ADQ_INLINE void finish() { memory_.total.finish(sink_.total); }

 private:
    ADQ_INLINE void clear() {
        unroll<kCells>([&](auto k) ADQ_INLINE_LAMBDA {
            for (int p = 0; p < kParts; ++p) sum_[k.value][p] = fill(0.0f);
        });
    }

    Floats sum_[kCells][kParts];
    const StatisticsSink& sink_;
    Memory& memory_;
};

// Added up once, after the chunk: a lane takes at most kChunk / 16 elements.
class HistogramStatistics {
 public:
    struct Memory {};
    HistogramStatistics(const StatisticsSink& sink, Memory&)
        : cells_(sink.cells), histograms_(*sink.histograms) {}

    ADQ_INLINE void add(std::int64_t, int part, Floats x, Ints cell) {
        const Lanes value(x), at(select(is_number(x), cell, fill(cells_)));
        for (int i = 0; i < kWidth; ++i) {
            histograms_.sum[kWidth * part + i][at.number[i]] += value.real[i];
            histograms_.seen[kWidth * part + i][at.number[i]] += 1;
        }
    }

    ADQ_INLINE void flush(std::int64_t) {}
    ADQ_INLINE void finish() {}

 private:
    const int cells_;
    Histograms& histograms_;
};

// n is a multiple of 16. Tables and sums are local, and apart from what is indexed, to stay in registers.
template <class T, class Cells, class Statistics>
void sweep_steps(const StepTable& table, const T* x, std::int64_t n, T* y, std::uint8_t* codes,
                 const StatisticsSink& sink) {
    const Cells cells(table.edges);
    const typename Cells::Table value(table.value);
    const Floats scale = fill(table.scale);
    typename Statistics::Memory memory;
    Statistics statistics(sink, memory);
    for (std::int64_t begin = 0; begin < n; begin += kBlock) {
        const std::int64_t size = n - begin < kBlock ? n - begin : kBlock;
        for (std::int64_t i = 0; i < size; i += kLanes) {
            unroll<kParts>([&](auto part) ADQ_INLINE_LAMBDA {
                const std::int64_t at = begin + i + kWidth * part.value;
                const Floats w = Storage<T>::load(x + at);
                const Floats u = w * scale;
                const Ints found = cells.find(u);
                if (y != nullptr) {
                    const Ints word = bits(cells.pick(value, u, found));
                    Storage<T>::store_bits(y + at, select(is_number(u), word, fill(Storage<T>::kNan)));
                }
                if (codes != nullptr) narrow(codes + at, cells.number(found));
                statistics.add(i + kWidth * part.value, part.value, w, cells.number(found));
            });
        }
        statistics.flush(size);
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
    StatisticsSink sink{
        kCells, total, count, nullptr, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};
    if (total == nullptr) {
        run_sweeps<T, Cells<kCells>, NoStatistics>(table, x, n, y, codes, sink);
    } else if constexpr (kCells <= 16) {
        run_sweeps<T, Cells<kCells>, ChainStatistics<kCells>>(table, x, n, y, codes, sink);
    } else {
        Histograms histograms(kCells);
        sink.histograms = &histograms;
        run_sweeps<T, Cells<kCells>, HistogramStatistics>(table, x, n, y, codes, sink);
        add_rows<Histograms::kRow>(histograms.sum, kCells, total);
        add_rows<Histograms::kRow>(histograms.seen, kCells, count);
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
