// The integer convolution: where the taps of each pixel are, panels of weights, pixels and panels over the
// threads.
//
// There is no im2col. An output pixel's reduction is a list of taps, each the address of a run of input
// bytes: a pixel's channels in x itself, or a row of the level `zero` outside of the image. Where the
// channels of a group are no multiple of four the rows that a chunk of pixels needs are copied first, with
// zeros for the missing channels and the padding at both sides; then a row of the kernel, if it is not
// dilated, is one run.
#include "integer.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>

#include "adq.h"
#include "isa.h"
#include "parallel.h"
#include "tables.h"

namespace adq {
namespace {

constexpr std::int64_t kChunkPixels = 1024;  // that share a decoded panel
constexpr std::int64_t kItems = 4;           // for each thread, at least, where they cannot be equally many

std::int64_t divide_up(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }
std::int64_t round_up(std::int64_t n, std::int64_t to) { return divide_up(n, to) * to; }

// Memory that a thread keeps from call to call, aligned to a cache line.
class Scratch {
 public:
    ~Scratch() { release(); }
    std::uint8_t* reserve(std::int64_t bytes) {
        if (bytes > size_) {
            release();
            data_ = static_cast<std::uint8_t*>(::operator new(static_cast<std::size_t>(bytes), kLine));
            size_ = bytes;
        }
        return data_;
    }

 private:
    static constexpr std::align_val_t kLine{64};
    void release() {
        if (data_ != nullptr) ::operator delete(data_, kLine);
        data_ = nullptr, size_ = 0;
    }
    std::uint8_t* data_ = nullptr;
    std::int64_t size_ = 0;
};

// Output blocks of one group that are computed together.
struct Panel {
    std::int64_t group;
    std::int64_t first;  // block
    int count;
};

// How the input is read.
struct Layout {
    bool depthwise;
    bool copied;
    bool merged;           // a row of the kernel is one tap
    std::int64_t groups;   // 1 if depthwise
    std::int64_t inputs;   // channels of a group
    std::int64_t outputs;  // of a group
    std::int64_t unit;     // bytes of a group's channels in a pixel
    std::int64_t pixel;    // bytes of a pixel
    std::int64_t margin;   // columns before the image
    std::int64_t columns;  // of a row, margins included
    std::int64_t taps;
    std::int64_t run;     // blocks of four inputs that a tap has
    std::int64_t steps;   // blocks of four inputs of the whole reduction
    std::int64_t blocks;  // output blocks of a group
};

Layout find_layout(const Convolution& args) {
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
    const bool padded = args.padding[1] > out.margin;
    out.merged = !out.depthwise && out.groups == 1 && args.dilation[1] == 1 && !padded;
    const std::int64_t taps = args.kernel[0] * args.kernel[1];
    out.taps = out.merged ? args.kernel[0] : taps;
    out.run = out.unit / kBlockInputs * (taps / out.taps);
    out.steps = out.depthwise ? divide_up(taps, kBlockInputs) : out.taps * out.run;
    out.blocks = divide_up(out.outputs, kBlockOutputs);
    return out;
}

// The parameters of a panel's outputs, filled up to whole blocks.
struct Parameters {
    std::int32_t initial[kMaxBlocks * kBlockOutputs];
    float multiplier[kMaxBlocks * kBlockOutputs];
    float bias[kMaxBlocks * kBlockOutputs];
};

template <class T>
void copy_filled(const T* from, int count, T (&to)[kMaxBlocks * kBlockOutputs]) {
    std::copy(from, from + count, to);
    std::fill(to + count, std::end(to), T{});
}

// Rows of the input, counted over all images, from `first` on.
struct Rows {
    const std::uint8_t* data;
    std::int64_t first;
};

class Convolver {
 public:
    Convolver(const Convolution& args, int threads)
        : args_(args),
          isa_(integer_kernels()),
          layout_(find_layout(args)),
          pixels_(args.batch * args.out_height * args.out_width) {
        find_panels();
        find_chunk(threads);
        fill_outside();
        for (const Convolution::Levels& level : args.levels)
            tables_.push_back(quantizer_table(level.quantizer));
    }

