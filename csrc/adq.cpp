// The operators: tables from the parameters, chunks over the threads, partial sums in a fixed order.
#include "adq.h"

#include "parallel.h"
#include "tables.h"

namespace adq {
namespace {

struct Statistics {
    double* total;
    std::int64_t* count;
};

// Per-chunk statistics, one row of `cells` entries a chunk.
class StatisticsGrid {
 public:
    StatisticsGrid(std::int64_t chunks, int cells)
        : cells_(cells), total_(chunks * cells), count_(chunks * cells) {}

    Statistics row(std::int64_t chunk) {
        return {total_.data() + chunk * cells_, count_.data() + chunk * cells_};
    }

    void sum(int levels, std::int64_t* count, float* total) const {
        for (int k = 0; k < levels; ++k) {
            double sum = 0.0;
            count[k] = 0;
            for (std::size_t i = k; i < total_.size(); i += cells_) {
                sum += total_[i];
                count[k] += count_[i];
            }
            total[k] = static_cast<float>(sum);
        }
    }

 private:
    std::size_t cells_;
    std::vector<double> total_;
    std::vector<std::int64_t> count_;
};

// A table without values.
StepTable edge_table(const Quantizer& quantizer) {
    StepTable table{};
    table.levels = quantizer.steps + 1;
    table.scale = *quantizer.in_scale;
    copy_edges(quantizer, table.edges.sorted);
    return table;
}

UniformTable uniform_table(const Quantizer& quantizer) {
    UniformTable table = closed_levels(quantizer);
    table.step = static_cast<float>(kActivationRange / quantizer.steps);
    table.offset = *quantizer.offset;
    table.out_scale = *quantizer.out_scale;
    return table;
}

StepTable step_table(const Quantizer& quantizer, Dtype dtype) {
    StepTable table = edge_table(quantizer);
    const UniformTable level = uniform_table(quantizer);
    for (int q = 0; q <= quantizer.steps; ++q) {
        table.value[q] = level.out_scale * (level.step * static_cast<float>(q) - level.offset);
    }
    finish(table, dtype);
    return table;
}

// R / span of the whole surrogate where one interval serves all steps, else D / span of a segment.
double rise(const Quantizer& quantizer) {
    return is_uniform(quantizer) ? kActivationRange : kActivationRange / quantizer.steps;
}

void set_segment(SlopeTable& table, int i, float origin, double span, float middle) {
    table.origin[i] = origin;
    table.inverse[i] = static_cast<float>(1.0 / span);
    table.middle[i] = middle;
}

void set_segments(SlopeTable& table, const Quantizer& quantizer) {
    if (table.uniform) {
        table.segments = 1;
        table.high = table.low + table.level.steps * table.level.width;
        set_segment(table, 0, table.low, static_cast<double>(table.level.width) * quantizer.steps, 0.0f);
        return;
    }
    const Segments segments = find_segments(quantizer);
    table.segments = quantizer.steps;
    table.high = segments.boundary[quantizer.steps];
    for (int i = 0; i < quantizer.steps; ++i) {
        set_segment(table, i, segments.boundary[i], segments.width[i], segments.edge[i]);
        if (i > 0) table.boundaries.sorted[i - 1] = segments.boundary[i];
    }
}

SlopeTable slope_table(const Quantizer& quantizer) {
    SlopeTable table;
    table.uniform = is_uniform(quantizer);
    table.level = uniform_table(quantizer);
    table.low = *quantizer.start;
    table.dx_scale = static_cast<float>(rise(quantizer) * *quantizer.out_scale * *quantizer.in_scale);
    set_segments(table, quantizer);
    finish(table.boundaries, table.segments - 1);
    finish(table.origin, table.segments, table.boundaries.cells, 0.0f);
    finish(table.inverse, table.segments, table.boundaries.cells, 0.0f);
    finish(table.middle, table.segments, table.boundaries.cells, kInfinity);
    return table;
}

void store_gradients(const Quantizer& quantizer, const SlopeTable& table,
                     const std::vector<SlopeSums>& chunks, const QuantizerGradients& gradients) {
    const double scale = rise(quantizer) * *quantizer.out_scale;
    double common[3] = {};
    for (const SlopeSums& sums : chunks) {
        for (int i = 0; i < 3; ++i) common[i] += sums.common[i];
    }
    *gradients.start = static_cast<float>(-scale * common[SlopeSums::kFlow]);
    *gradients.in_scale = static_cast<float>(scale * common[SlopeSums::kIn]);
    *gradients.out_scale = static_cast<float>(common[SlopeSums::kOut]);
    const int shared = table.uniform ? quantizer.steps : 1;
    for (int i = 0; i < table.segments; ++i) {
        double ramp = 0.0;
        for (const SlopeSums& sums : chunks) ramp += sums.ramp[i];
        gradients.interval[i] =
            quantizer.interval[i] > kMinInterval ? static_cast<float>(-scale * shared * ramp) : 0.0f;
    }
}

constexpr std::int64_t kBlockCodes = 4096;  // unpacked at a time, so that they stay in the nearest cache

LevelTable level_table(int bits, const float* codebook, int levels) {
    LevelTable table;
    table.bits = bits;
    table.stream = false;
    std::copy(codebook, codebook + levels, table.value);
    std::fill(table.value + levels, table.value + kMaxLevels, codebook[levels - 1]);
    return table;
}

// Some outputs for at most kDotRows rows of x, from `row` on: the codes of several outputs are unpacked
// together where they are few, those of one in pieces where they are many.
void linear_block(const CodebookLinear& args, const LevelTable& table, std::int64_t row, std::int64_t first,
                  std::int64_t end) {
    constexpr std::int64_t kMost = 16;
    const std::int64_t fit = kBlockCodes / std::max<std::int64_t>(args.inputs, 1);
    const std::int64_t together = std::clamp<std::int64_t>(fit, 1, kMost);
    const Kernels& isa = kernels();
    const int rows = static_cast<int>(std::min<std::int64_t>(args.rows - row, kDotRows));
    const float* x = args.x + row * args.inputs;
    std::uint8_t codes[kBlockCodes + 8];
    for (std::int64_t o = first; o < end; o += together) {
        const std::int64_t outputs = std::min(together, end - o);
        double sums[kMost][kDotRows] = {};
        for (std::int64_t i = 0; i < args.inputs; i += kBlockCodes) {
            const std::int64_t n = std::min(args.inputs - i, kBlockCodes);
            const std::int64_t at = o * args.inputs + i;
            const std::int64_t before = at % 8;  // codes of the output before in the first group of eight
            isa.unpack(args.packed + at / 8 * args.bits, args.bits, before + outputs * n, codes);
            for (std::int64_t k = 0; k < outputs; ++k)
                isa.dots(table, codes + before + k * n, n, x + i, args.inputs, rows, sums[k]);
        }
        for (std::int64_t k = 0; k < outputs; ++k) {
            const double scale = args.scale[(o + k) % args.channels];
            for (int r = 0; r < rows; ++r)
                args.y[(row + r) * args.outputs + o + k] = static_cast<float>(scale * sums[k][r]);
        }
    }
}

}  // namespace

void codebook_lookup(const Lookup& args, int threads) {
    StepTable table;
    table.levels = args.levels;
    table.scale = 1.0f;
    table.stream = exceeds_caches(args.dtype, args.n);
    std::copy(args.thresholds, args.thresholds + args.levels - 1, table.edges.sorted);
    if (args.w_q != nullptr)
        std::copy(args.codebook, args.codebook + args.levels, table.value);
    else
        std::fill(table.value, table.value + args.levels, 0.0f);
    finish(table, args.dtype);
    const bool counted = args.count != nullptr;
    StatisticsGrid grid(counted ? chunk_count(args.n, kChunk) : 0, table.edges.cells);
    const Kernels& isa = kernels();
    for_chunks(args.n, kChunk, threads, [&](std::int64_t chunk, std::int64_t begin, std::int64_t n) {
        const Statistics row = counted ? grid.row(chunk) : Statistics{nullptr, nullptr};
        std::uint8_t* codes = args.codes != nullptr ? args.codes + begin : nullptr;
        isa.steps(args.dtype, table, at(args.w, args.dtype, begin), n, at(args.w_q, args.dtype, begin), codes,
                  row.total, row.count);
    });
    if (counted) grid.sum(args.levels, args.count, args.total);
}

void threshold_quantize(Dtype dtype, const void* x, std::int64_t n, const Quantizer& quantizer, void* y,
                        int threads) {
    const Kernels& isa = kernels();
    if (is_uniform(quantizer)) {
        UniformTable table = uniform_table(quantizer);
        table.stream = exceeds_caches(dtype, n);
        for_chunks(n, kChunk, threads, [&](std::int64_t, std::int64_t begin, std::int64_t count) {
            isa.uniform(dtype, table, at(x, dtype, begin), count, at(y, dtype, begin), nullptr);
        });
        return;
    }
    StepTable table = step_table(quantizer, dtype);
    table.stream = exceeds_caches(dtype, n);
    for_chunks(n, kChunk, threads, [&](std::int64_t, std::int64_t begin, std::int64_t count) {
        isa.steps(dtype, table, at(x, dtype, begin), count, at(y, dtype, begin), nullptr, nullptr, nullptr);
    });
}

void threshold_levels(Dtype dtype, const void* x, std::int64_t n, const Quantizer& quantizer,
                      std::uint8_t* levels, int threads) {
    const Kernels& isa = kernels();
    if (is_uniform(quantizer)) {
        const UniformTable table = closed_levels(quantizer);
        for_chunks(n, kChunk, threads, [&](std::int64_t, std::int64_t begin, std::int64_t count) {
            isa.uniform(dtype, table, at(x, dtype, begin), count, nullptr, levels + begin);
        });
        return;
    }
    StepTable table = edge_table(quantizer);
    finish(table, dtype);
    for_chunks(n, kChunk, threads, [&](std::int64_t, std::int64_t begin, std::int64_t count) {
        isa.steps(dtype, table, at(x, dtype, begin), count, nullptr, levels + begin, nullptr, nullptr);
    });
}

void threshold_quantize_backward(Dtype dtype, const void* grad, const void* x, std::int64_t n,
                                 const Quantizer& quantizer, const QuantizerGradients& gradients,
                                 int threads) {
    const Kernels& isa = kernels();
    SlopeTable table = slope_table(quantizer);
    table.stream = exceeds_caches(dtype, n);
    std::vector<SlopeSums> sums(chunk_count(n, kChunk));
    for_chunks(n, kChunk, threads, [&](std::int64_t chunk, std::int64_t begin, std::int64_t count) {
        isa.slopes(dtype, table, at(grad, dtype, begin), at(x, dtype, begin), count,
                   at(gradients.x, dtype, begin), &sums[chunk]);
    });
    store_gradients(quantizer, table, sums, gradients);
}

void pack_bits(const std::uint8_t* codes, std::int64_t n, int bits, std::uint8_t* packed, int threads) {
    const Kernels& isa = kernels();
    for_chunks(n, 2 * kChunk, threads, [&](std::int64_t, std::int64_t begin, std::int64_t count) {
        isa.pack(codes + begin, count, bits, packed + begin / 8 * bits);
    });
}

void unpack_bits(const std::uint8_t* packed, int bits, std::int64_t n, std::uint8_t* codes, int threads) {
    const Kernels& isa = kernels();
    for_chunks(n, 2 * kChunk, threads, [&](std::int64_t, std::int64_t begin, std::int64_t count) {
        isa.unpack(packed + begin / 8 * bits, bits, count, codes + begin);
    });
}

void codebook_decode(const Decode& args, int threads) {
    const Kernels& isa = kernels();
    LevelTable table = level_table(args.bits, args.codebook, args.levels);
    const std::int64_t n = args.outer * args.channels * args.inner;
    table.stream = exceeds_caches(Dtype::kFloat32, n) && args.inner >= kBlockCodes / 4;  // lines as a whole
    for_chunks(n, kChunk, threads, [&](std::int64_t, std::int64_t first, std::int64_t size) {
        std::uint8_t codes[kBlockCodes];
        for (std::int64_t block = first; block < first + size; block += kBlockCodes) {
            const std::int64_t end = std::min(block + kBlockCodes, first + size);
            isa.unpack(args.packed + block / 8 * args.bits, args.bits, end - block, codes);
            for (std::int64_t at = block; at < end;) {
                const std::int64_t row = at / args.inner;
                const std::int64_t count = std::min((row + 1) * args.inner, end) - at;
                isa.levels(table, codes + (at - block), count, args.scale[row % args.channels],
                           args.w_q + at);
                at += count;
            }
        }
    });
}

void codebook_linear(const CodebookLinear& args, int threads) {
    const LevelTable table = level_table(args.bits, args.codebook, args.levels);
    const std::int64_t chunk = std::max<std::int64_t>(kChunk / std::max<std::int64_t>(args.inputs, 1), 1);
    for_chunks(args.outputs, chunk, threads, [&](std::int64_t, std::int64_t first, std::int64_t count) {
        for (std::int64_t row = 0; row < args.rows; row += kDotRows)
            linear_block(args, table, row, first, first + count);
    });
}

bool has_openmp() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

}  // namespace adq
