// The backward pass of the activation quantizer: one pass over (x, grad) for all five gradients.
//
// With segment i of width w_i where T_i < u <= T_{i+1}, gi = grad / w_i inside the segments and 0 outside,
// the gradients of threshold_quantize are (rise = D, or R where one interval serves all steps)
//
//     d_x           = rise out_scale in_scale gi
//     d_start       = -rise out_scale sum gi
//     d_interval[j] = -rise out_scale sum gi clamp((u - T_j) / w_j, 0, 1)
//     d_in_scale    = rise out_scale sum gi x
//     d_out_scale   = sum grad (D q - offset)
//
// The clamped ramp is the segment's own H_j / w_j and the flow of the segments above it, in one sum.
// A level's edge lies inside its segment, so q = segment + (u > middle) exactly. N2UQ, arXiv 2111.14826, 3.2.
#pragma once

#include "cells.h"
#include "groups.h"
#include "uniform.h"

namespace adq {
namespace ADQ_ISA {

// The sums of gi and of gi (u - T_j) / w_j in each segment, one histogram a lane.
struct SegmentHistograms {
    float flow[kLanes][kMaxLevels];
    float ramp[kLanes][kMaxLevels];

    explicit SegmentHistograms(int segments) {
        for (int l = 0; l < kLanes; ++l) {
            std::memset(flow[l], 0, segments * sizeof flow[0][0]);
            std::memset(ramp[l], 0, segments * sizeof ramp[0][0]);
        }
    }

    // Every segment's ramp takes the flow of the segments above it.
    void finish(int segments, double* ramps) const {
        double flows[kMaxLevels] = {};
        add_rows<kMaxLevels>(flow, segments, flows);
        add_rows<kMaxLevels>(ramp, segments, ramps);
        double above = 0.0;
        for (int j = segments - 1; j >= 0; --j) {
            ramps[j] += above;
            above += flows[j];
        }
    }
};

// The ramp sums of up to 16 segments: one accumulator a segment and lane.
template <int kCells>
class ChainRamps {
 public:
    using Totals = LaneTotals<kCells>;

    ADQ_INLINE ChainRamps(const SlopeTable& table, SegmentHistograms*) {
        unroll<kCells - 1>(
            [&](auto j) ADQ_INLINE_LAMBDA { boundary_[j.value] = fill(table.boundaries.sorted[j.value]); });
        clear();
    }

    // Below segment j: nothing. In it: the ramp. Above it: gi.
    ADQ_INLINE void add(int part, Floats u, Ints, Floats gi, Floats ramp) {
        unroll<kCells>([&](auto j) ADQ_INLINE_LAMBDA {
            Floats value = ramp;
            if constexpr (j.value + 1 < kCells) value = select(greater(u, boundary_[j.value]), gi, ramp);
            Floats& sum = sum_[j.value][part];
            if constexpr (j.value == 0) {
                sum = sum + value;
            } else {
                sum = add_where(sum, greater(u, boundary_[j.value - 1]), value);
            }
        });
    }

    ADQ_INLINE void flush(Totals& totals) {
        float sum[kCells][kLanes];
        unroll<kCells>([&](auto j)
                           ADQ_INLINE_LAMBDA { std::memcpy(sum[j.value], sum_[j.value], sizeof sum[0]); });
        clear();
        totals.add(sum);
    }

 private:
    ADQ_INLINE void clear() {
        unroll<kCells>([&](auto j) ADQ_INLINE_LAMBDA {
            for (int p = 0; p < kParts; ++p) sum_[j.value][p] = fill(0.0f);
        });
    }

    Floats boundary_[kCells > 1 ? kCells - 1 : 1];
    Floats sum_[kCells][kParts];
};

// The same for more segments; added up once, after the chunk.
class HistogramRamps {
 public:
    struct Totals {
        void finish(double*) const {}
    };

    ADQ_INLINE HistogramRamps(const SlopeTable&, SegmentHistograms* histograms) : histograms_(*histograms) {}

    ADQ_INLINE void add(int part, Floats, Ints cell, Floats gi, Floats ramp) {
        const Lanes at(cell), flows(gi), ramps(ramp);
        for (int i = 0; i < kWidth; ++i) {
            histograms_.flow[kWidth * part + i][at.number[i]] += flows.real[i];
            histograms_.ramp[kWidth * part + i][at.number[i]] += ramps.real[i];
        }
    }

    ADQ_INLINE void flush(Totals&) {}

 private:
    SegmentHistograms& histograms_;
};

// The sums over all segments.
class CommonSums {
 public:
    ADQ_INLINE CommonSums() { clear(); }

    ADQ_INLINE void add(int part, Floats flow, Floats in, Floats out) {
        flow_[part] = flow_[part] + flow;
        in_[part] = in_[part] + in;
        out_[part] = out_[part] + out;
    }

    ADQ_INLINE void flush(LaneTotals<3>& totals) {
        float lanes[3][kLanes];
        std::memcpy(lanes[0], flow_, sizeof lanes[0]);
        std::memcpy(lanes[1], in_, sizeof lanes[1]);
        std::memcpy(lanes[2], out_, sizeof lanes[2]);
        clear();
        totals.add(lanes);
    }

 private:
    ADQ_INLINE void clear() {
        for (int p = 0; p < kParts; ++p) flow_[p] = in_[p] = out_[p] = fill(0.0f);
    }