    void run(int threads) const {
        const std::int64_t panels = static_cast<std::int64_t>(panels_.size());
        for_chunks(divide_up(pixels_, chunk_) * panels, 1, threads,
                   [&](std::int64_t, std::int64_t item, std::int64_t) {
                       const std::int64_t begin = item / panels * chunk_;
                       run_item(panels_[item % panels], begin, std::min(begin + chunk_, pixels_));
                   });
    }

 private:
    static QuantizerTable quantizer_table(const Quantizer& quantizer) {
        QuantizerTable table{};
        table.uniform = is_uniform(quantizer);
        table.closed = closed_levels(quantizer);
        if (table.uniform) return table;
        copy_edges(quantizer, table.edges.sorted);
        finish(table.edges, quantizer.steps);
        return table;
    }

    // Panels of a group have nearly equal numbers of blocks.
    void find_panels() {
        const std::int64_t count = divide_up(layout_.blocks, isa_.blocks);
        for (std::int64_t group = 0; group < layout_.groups; ++group) {
            for (std::int64_t i = 0; i < count; ++i) {
                const std::int64_t first = layout_.blocks * i / count;
                const std::int64_t end = layout_.blocks * (i + 1) / count;
                panels_.push_back({group, first, static_cast<int>(end - first)});
            }
        }
    }

    // Chunks of nearly equal size, so many that each thread gets as many items as the others, or several.
    void find_chunk(int threads) {
        const std::int64_t panels = static_cast<std::int64_t>(panels_.size());
        std::int64_t chunks = std::max<std::int64_t>(divide_up(pixels_, kChunkPixels), 1);
        const std::int64_t most = std::max<std::int64_t>(pixels_ / 16, 1);
        while (chunks < most && chunks * panels < kItems * threads && chunks * panels % threads != 0)
            ++chunks;
        chunk_ = std::max<std::int64_t>(divide_up(pixels_, chunks), 1);
    }

    // A tap outside of the image.
    void fill_outside() {
        const std::int64_t units = layout_.merged ? args_.kernel[1] : 1;
        outside_.assign(units * layout_.unit, 0);
        for (std::int64_t i = 0; i < units; ++i) {
            std::fill_n(outside_.begin() + i * layout_.unit, layout_.inputs, args_.zero);
        }
    }

    void run_item(const Panel& panel, std::int64_t begin, std::int64_t end) const {
        thread_local Scratch weights, rows;
        void* prepared = weights.reserve(layout_.steps * panel.count * isa_.panel_bytes);
        prepare(panel, prepared);
        const Rows input = layout_.copied ? copy_rows(begin, end, rows) : Rows{args_.x, 0};

        std::vector<const std::uint8_t*> inputs(layout_.taps * kStrip);
        Parameters parameters;
        Strip strip;
        strip.panel = prepared;
        strip.blocks = panel.count;
        strip.run = layout_.run;
        strip.taps = static_cast<int>(layout_.taps);
        strip.inputs = inputs.data();
        set_parameters(panel, parameters, strip.epilogue);
        for (std::int64_t at = begin; at < end; at += kStrip) {
            strip.pixels = static_cast<int>(std::min<std::int64_t>(kStrip, end - at));
            find_inputs(panel, input, at, strip.pixels, inputs.data());
            set_results(panel, at, strip.epilogue);
            layout_.depthwise ? isa_.depthwise(strip) : isa_.dense(strip);
        }
    }

    void prepare(const Panel& panel, void* to) const {
        PanelSource source{};
        source.count = panel.count;
        source.steps = layout_.steps;
        source.bits = 8;
        if (layout_.depthwise) {
            const std::vector<std::uint8_t> blocks = depthwise_blocks(panel);
            source.blocks = blocks.data();
            return isa_.prepare(source, to);
        }
        for (int bits = 1; bits <= 4; ++bits) {
            if (args_.table_levels == 1 << bits) source.bits = bits;
        }
        std::copy(args_.table, args_.table + args_.table_levels, source.table);
        const std::int64_t block = panel.group * layout_.blocks + panel.first;
        source.blocks = args_.weight + block * layout_.steps * 8 * source.bits;
        isa_.prepare(source, to);
    }

