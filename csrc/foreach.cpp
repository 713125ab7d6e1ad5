// The weights of many layers in one parallel region: statistics, the codebooks' step, quantized weights.
#include <cmath>

#include "adq.h"
#include "parallel.h"
#include "tables.h"

namespace adq {
namespace {

constexpr float kSmoothing = 1e-5f;    // of the mean count of a level
constexpr float kReviveBelow = 1e-3f;  // of the mean count of a level
constexpr float kUnused = 0.5f;        // weights
constexpr float kLeastScale = 1e-30f;
constexpr float kInt8Max = 127.0f;

// Elements of a layer that one thread takes: whole rows where rows have scales of their own. It depends on
// the layer's shape alone, and so do the partial sums.
struct Item {
    std::size_t layer;
    std::int64_t begin;
    std::int64_t end;
};

std::vector<Item> find_items(const std::vector<Layer>& layers) {
    std::vector<Item> items;
    for (std::size_t l = 0; l < layers.size(); ++l) {
        const Layer& layer = layers[l];
        const std::int64_t size = layer.outer * layer.channels * layer.inner;
        if (size == 0) continue;
        const std::int64_t rows = std::max<std::int64_t>(kChunk / layer.inner, 1);
        const std::int64_t step = layer.channels == 1 ? kChunk : rows * layer.inner;
        for (std::int64_t at = 0; at < size; at += step) items.push_back({l, at, std::min(at + step, size)});
    }
    return items;
}

// body(row, begin, count) for the parts of begin .. end that lie in one row each.
template <class Body>
void for_rows(const Layer& layer, std::int64_t begin, std::int64_t end, const Body& body) {
    while (begin < end) {
        const std::int64_t row = begin / layer.inner;
        const std::int64_t count = std::min((row + 1) * layer.inner, end) - begin;
        body(row, begin, count);
        begin += count;
    }
}

float& scale_of(const Layer& layer, std::int64_t row) { return layer.scale[row % layer.channels]; }

StepTable table_of(const Layer& layer) {
    StepTable table;
    table.levels = layer.levels;
    table.scale = 1.0f;
    table.stream = false;
    for (int k = 0; k + 1 < layer.levels; ++k)
        table.edges.sorted[k] = 0.5f * (layer.codebook[k] + layer.codebook[k + 1]);
    std::copy(layer.codebook, layer.codebook + layer.levels, table.value);
    finish(table, Dtype::kFloat32);
    return table;
}

float largest_level(const Layer& layer) {
    return std::max(std::fabs(layer.codebook[0]), std::fabs(layer.codebook[layer.levels - 1]));
}

// Values that are counted as they are; see within_reach in reference.py.
struct Reach {
    float low = -std::numeric_limits<float>::infinity();
    float high = std::numeric_limits<float>::infinity();
};

Reach reach_of(const Layer& layer) {
    const int last = layer.levels - 1;
    const float* c = layer.codebook;
    const float peak = largest_level(layer);
    if (last == 0 || !(peak > 0.0f)) return {};
    const float gap = peak / static_cast<float>(last);
    return {c[0] - std::max(c[1] - c[0], gap), c[last] + std::max(c[last] - c[last - 1], gap)};
}

// NaN stays.
void clamp(float* v, std::int64_t n, const Reach& reach) {
    for (std::int64_t i = 0; i < n; ++i) {
        const float least = reach.low > v[i] ? reach.low : v[i];
        v[i] = reach.high < least ? reach.high : least;
    }
}

// visit(begin, end, q) for the pieces of an item, with their codewords; the statistics, of values within
// reach, are optional.
template <class Visit>
void look_up(const Layer& layer, const StepTable& table, const Item& item, double* total, std::int64_t* count,
             const Visit& visit) {
    const bool limited = total != nullptr && layer.channels > 1;
    const Reach reach = limited ? reach_of(layer) : Reach{};
    static thread_local std::vector<float> scratch(2 * kChunk);
    float *v = scratch.data(), *q = v + kChunk;
    const Kernels& isa = kernels();
    for (std::int64_t begin = item.begin; begin < item.end; begin += kChunk) {
        const std::int64_t end = std::min(begin + kChunk, item.end);
        for_rows(layer, begin, end, [&](std::int64_t row, std::int64_t first, std::int64_t n) {
            isa.divide(layer.dtype, at(layer.w, layer.dtype, first), n, scale_of(layer, row),
                       v + (first - begin));
        });
        if (limited) clamp(v, end - begin, reach);
        isa.steps(Dtype::kFloat32, table, v, end - begin, q, nullptr, total, count);
        visit(begin, end, q);
    }
}

void quantize_item(const Layer& layer, const StepTable& table, const Item& item) {
    look_up(layer, table, item, nullptr, nullptr, [&](std::int64_t begin, std::int64_t end, const float* q) {
        for_rows(layer, begin, end, [&](std::int64_t row, std::int64_t first, std::int64_t n) {
            kernels().multiply(layer.dtype, q + (first - begin), n, scale_of(layer, row),
                               at(layer.w_q, layer.dtype, first));
        });
    });
}

// What a step gathers of an item and, for the scales, of every row.
struct ItemSums {
    double total[kMaxLevels] = {};
    std::int64_t count[kMaxLevels] = {};
};
struct RowSums {
    double product[2] = {};  // of w q, and of q^2
};

void gather_item(const Layer& layer, const StepTable& table, const Item& item, ItemSums& sums,
                 std::vector<RowSums>& rows) {
    look_up(layer, table, item, sums.total, sums.count,
            [&](std::int64_t begin, std::int64_t end, const float* q) {
                if (rows.empty()) return;
                for_rows(layer, begin, end, [&](std::int64_t row, std::int64_t first, std::int64_t n) {
                    kernels().products(layer.dtype, at(layer.w, layer.dtype, first), q + (first - begin), n,
                                       rows[row].product);
                });
            });
}

void step_scales(const Layer& layer, const std::vector<RowSums>& rows) {
    for (std::int64_t channel = 0; !rows.empty() && channel < layer.channels; ++channel) {
        double sum[2] = {};
        for (std::int64_t row = channel; row < layer.outer * layer.channels; row += layer.channels) {
            for (int i = 0; i < 2; ++i) sum[i] += rows[row].product[i];
        }
        float& scale = layer.scale[channel];
        const float fitted = static_cast<float>(sum[0]) / static_cast<float>(sum[1]);
        if (fitted > 0.0f) scale = scale + layer.rate * (fitted - scale);
    }
}

// Levels and M in the unit in which the largest level is as large as it was, and scales in theirs: see
// hold_peak in reference.py.
void hold_peak(const Layer& layer, float before) {
    const float largest = largest_level(layer), factor = before / largest;
    if (!(factor > 0.0f && factor < std::numeric_limits<float>::infinity())) return;
    for (int k = 0; k < layer.levels; ++k) {
        float& level = layer.codebook[k];
        const float held = std::fabs(level) == largest ? before : std::min(std::fabs(level * factor), before);
        level = std::copysign(held, level);
        layer.ema_total[k] *= factor;
    }
    for (std::int64_t channel = 0; channel < layer.channels; ++channel) {
        const float scale = layer.scale[channel] / factor;
        if (std::fabs(scale) >= kLeastScale) layer.scale[channel] = scale;
    }
}

// The dead level, if there is one, moves beside the most used one: see reference.py.
void revive(const Layer& layer) {
    const int levels = layer.levels;
    float *c = layer.codebook, *count = layer.ema_count, *total = layer.ema_total;
    const int dead = static_cast<int>(std::min_element(count, count + levels) - count);
    const int donor = static_cast<int>(std::max_element(count, count + levels) - count);
    double sum = 0.0;
    for (int k = 0; k < levels; ++k) sum += count[k];
    const float rare = kReviveBelow * static_cast<float>(sum) / static_cast<float>(levels);
    const bool is_dead = count[dead] < std::min(rare, kUnused);
    if (levels < 2 || !is_dead || !(count[donor] >= 2.0f)) return;
    const float centre = c[donor];
    const float left = centre - c[std::max(donor - 1, 0)];
    const float right = c[std::min(donor + 1, levels - 1)] - centre;
    const bool to_right = right >= left;
    const float newcomer = to_right ? centre + 0.25f * right : centre - 0.25f * left;
    const float half = 0.5f * (count[donor] + count[dead]);
    count[donor] = half;
    total[donor] = half * centre;
    const int slot = donor - (dead < donor ? 1 : 0) + (to_right ? 1 : 0);
    for (float* table : {c, count, total}) {
        if (dead < slot) std::rotate(table + dead, table + dead + 1, table + slot + 1);
        if (slot < dead) std::rotate(table + slot, table + dead, table + dead + 1);
    }
    c[slot] = newcomer;
    count[slot] = half;
    total[slot] = half * newcomer;
}

void snap(const Layer& layer) {
    const float peak = largest_level(layer);
    int exponent = 0;
    const float ratio = std::max(peak / kInt8Max, std::numeric_limits<float>::min());
    if (std::frexp(ratio, &exponent) == 0.5f) --exponent;
    const float step = peak > 0.0f ? std::ldexp(1.0f, exponent) : 1.0f;
    for (int k = 0; k < layer.levels; ++k) {
        const float level = std::nearbyint(layer.codebook[k] / step);
        layer.codebook[k] = std::min(std::max(level, -kInt8Max), kInt8Max) * step;
    }
}

// The items of the layer follow one another in `sums`.
void step_codebook(const Layer& layer, const ItemSums* sums, std::size_t items) {
    const float rate = layer.rate, keep = 1.0f - rate, peak = largest_level(layer);
    double all = 0.0;
    for (int k = 0; k < layer.levels; ++k) {
        double total = 0.0;
        std::int64_t count = 0;
        for (std::size_t i = 0; i < items; ++i) {
            total += sums[i].total[k];
            count += sums[i].count[k];
        }
        layer.ema_count[k] = keep * layer.ema_count[k] + rate * static_cast<float>(count);
        layer.ema_total[k] = keep * layer.ema_total[k] + rate * static_cast<float>(total);
        all += layer.ema_count[k];
    }
    const float smoothing = kSmoothing * static_cast<float>(all) / static_cast<float>(layer.levels) + 1e-30f;
    for (int k = 0; k < layer.levels; ++k) {
        float& level = layer.codebook[k];
        level = (layer.ema_total[k] + smoothing * level) / (layer.ema_count[k] + smoothing);
        if (k > 0) level = std::max(level, layer.codebook[k - 1]);
    }
    revive(layer);
    if (layer.channels > 1) hold_peak(layer, peak);
}

}  // namespace

void quantize_layers(const std::vector<Layer>& layers, int threads) {
    const std::vector<Item> items = find_items(layers);
    std::vector<StepTable> tables;
    for (const Layer& layer : layers) tables.push_back(table_of(layer));
    for_phases(threads, {{items.size(), [&](std::size_t i) {
                              quantize_item(layers[items[i].layer], tables[items[i].layer], items[i]);
                          }}});
}

void step_layers(const std::vector<Layer>& layers, int threads) {
    const std::vector<Item> items = find_items(layers);
    std::vector<StepTable> tables;
    std::vector<std::vector<RowSums>> rows(layers.size());
    std::vector<std::size_t> first(layers.size() + 1, 0);
    for (std::size_t l = 0; l < layers.size(); ++l) {
        tables.push_back(table_of(layers[l]));
        if (layers[l].channels > 1) rows[l].resize(layers[l].outer * layers[l].channels);
    }
    for (const Item& item : items) ++first[item.layer + 1];
    for (std::size_t l = 0; l < layers.size(); ++l) first[l + 1] += first[l];
    std::vector<ItemSums> sums(items.size());
    const auto gather = [&](std::size_t i) {
        const std::size_t l = items[i].layer;
        gather_item(layers[l], tables[l], items[i], sums[i], rows[l]);
    };
    const auto step = [&](std::size_t l) {
        if (layers[l].rate > 0.0f) {
            step_scales(layers[l], rows[l]);
            step_codebook(layers[l], sums.data() + first[l], first[l + 1] - first[l]);
        }
        if (layers[l].snap) snap(layers[l]);
        tables[l] = table_of(layers[l]);
    };
    const auto quantize = [&](std::size_t i) {
        const Layer& layer = layers[items[i].layer];
        if (layer.w_q != nullptr) quantize_item(layer, tables[items[i].layer], items[i]);
    };
    for_phases(threads, {{items.size(), gather}, {layers.size(), step}, {items.size(), quantize}});
}

}  // namespace adq
