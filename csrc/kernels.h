// What the instruction sets implement: single-threaded kernels over one range, and their tables.
#pragma once

#include <cstdint>

#include "adq.h"

namespace adq {

// An ascending table of edges as the searches want it. `cells` is 4, 8, 16, 32, 64 or 256; the edges above
// the last real one are +inf, which no u exceeds.
struct EdgeTable {
    int cells;
    float sorted[kMaxLevels];  // [cells - 1]
    float heap[kMaxLevels];    // [cells] as a binary tree: root 1, the children of node i are 2 i and 2 i + 1
};

// A step function: cell(u) = #{j : u > edge[j]}, u = scale * x. Tables of fewer than 16 cells are repeated up
// to 16.
struct StepTable {
    EdgeTable edges;
    int levels;  // real cells, <= edges.cells
    float scale;
    bool stream;              // y is too large for the caches
    float value[kMaxLevels];  // what to store for each cell: the bits of the storage type, kept as they are
};

// The levels of codes of some bits; those above the real ones are the last real one.
struct LevelTable {
    int bits;
    bool stream;  // y is too large for the caches
    float value[kMaxLevels];
};

// q = clamp(ceil((u - start) / width - 0.5), 0, steps) and y = out_scale * (step * q - offset).
struct UniformTable {
    float scale;
    float start;
    float width;
    float steps;
    float step;
    float offset;
    float out_scale;
    bool stream;  // y is too large for the caches
};

// The surrogate's segments: segment(u) = #{j >= 1 : u > T_j}, slope zero unless low < u <= high.
struct SlopeTable {
    EdgeTable boundaries;  // T_1 .. T_{segments - 1}
    int segments;
    bool uniform;
    UniformTable level;
    bool stream;  // d_x is too large for the caches
    float low;
    float high;
    float dx_scale;             // d_x = grad * inverse[segment] * dx_scale
    float origin[kMaxLevels];   // T_segment
    float inverse[kMaxLevels];  // 1 / (T_{segment + 1} - T_segment)
    float middle[kMaxLevels];   // edge of the level inside the segment
};

// Sums over one chunk; gi = grad / width inside the segments, else 0.
struct SlopeSums {
    enum { kFlow, kIn, kOut };
    double common[3];  // kFlow: sum gi; kIn: sum gi x; kOut: sum grad (D q - offset) of every x but NaN
    double ramp[kMaxLevels];  // [j] sum gi clamp((u - T_j) / width_j, 0, 1)
};

constexpr int kDotRows = 8;  // rows of x that are multiplied with the same levels

struct Kernels {
    // values[count], count a multiple of 16, rounded to dtype in place: its bits in the low end of each word.
    void (*encode)(Dtype dtype, float* values, int count);
    // y, codes optional and apart from x; total and count (both or neither) are added to, and then n <=
    // kChunk.
    void (*steps)(Dtype dtype, const StepTable& table, const void* x, std::int64_t n, void* y,
                  std::uint8_t* codes, double* total, std::int64_t* count);
    // v = w / scale, and y = q * scale rounded to dtype.
    void (*divide)(Dtype dtype, const void* w, std::int64_t n, float scale, float* v);
    void (*multiply)(Dtype dtype, const float* q, std::int64_t n, float scale, void* y);
    // Adds to sums: of w q, and of q^2.
    void (*products)(Dtype dtype, const void* w, const float* q, std::int64_t n, double* sums);
    // y, levels optional and apart from x.
    void (*uniform)(Dtype dtype, const UniformTable& table, const void* x, std::int64_t n, void* y,
                    std::uint8_t* levels);
    // d_x optional; sums are overwritten; n <= kChunk.
    void (*slopes)(Dtype dtype, const SlopeTable& table, const void* grad, const void* x, std::int64_t n,
                   void* d_x, SlopeSums* sums);
    void (*pack)(const std::uint8_t* codes, std::int64_t n, int bits, std::uint8_t* packed);
    void (*unpack)(const std::uint8_t* packed, int bits, std::int64_t n, std::uint8_t* codes);
    // y = scale * value[code], codes below 2^bits.
    void (*levels)(const LevelTable& table, const std::uint8_t* codes, std::int64_t n, float scale, float* y);
    // Adds to sums[r]: of value[code[i]] x[r stride + i], i < n, for 1 <= rows <= kDotRows.
    void (*dots)(const LevelTable& table, const std::uint8_t* codes, std::int64_t n, const float* x,
                 std::int64_t stride, int rows, double* sums);
};

namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

}  // namespace adq