    // Depthwise weights, [taps][outputs], as blocks of four taps.
    std::vector<std::uint8_t> depthwise_blocks(const Panel& panel) const {
        std::vector<std::uint8_t> blocks(panel.count * layout_.steps * kBlockWeights);
        const std::int64_t first = panel.first * kBlockOutputs;
        const std::int64_t count = outputs_of(panel);
        for (std::int64_t tap = 0; tap < args_.kernel[0] * args_.kernel[1]; ++tap) {
            for (std::int64_t o = 0; o < count; ++o) {
                const std::int64_t block = o / kBlockOutputs * layout_.steps + tap / kBlockInputs;
                blocks[block * kBlockWeights + o % kBlockOutputs * kBlockInputs + tap % kBlockInputs] =
                    args_.weight[tap * args_.outputs + first + o];
            }
        }
        return blocks;
    }

    int outputs_of(const Panel& panel) const {
        const std::int64_t first = panel.first * kBlockOutputs;
        return static_cast<int>(std::min<std::int64_t>(panel.count * kBlockOutputs, layout_.outputs - first));
    }

    std::int64_t first_output(const Panel& panel) const {
        return panel.group * layout_.outputs + panel.first * kBlockOutputs;
    }

    void set_parameters(const Panel& panel, Parameters& parameters, Epilogue& epilogue) const {
        const std::int64_t first = first_output(panel);
        epilogue.outputs = outputs_of(panel);
        copy_filled(args_.initial + first, epilogue.outputs, parameters.initial);
        copy_filled(args_.multiplier + first, epilogue.outputs, parameters.multiplier);
        copy_filled(args_.bias + first, epilogue.outputs, parameters.bias);
        epilogue.initial = parameters.initial;
        epilogue.multiplier = parameters.multiplier;
        epilogue.bias = parameters.bias;
        epilogue.low = args_.low;
        epilogue.high = args_.high;
        epilogue.stride = args_.outputs;
        epilogue.tables = &tables_;
        epilogue.levels.resize(tables_.size());
    }

    void set_results(const Panel& panel, std::int64_t pixel, Epilogue& epilogue) const {
        const std::int64_t at = pixel * args_.outputs + first_output(panel);
        epilogue.residual = args_.residual != nullptr ? args_.residual + at : nullptr;
        epilogue.y = args_.y != nullptr ? args_.y + at : nullptr;
        for (std::size_t i = 0; i < tables_.size(); ++i) epilogue.levels[i] = args_.levels[i].levels + at;
    }

    // The row of its image that kernel row `k` reads for output row `row`; it may lie outside.
    std::int64_t image_row(std::int64_t row, std::int64_t k) const {
        return row % args_.out_height * args_.stride[0] - args_.padding[0] + k * args_.dilation[0];
    }

    // The same, clamped to the image, counted over all images.
    std::int64_t input_row(std::int64_t row, std::int64_t k) const {
        const std::int64_t y = std::min(std::max<std::int64_t>(image_row(row, k), 0), args_.height - 1);
        return row / args_.out_height * args_.height + y;
    }

    // Copies the rows that pixels begin .. end need.
    Rows copy_rows(std::int64_t begin, std::int64_t end, Scratch& scratch) const {
        const std::int64_t first = input_row(begin / args_.out_width, 0);
        const std::int64_t last = input_row((end - 1) / args_.out_width, args_.kernel[0] - 1);
        const std::int64_t bytes = layout_.columns * layout_.pixel;
        std::uint8_t* rows = scratch.reserve((last + 1 - first) * bytes);
        std::memset(rows, 0, (last + 1 - first) * bytes);
        for (std::int64_t row = first; row <= last; ++row) copy_row(row, rows + (row - first) * bytes);
        return {rows, first};
    }

