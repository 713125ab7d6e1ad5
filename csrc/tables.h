// The tables of the kernels from edges and values.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "isa.h"
#include "kernels.h"

namespace adq {

// Whether n elements are more than the caches of most processors hold.
inline bool exceeds_caches(Dtype dtype, std::int64_t n) {
    return n >= (dtype == Dtype::kFloat32 ? 8 : 16) * (1 << 20);
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The size of the searches' tables that holds the cells.
inline int table_size(int count) {
    for (int cells : {4, 8, 16, 32, 64}) {
        if (count <= cells) return cells;
    }
    return kMaxLevels;
}

// Completes a table whose first `count` sorted edges are set.
inline void finish(EdgeTable& edges, int count) {
    edges.cells = table_size(count + 1);
    std::fill(edges.sorted + count, edges.sorted + kMaxLevels, kInfinity);
    std::fill(edges.heap, edges.heap + 16, 0.0f);
    for (int first = 1; first < edges.cells; first *= 2) {
        const int stride = edges.cells / first;
        for (int i = 0; i < first; ++i) edges.heap[first + i] = edges.sorted[i * stride + stride / 2 - 1];
    }
}

// Repeats a table of `cells` entries up to 16, after clearing those above the `count` real ones.
inline void finish(float* table, int count, int cells, float clear) {
    std::fill(table + count, table + cells, clear);
    for (int i = cells; i < 16; ++i) table[i] = table[i - cells];
}

// Width, start and edges of the segments as float32 additions in order give them.
struct Segments {
    float boundary[kMaxLevels + 1];  // T_0 .. T_n
    float width[kMaxLevels];
    float edge[kMaxLevels];  // T_i + width[i] / 2
};

inline float clamped(float interval) { return interval < kMinInterval ? kMinInterval : interval; }

inline bool is_uniform(const Quantizer& quantizer) { return quantizer.intervals != quantizer.steps; }

inline Segments find_segments(const Quantizer& quantizer) {
    Segments out;
    out.boundary[0] = *quantizer.start;
    for (int i = 0; i < quantizer.steps; ++i) {
        out.width[i] = clamped(quantizer.interval[i]);
        out.edge[i] = out.boundary[i] + 0.5f * out.width[i];
        out.boundary[i + 1] = out.boundary[i] + out.width[i];
    }
    return out;
}

inline void copy_edges(const Quantizer& quantizer, float* to) {
    const Segments segments = find_segments(quantizer);
    std::copy(segments.edge, segments.edge + quantizer.steps, to);
}

// The levels of a quantizer with one interval for all steps.
inline UniformTable closed_levels(const Quantizer& quantizer) {
    UniformTable table{};
    table.scale = *quantizer.in_scale;
    table.start = *quantizer.start;
    table.width = clamped(*quantizer.interval);
    table.steps = static_cast<float>(quantizer.steps);
    return table;
}

// Element `index` of an array of the dtype; null stays null.
template <class Pointer>
Pointer at(Pointer data, Dtype dtype, std::int64_t index) {
    using Byte = typename std::conditional<std::is_const<typename std::remove_pointer<Pointer>::type>::value,
                                           const char, char>::type;
    const std::int64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
    return data == nullptr ? nullptr : static_cast<Byte*>(data) + size * index;
}

// Completes a table whose edges and values are set, and rounds the values to their storage type.
inline void finish(StepTable& table, Dtype dtype) {
    finish(table.edges, table.levels - 1);
    finish(table.value, table.levels, table.edges.cells, 0.0f);
    kernels().encode(dtype, table.value, std::max(table.edges.cells, 16));
}

}  // namespace adq