    Floats flow_[kParts], in_[kParts], out_[kParts];
};

// The output level of u, in the closed form or from the segment.
template <class Cells, bool kUniform>
class SlopeLevel {
 public:
    explicit ADQ_INLINE SlopeLevel(const SlopeTable& table) : middle_(table.middle), uniform_(table.level) {}

    ADQ_INLINE Floats operator()(const Cells& cells, Floats u, Ints found) const {
        if constexpr (kUniform) return uniform_.level(uniform_.position(u));
        return add_where(to_float(cells.number(found)), greater(u, cells.pick(middle_, u, found)),
                         fill(1.0f));
    }

 private:
    const typename Cells::Table middle_;
    const UniformLevel uniform_;
};

// n is a multiple of 16. Tables and sums are local, and apart from what is indexed, to stay in registers.
template <class T, class Cells, class Ramps, bool kUniform>
void sweep_slopes(const SlopeTable& table, const T* grad, const T* x, std::int64_t n, T* d_x, SlopeSums* sums,
                  SegmentHistograms* histograms) {
    const Cells cells(table.boundaries);
    const typename Cells::Table origins(table.origin), inverses(table.inverse);
    const SlopeLevel<Cells, kUniform> level(table);
    const Floats scale = fill(table.level.scale), low = fill(table.low), high = fill(table.high);
    const Floats step = fill(table.level.step), offset = fill(table.level.offset),
                 dx_scale = fill(table.dx_scale);
    const Output<T> out(d_x, table.stream);
    Ramps ramps(table, histograms);
    CommonSums common;
    typename Ramps::Totals ramp_totals;
    LaneTotals<3> common_totals;
    for (std::int64_t i = 0; i < n;) {
        const std::int64_t end = n - i < kBlock ? n : i + kBlock;
        for (; i < end; i += kLanes) {
            unroll<kParts>([&](auto part) ADQ_INLINE_LAMBDA {
                const std::int64_t at = i + kWidth * part.value;
                const Floats w = Storage<T>::load(x + at), g = Storage<T>::load(grad + at);
                const Floats u = w * scale;
                const Ints found = cells.find(u);
                const Mask inside = and_not(greater(u, low), greater(u, high));
                const Floats inverse = cells.pick(inverses, u, found);
                const Floats gi = only_where(inside, g) * inverse;
                if (out.wanted()) out.put(at, Storage<T>::encode(gi * dx_scale));
                const Floats ramp = (u - cells.pick(origins, u, found)) * inverse;
                ramps.add(part.value, u, cells.number(found), gi, only_where(inside, gi * ramp));
                const Floats d_out = g * (step * level(cells, u, found) - offset);
                common.add(part.value, gi, only_where(inside, gi * w), only_where(is_number(u), d_out));
            });
        }
        ramps.flush(ramp_totals);
        common.flush(common_totals);
    }
    ramp_totals.finish(sums->ramp);
    common_totals.finish(sums->common);
}

template <class T, class Cells, class Ramps, bool kUniform>
void run_sweeps(const SlopeTable& table, const T* grad, const T* x, std::int64_t n, T* d_x, SlopeSums* sums,
                SegmentHistograms* histograms) {
    const auto sweep = sweep_slopes<T, Cells, Ramps, kUniform>;
    sweep(table, grad, x, whole_groups(n), d_x, sums, histograms);
    if (whole_groups(n) == n) return;
    const InputTail<T> grad_tail(grad, n), x_tail(x, n);
    OutputTail<T> dx_tail(d_x, n);
    sweep(table, grad_tail.lane, x_tail.lane, kLanes, dx_tail.data(), sums, histograms);
    dx_tail.copy();
}

template <class T, int kCells>
void run_slopes(const SlopeTable& table, const T* grad, const T* x, std::int64_t n, T* d_x, SlopeSums* sums) {
    if constexpr (kCells <= 16) {
        run_sweeps<T, Cells<kCells>, ChainRamps<kCells>, false>(table, grad, x, n, d_x, sums, nullptr);
    } else {
        SegmentHistograms histograms(table.segments);
        run_sweeps<T, Cells<kCells>, HistogramRamps, false>(table, grad, x, n, d_x, sums, &histograms);
        histograms.finish(table.segments, sums->ramp);
    }
}

template <class T>
void slopes(const SlopeTable& table, const T* grad, const T* x, std::int64_t n, T* d_x, SlopeSums* sums) {
    std::memset(sums, 0, sizeof *sums);
    if (table.uniform) {
        return run_sweeps<T, SingleCell, ChainRamps<1>, true>(table, grad, x, n, d_x, sums, nullptr);
    }
    switch (table.boundaries.cells) {
        case 4: return run_slopes<T, 4>(table, grad, x, n, d_x, sums);
        case 8: return run_slopes<T, 8>(table, grad, x, n, d_x, sums);
        case 16: return run_slopes<T, 16>(table, grad, x, n, d_x, sums);
        case 32: return run_slopes<T, 32>(table, grad, x, n, d_x, sums);
        case 64: return run_slopes<T, 64>(table, grad, x, n, d_x, sums);
        default: return run_slopes<T, 256>(table, grad, x, n, d_x, sums);
    }
}

}  // namespace ADQ_ISA
}  // namespace adq