    void copy_row(std::int64_t row, std::uint8_t* to) const {
        const std::uint8_t* from = args_.x + row * args_.width * args_.channels;
        const auto copy = [&](std::int64_t column) {
            std::memcpy(to + column, outside_.data(), layout_.unit);
        };
        for (std::int64_t i = 0; i < layout_.margin * layout_.groups; ++i) {
            copy(i * layout_.unit);
            copy((layout_.columns * layout_.groups - 1 - i) * layout_.unit);
        }
        to += layout_.margin * layout_.pixel;
        if (layout_.inputs == 3 && layout_.unit == 4) {
            for (std::int64_t i = 0; i < args_.width * layout_.groups; ++i)
                std::memcpy(to + 4 * i, from + 3 * i, 3);
            return;
        }
        for (std::int64_t i = 0; i < args_.width * layout_.groups; ++i) {
            std::memcpy(to + i * layout_.unit, from + i * layout_.inputs, layout_.inputs);
        }
    }

    // Where the taps of `count` pixels from `begin` on are: inputs[tap][kStrip].
    void find_inputs(const Panel& panel, const Rows& rows, std::int64_t begin, int count,
                     const std::uint8_t** inputs) const {
        const std::uint8_t* base =
            rows.data + (layout_.depthwise ? panel.first * kBlockOutputs : panel.group * layout_.unit);
        const std::uint8_t* outside = outside_.data() + (layout_.depthwise ? panel.first * kBlockOutputs : 0);
        const std::int64_t width = args_.out_width;
        for (std::int64_t at = begin; at < begin + count;) {
            const std::int64_t row = at / width, first = at % width;
            const std::int64_t last = std::min(width, first + begin + count - at);
            const std::int64_t columns = layout_.merged ? 1 : args_.kernel[1];
            for (std::int64_t k = 0; k < args_.kernel[0]; ++k) {
                const std::int64_t y = image_row(row, k);
                const std::uint8_t* line =
                    y >= 0 && y < args_.height
                        ? base + (input_row(row, k) - rows.first) * layout_.columns * layout_.pixel
                        : nullptr;
                for (std::int64_t l = 0; l < columns; ++l) {
                    const std::uint8_t** to = inputs + (k * columns + l) * kStrip + (at - begin);
                    find_segment(line, outside, first, last, l * args_.dilation[1], to);
                }
            }
            at += last - first;
        }
    }

    // The taps of columns first .. last of a row, `offset` columns into the kernel.
    void find_segment(const std::uint8_t* line, const std::uint8_t* outside, std::int64_t first,
                      std::int64_t last, std::int64_t offset, const std::uint8_t** to) const {
        const std::int64_t shift = offset + layout_.margin - args_.padding[1];
        const std::int64_t stride = args_.stride[1];
        const auto clamped = [&](std::int64_t i) { return std::min(std::max(i, first), last); };
        const std::int64_t begin =
            line != nullptr ? clamped(divide_up(std::max<std::int64_t>(-shift, 0), stride)) : last;
        const std::int64_t end =
            line != nullptr ? clamped(divide_up(std::max<std::int64_t>(layout_.columns - shift, 0), stride))
                            : last;
        to = std::fill_n(to, begin - first, outside);
        const std::uint8_t* at = line + (begin * stride + shift) * layout_.pixel;
        for (std::int64_t i = begin; i < end; ++i, at += stride * layout_.pixel) *to++ = at;
        std::fill_n(to, last - end, outside);
    }

    const Convolution& args_;
    const IntegerKernels& isa_;
    const Layout layout_;
    const std::int64_t pixels_;
    std::int64_t chunk_ = 1;
    std::vector<Panel> panels_;
    std::vector<std::uint8_t> outside_;
    std::vector<QuantizerTable> tables_;
};

}  // namespace

void integer_conv2d(const Convolution& args, int threads) {
    if (args.batch == 0 || args.outputs == 0) return;
    Convolver(args, threads).run(threads);
}

}  // namespace adq
