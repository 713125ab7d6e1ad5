// The integer convolution's kernels, as the instruction sets implement them, and what they are given.
//
// Weights are int8, activations uint8, sums int32 and exact: an implementation may add in any order. The
// weights come in blocks of 16 output channels times 4 inputs (adq/layout.py); a panel is a few blocks' whole
// reductions, laid out as an instruction set wants to multiply them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace adq {

constexpr int kBlockOutputs = 16;
constexpr int kBlockInputs = 4;
constexpr int kBlockWeights = kBlockOutputs * kBlockInputs;
constexpr int kMaxBlocks = 4;  // of a panel

// How a quantizer decides: by edges, or by the closed form where one interval serves all steps.
struct QuantizerTable {
    bool uniform;
    EdgeTable edges;
    UniformTable closed;  // scale is that of both
};

// Where a panel's weights are.
struct PanelSource {
    bool depthwise;
    const std::uint8_t* blocks;  // [count][steps][8 * bits], bits planes of 64 bits a block
    int count;                   // output blocks, 1..kMaxBlocks
    std::int64_t steps;          // blocks of 4 inputs along the reduction
    int bits;                    // 1..4, or 8: int8 weights
    std::int8_t table[16];       // the weight of each code; unused with 8 bits
};

// What follows the sums of a panel's outputs: v = float(a) * multiplier + bias + residual, clamped, stored,
// and its levels. Arrays of parameters hold 16 entries a block. A pixel of the strip is places[pixel] *
// stride elements from the addresses of residual, y and levels, which are those of the panel's first output.
struct Epilogue {
    const std::int32_t* initial;
    const float* multiplier;
    const float* bias;
    float low;
    float high;
    int outputs;  // that exist, at most 16 a block and more than 16 a block less one
    const std::int32_t* places;
    std::int64_t stride;
    const float* residual;  // optional
    float* y;               // optional
    const std::vector<QuantizerTable>* tables;
    std::vector<std::uint8_t*> levels;  // a result for each table
};

// Consecutive input bytes that are multiplied with consecutive steps of the panel. Depthwise: a tap, and four
// of them are a step; the last one may be repeated.
struct Run {
    std::int64_t step;    // the first one
    std::int64_t steps;   // 4 bytes each
    std::int64_t offset;  // bytes from the pixel's origin
};

// Pixels that have the same runs, times a panel.
struct Strip {
    const void* panel;
    int blocks;
    const Run* runs;
    int run_count;
    const std::uint8_t* const* origins;  // [pixels]
    std::int64_t channel;                // bytes to the panel's first input
    std::int64_t steps_held;             // that a part of a sum holds; of small bytes
    int pixels;
    Epilogue epilogue;
};

// A way to multiply, and the panels that it wants.
struct MultiplyKernels {
    int panel_bytes;  // of a block of a panel
    void (*prepare)(const PanelSource& source, void* panel);
    void (*multiply)(const Strip& strip);
};

struct IntegerKernels {
    int blocks;  // most that a panel should have
    MultiplyKernels dense;
    MultiplyKernels depthwise;
    MultiplyKernels small;  // dense, levels and weights of few bits; {} where nothing is gained by it
};

namespace baseline {
extern const IntegerKernels kIntegerKernels;
}
namespace avx2 {
extern const IntegerKernels kIntegerKernels;
}
namespace avx2vnni {
extern const IntegerKernels kIntegerKernels;
}
namespace avx512 {
extern const IntegerKernels kIntegerKernels;
}
namespace avx512vnni {
extern const IntegerKernels kIntegerKernels;
}

}  // namespace adq
