// The integer convolution: panels of weights, pixels and panels over the threads.
#include "integer.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>

#include "adq.h"
#include "integer_layout.h"
#include "integer_taps.h"
#include "isa.h"
#include "parallel.h"
#include "scratch.h"
#include "tables.h"

namespace adq {
namespace {

constexpr std::int64_t kChunkPixels = 1024;  // that share a decoded panel
constexpr std::int64_t kLeastPixels = 16;    // of a chunk
constexpr std::int64_t kLeastStepsHeld = 2;  // with which 16-bit sums pay
constexpr std::int64_t kScannedBytes = 1 << 16;

// Output blocks of one group that are computed together.
struct Panel {
    std::int64_t group;
    std::int64_t first;  // block
    int count;
};

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

class Convolver {
 public:
    Convolver(const Convolution& args, int threads)
        : args_(args),
          isa_(integer_kernels()),
          layout_(find_layout(args)),
          taps_(args_, layout_),
          pixels_(args.batch * args.out_height * args.out_width),
          steps_held_(isa_.small.multiply != nullptr && !layout_.depthwise ? find_steps_held(threads) : 0),
          kernels_(layout_.depthwise                ? isa_.depthwise
                   : steps_held_ >= kLeastStepsHeld ? isa_.small
                                                    : isa_.dense) {
        find_panels();
        find_items(threads);
        for (const Convolution::Levels& level : args.levels)
            tables_.push_back(quantizer_table(level.quantizer));
    }

    void run(int threads) const {
        for_chunks(divide_up(pixels_, chunk_) * splits_, 1, threads,
                   [&](std::int64_t, std::int64_t item, std::int64_t) {
                       const std::int64_t begin = item / splits_ * chunk_, split = item % splits_;
                       const std::int64_t panels = static_cast<std::int64_t>(panels_.size());
                       run_item(begin, std::min(begin + chunk_, pixels_), panels * split / splits_,
                                panels * (split + 1) / splits_);
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

    // How many products of pairs of the levels that there are with the weights that there may be fit 16 bits.
    std::int64_t find_steps_held(int threads) const {
        const std::int64_t bytes = args_.batch * args_.height * args_.width * args_.channels;
        std::vector<std::uint8_t> largest(divide_up(bytes, kScannedBytes), 0);
        for_chunks(bytes, kScannedBytes, threads,
                   [&](std::int64_t chunk, std::int64_t begin, std::int64_t count) {
                       std::uint8_t most = 0;
                       for (std::int64_t i = begin; i < begin + count; ++i) most = std::max(most, args_.x[i]);
                       largest[chunk] = most;
                   });
        int level = args_.zero, weight = args_.table_levels == 0 ? 128 : 0;
        for (std::uint8_t most : largest) level = std::max<int>(level, most);
        for (int i = 0; i < args_.table_levels; ++i) weight = std::max(weight, std::abs(args_.table[i]));
        return 32767 / std::max(2 * level * weight, 1);
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

    // An item is a chunk of pixels times some of the panels. Each thread gets as many as the others: chunks
    // of pixels, or, where one is enough for all of them, so that no panel is decoded twice, parts of the
    // panels.
    void find_items(int threads) {
        const std::int64_t panels = static_cast<std::int64_t>(panels_.size());
        const std::int64_t most = std::max<std::int64_t>(pixels_ / kLeastPixels, 1);
        std::int64_t chunks = std::max<std::int64_t>(divide_up(pixels_, kChunkPixels), 1);
        if (chunks > 1 || panels % threads != 0) chunks = std::min(round_up(chunks, threads), most);
        if (chunks % threads != 0) splits_ = std::min<std::int64_t>(panels, threads);
        chunk_ = std::max<std::int64_t>(divide_up(pixels_, chunks), 1);
    }

    void run_item(std::int64_t begin, std::int64_t end, std::int64_t first_panel,
                  std::int64_t end_panel) const {
        thread_local Scratch weights;
        thread_local Chunk chunk;
        taps_.find(begin, end, chunk);
        for (std::int64_t i = first_panel; i < end_panel; ++i) {
            const Panel& panel = panels_[i];
            const int blocks = layout_.depthwise ? kMaxBlocks : panel.count;
            void* prepared = weights.reserve(layout_.steps * blocks * kernels_.panel_bytes);
            prepare(panel, prepared);
            Parameters parameters;
            Strip strip;
            strip.panel = prepared;
            strip.blocks = panel.count;
            strip.steps_held = steps_held_ >= kLeastStepsHeld ? steps_held_ : layout_.steps;
            strip.channel = layout_.depthwise ? panel.first * kBlockOutputs : panel.group * layout_.unit;
            set_epilogue(panel, begin, parameters, strip.epilogue);
            for (const PixelGroup& group : chunk.groups) run_group(group, chunk, strip);
        }
    }

    void run_group(const PixelGroup& group, const Chunk& chunk, Strip& strip) const {
        strip.runs = group.runs.data();
        strip.run_count = static_cast<int>(group.runs.size());
        strip.origins = chunk.origins.data() + group.first;
        strip.pixels = group.count;
        strip.epilogue.places = chunk.places.data() + group.first;
        kernels_.multiply(strip);
    }

    void prepare(const Panel& panel, void* to) const {
        PanelSource source{};
        source.depthwise = layout_.depthwise;
        source.count = panel.count;
        source.steps = layout_.steps;
        source.bits = 8;
        if (layout_.depthwise) {
            const std::vector<std::uint8_t> blocks = depthwise_blocks(panel);
            source.blocks = blocks.data();
            return kernels_.prepare(source, to);
        }
        for (int bits = 1; bits <= 4; ++bits) {
            if (args_.table_levels == 1 << bits) source.bits = bits;
        }
        std::copy(args_.table, args_.table + args_.table_levels, source.table);
        const std::int64_t block = panel.group * layout_.blocks + panel.first;
        source.blocks = args_.weight + block * layout_.steps * 8 * source.bits;
        kernels_.prepare(source, to);
    }

    // Depthwise weights, [taps][outputs], as blocks of four taps.
    std::vector<std::uint8_t> depthwise_blocks(const Panel& panel) const {
        std::vector<std::uint8_t> blocks(panel.count * layout_.steps * kBlockWeights);
        const std::int64_t first = panel.first * kBlockOutputs;
        const std::int64_t count = outputs_of(panel);
        for (std::int64_t tap = 0; tap < layout_.taps; ++tap) {
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

    void set_epilogue(const Panel& panel, std::int64_t pixel, Parameters& parameters,
                      Epilogue& epilogue) const {
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
        const std::int64_t at = pixel * args_.outputs + first;
        epilogue.residual = args_.residual != nullptr ? args_.residual + at : nullptr;
        epilogue.y = args_.y != nullptr ? args_.y + at : nullptr;
        for (const Convolution::Levels& level : args_.levels) epilogue.levels.push_back(level.levels + at);
    }

    const Convolution& args_;
    const IntegerKernels& isa_;
    const Layout layout_;
    const Taps taps_;
    const std::int64_t pixels_;
    const std::int64_t steps_held_;
    const MultiplyKernels& kernels_;
    std::int64_t chunk_ = 1;   // pixels of an item
    std::int64_t splits_ = 1;  // of the panels into items
    std::vector<Panel> panels_;
    std::vector<QuantizerTable> tables_;
};

}  // namespace

void integer_conv2d(const Convolution& args, int threads) {
    if (args.batch == 0 || args.outputs == 0) return;
    Convolver(args, threads).run(threads);
}

}  // namespace adq
