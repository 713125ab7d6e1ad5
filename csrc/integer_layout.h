// How the integer convolution reads its input.
#pragma once

#include "adq.h"
#include "integer.h"

namespace adq {

inline std::int64_t divide_up(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }
inline std::int64_t round_up(std::int64_t n, std::int64_t to) { return divide_up(n, to) * to; }

struct Layout {
    bool depthwise;
    bool copied;
    std::int64_t groups;   // 1 if depthwise
    std::int64_t inputs;   // channels of a group
    std::int64_t outputs;  // of a group
    std::int64_t unit;     // bytes of a group's channels in a pixel
    std::int64_t pixel;    // bytes of a pixel
    std::int64_t margin;   // columns before the image
    std::int64_t columns;  // of a row, margins included
    std::int64_t taps;     // rows times columns of the kernel
    std::int64_t run;      // blocks of four inputs that a tap has
    std::int64_t steps;    // blocks of four inputs of the whole reduction
    std::int64_t blocks;   // output blocks of a group
};

inline Layout find_layout(const Convolution& args) {
    Layout out;
    out.depthwise = args.groups > 1 && args.outputs == args.groups && args.channels == args.groups;
    out.groups = out.depthwise ? 1 : args.groups;
    out.inputs = args.channels / out.groups;
    out.outputs = args.outputs / out.groups;
    out.unit = round_up(out.inputs, out.depthwise ? kBlockOutputs : kBlockInputs);
    out.copied = out.unit != out.inputs;
    out.pixel = out.groups * out.unit;
    out.margin = out.copied ? args.padding[1] : 0;
    out.columns = args.width + 2 * out.margin;
    out.taps = args.kernel[0] * args.kernel[1];
    out.run = out.unit / kBlockInputs;
    out.steps = out.depthwise ? divide_up(out.taps, kBlockInputs) : out.taps * out.run;
    out.blocks = divide_up(out.outputs, kBlockOutputs);
    return out;
}

}  // namespace adq
