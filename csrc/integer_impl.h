// The integer convolution's kernels of the instruction set ADQ_ISA; included once by each integer_<isa>.cpp.
//
// The dense kernel is an implicit matrix product: a tile of pixels times a panel's outputs stays in registers
// while the reduction runs over taps and channels, four at a time. Each pixel of a tile has an address a tap,
// so padding, strides and dilation are the caller's. A depthwise convolution multiplies lane by lane instead,
// four taps at a time.
#pragma once

#include <algorithm>
#include <type_traits>

#include "bits.h"
#include "cells.h"
#include "dot.h"
#include "groups.h"
#include "integer.h"
#include "uniform.h"

namespace adq {
namespace ADQ_ISA {
namespace {

// Most output blocks of a panel, and pixels of a tile for so many blocks: what the registers hold.
#if defined(__AVX512VNNI__)
constexpr int kPanelBlocks = 4;
constexpr int kTilePixels[] = {0, 12, 12, 8, 6};
#elif defined(__AVX512F__)
constexpr int kPanelBlocks = 4;
constexpr int kTilePixels[] = {0, 8, 6, 4, 4};
#elif defined(__AVXVNNI__)
constexpr int kPanelBlocks = 2;
constexpr int kTilePixels[] = {0, 5, 3};
#elif defined(__AVX2__)
constexpr int kPanelBlocks = 2;
constexpr int kTilePixels[] = {0, 3, 2};
#else
constexpr int kPanelBlocks = 1;
constexpr int kTilePixels[] = {0, 2};
#endif

// Pixels of a tile, by its blocks.
template <class Products>
constexpr int tile_pixels(int blocks) {
    return kTilePixels[blocks];
}
#if defined(ADQ_HAS_SMALL_BYTES)
template <>
constexpr int tile_pixels<SmallBytes>(int blocks) {
    return blocks == 1 ? 5 : 3;
}
#endif

// Vectors of a block of weights in a panel.
template <class Products>
constexpr int kBlockVectors = kParts * Products::kSplit;

// ---- weights -----------------------------------------------------------------------------------------

#if defined(__AVX512F__)

template <int kBits>
ADQ_INLINE void decode_block(const std::uint8_t* planes, const std::int8_t* table, Ints* to) {
    const __m512i values = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table));
    __m512i code = _mm512_setzero_si512();
    unroll<kBits>([&](auto bit) ADQ_INLINE_LAMBDA {
        std::uint64_t plane;
        std::memcpy(&plane, planes + 8 * bit.value, sizeof plane);
        code = _mm512_mask_add_epi8(code, plane, code, _mm512_set1_epi8(1 << bit.value));
    });
    to[0] = (Ints)_mm512_shuffle_epi8(values, code);
}

#else

// Codes byte by byte from their planes, a vector's worth at a time.
template <int kBits>
ADQ_INLINE void decode_block(const std::uint8_t* planes, const std::int8_t* table, Ints* to) {
    constexpr int kWords = sizeof(Words) / 8;
    for (int part = 0; part < kParts; ++part) {
        Words code{};
        unroll<kBits>([&](auto bit) ADQ_INLINE_LAMBDA {
            Words plane{};
            for (int i = 0; i < kWords; ++i) set_word(plane, i, planes[8 * bit.value + kWords * part + i]);
            code = code | (unfold<1>(plane) << bit.value);
        });
#if ADQ_HAS_PERMUTE
        to[part] = (Ints)look_up_bytes(table, (ByteLanes)code);
#else
        std::uint8_t bytes[sizeof code];
        std::memcpy(bytes, &code, sizeof code);
        for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(table[byte]);
        to[part] = load_ints(bytes);
#endif
    }
}

#endif

template <>
ADQ_INLINE void decode_block<8>(const std::uint8_t* bytes, const std::int8_t*, Ints* to) {
    for (int part = 0; part < kParts; ++part) to[part] = load_ints(bytes + sizeof(Ints) * part);
}

// panel: [steps][count][kParts][kSplit].
template <class Products, int kBits>
void prepare_panel(const PanelSource source, Ints* panel) {
    const std::int64_t stride = 8 * kBits * source.steps;
    for (std::int64_t step = 0; step < source.steps; ++step) {
        const std::uint8_t* from = source.blocks + 8 * kBits * step;
        for (int block = 0; block < source.count; ++block, from += stride) {
            Ints bytes[kParts];
            decode_block<kBits>(from, source.table, bytes);
            for (int part = 0; part < kParts; ++part, panel += Products::kSplit)
                Products::split(bytes[part], panel);
        }
    }
}

#if defined(__AVX512F__)

// Exchanges rows and columns of four times four quarters.
ADQ_INLINE void transpose_quarters(const Ints (&from)[kBlockInputs], Ints (&to)[kBlockInputs]) {
    const __m512i* in = (const __m512i*)from;
    const __m512i even[] = {_mm512_shuffle_i32x4(in[0], in[1], 0x88),
                            _mm512_shuffle_i32x4(in[2], in[3], 0x88)};
    const __m512i odd[] = {_mm512_shuffle_i32x4(in[0], in[1], 0xdd),
                           _mm512_shuffle_i32x4(in[2], in[3], 0xdd)};
    to[0] = (Ints)_mm512_shuffle_i32x4(even[0], even[1], 0x88);
    to[1] = (Ints)_mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
    to[2] = (Ints)_mm512_shuffle_i32x4(even[0], even[1], 0xdd);
    to[3] = (Ints)_mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
}

// panel: [steps][4][kSplit]; vector j holds channels 4 j .. 4 j + 3 of every block.
void prepare_depthwise(const PanelSource source, Ints* panel) {
    for (std::int64_t step = 0; step < source.steps; ++step) {
        Ints blocks[kBlockInputs] = {}, weights[kBlockInputs];
        for (int block = 0; block < source.count; ++block)
            blocks[block] = load_ints(source.blocks + (block * source.steps + step) * kBlockWeights);
        transpose_quarters(blocks, weights);
        for (int j = 0; j < kBlockInputs; ++j, panel += AnyBytes::kSplit) AnyBytes::split(weights[j], panel);
    }
}

#else

void prepare_depthwise(const PanelSource source, Ints* panel) { prepare_panel<AnyBytes, 8>(source, panel); }

#endif

template <class Products>
void prepare(const PanelSource& source, void* to) {
    Ints* panel = static_cast<Ints*>(to);
    if (source.depthwise) return prepare_depthwise(source, panel);
    switch (source.bits) {
        case 1: return prepare_panel<Products, 1>(source, panel);
        case 2: return prepare_panel<Products, 2>(source, panel);
        case 3: return prepare_panel<Products, 3>(source, panel);
        case 4: return prepare_panel<Products, 4>(source, panel);
        default: return prepare_panel<Products, 8>(source, panel);
    }
}

// ---- what follows the sums ---------------------------------------------------------------------------

// A tile, [pixels][kBlocks][16], holds the sums of some pixels of the strip, from `first` on, and then the
// values that become of them.
struct Tile {
    int first;
    int pixels;
    float* values;
};

// A tile's values, pixel by pixel: float(sum) * multiplier + bias + residual, clamped as torch does (NaN
// stays, and `high` wins). They go to y, and in place of the sums where `kept`. The members are copies: the
// compiler cannot know that the results lie elsewhere than the epilogue.
template <int kBlocks>
class FinishedSums {
 public:
    static constexpr int kRow = kBlocks * kBlockOutputs;

    ADQ_INLINE FinishedSums(const Epilogue& epilogue, Tile tile, bool kept)
        : low_(fill(epilogue.low)),
          high_(fill(epilogue.high)),
          multiplier_(epilogue.multiplier),
          bias_(epilogue.bias),
          residual_(epilogue.residual),
          y_(epilogue.y),
          values_(tile.values),
          bytes_(epilogue.outputs * sizeof(float)),
          whole_(epilogue.outputs == kRow),
          kept_(kept || (y_ != nullptr && !whole_)) {}

    // at: of the pixel in residual and y.
    ADQ_INLINE void row(int pixel, std::int64_t at, Floats* to) {
        float* values = values_ + pixel * kRow;
        const float* added = residual_ != nullptr ? residual_ + at : nullptr;
        float rest[kRow];
        if (!whole_ && added != nullptr) {
            std::fill(rest, rest + kRow, 0.0f);
            added = static_cast<float*>(std::memcpy(rest, added, bytes_));
        }
        unroll<kBlocks * kParts>([&](auto v) ADQ_INLINE_LAMBDA {
            constexpr int kAt = kWidth * v.value;
            Floats value = to_float(load_ints(values + kAt)) * load_floats(multiplier_ + kAt);
            value = value + load_floats(bias_ + kAt);
            if (added != nullptr) value = value + load_floats(added + kAt);
            value = smaller(high_, larger(low_, value));
            if (kept_) std::memcpy(values + kAt, &value, sizeof value);
            if (whole_ && y_ != nullptr) std::memcpy(y_ + at + kAt, &value, sizeof value);
            to[v.value] = value;
        });
        if (!whole_ && y_ != nullptr) std::memcpy(y_ + at, values, bytes_);
    }

 private:
    const Floats low_, high_;
    const float *const multiplier_, *const bias_, *const residual_;
    float *const y_, *const values_;
    const std::size_t bytes_;
    const bool whole_, kept_;
};

// The same values once more.
template <int kBlocks>
class KeptValues {
 public:
    ADQ_INLINE KeptValues(const Epilogue&, Tile tile, bool) : values_(tile.values) {}
    ADQ_INLINE void row(int pixel, std::int64_t, Floats* to) const {
        unroll<kBlocks * kParts>([&](auto v) ADQ_INLINE_LAMBDA {
            to[v.value] = load_floats(values_ + pixel * kBlocks * kBlockOutputs + kWidth * v.value);
        });
    }

 private:
    const float* const values_;
};

// The level of a value u of the quantizer's scale.
template <int kCells>
struct EdgeLevel {
    const Cells<kCells> cells;
    explicit ADQ_INLINE EdgeLevel(const QuantizerTable& table) : cells(table.edges) {}
    ADQ_INLINE Ints operator()(Floats u) const { return cells.number(cells.find(u)); }
};

struct ClosedLevel {
    const UniformLevel level;
    explicit ADQ_INLINE ClosedLevel(const QuantizerTable& table) : level(table.closed) {}
    ADQ_INLINE Ints operator()(Floats u) const { return truncate(level.level(level.position(u))); }
};

// The values, and their levels by one of the tables.
template <int kBlocks, class Values, class Level>
void quantize(const Epilogue& epilogue, std::size_t index, Tile tile) {
    constexpr int kRow = kBlocks * kBlockOutputs;
    constexpr int kVectors = kBlocks * kParts;
    const QuantizerTable& table = (*epilogue.tables)[index];
    Values values(epilogue, tile, epilogue.levels.size() > 1);
    const Level level(table);
    const Floats scale = fill(table.closed.scale);
    std::uint8_t* to = epilogue.levels[index];
    const std::int32_t* places = epilogue.places + tile.first;
    const std::int64_t stride = epilogue.stride;
    const bool whole = epilogue.outputs == kRow;
    const std::size_t bytes = epilogue.outputs;
    std::uint8_t rest[kRow];
    for (int pixel = 0; pixel < tile.pixels; ++pixel) {
        const std::int64_t at = places[pixel] * stride;
        Floats row[kVectors];
        Ints levels[kVectors];
        values.row(pixel, at, row);
        unroll<kVectors>([&](auto v) ADQ_INLINE_LAMBDA { levels[v.value] = level(scale * row[v.value]); });
        narrow_all<kVectors>(whole ? to + at : rest, levels);
        if (!whole) std::memcpy(to + at, rest, bytes);
    }
}

template <int kBlocks, class Values>
void quantize_any(const Epilogue& epilogue, std::size_t index, Tile tile) {
    const QuantizerTable& table = (*epilogue.tables)[index];
    if (table.uniform) return quantize<kBlocks, Values, ClosedLevel>(epilogue, index, tile);
    switch (table.edges.cells) {
        case 4: return quantize<kBlocks, Values, EdgeLevel<4>>(epilogue, index, tile);
        case 8: return quantize<kBlocks, Values, EdgeLevel<8>>(epilogue, index, tile);
        case 16: return quantize<kBlocks, Values, EdgeLevel<16>>(epilogue, index, tile);
        case 32: return quantize<kBlocks, Values, EdgeLevel<32>>(epilogue, index, tile);
        case 64: return quantize<kBlocks, Values, EdgeLevel<64>>(epilogue, index, tile);
        default: return quantize<kBlocks, Values, EdgeLevel<256>>(epilogue, index, tile);
    }
}

template <int kBlocks>
void finish_alone(const Epilogue& epilogue, Tile tile) {
    FinishedSums<kBlocks> values(epilogue, tile, false);
    for (int pixel = 0; pixel < tile.pixels; ++pixel) {
        Floats row[kBlocks * kParts];
        values.row(pixel, epilogue.places[tile.first + pixel] * epilogue.stride, row);
    }
}

template <int kBlocks>
void finish_tile(const Epilogue& epilogue, Tile tile) {
    if (epilogue.levels.empty()) return finish_alone<kBlocks>(epilogue, tile);
    quantize_any<kBlocks, FinishedSums<kBlocks>>(epilogue, 0, tile);
    for (std::size_t i = 1; i < epilogue.levels.size(); ++i)
        quantize_any<kBlocks, KeptValues<kBlocks>>(epilogue, i, tile);
}

// ---- dense -------------------------------------------------------------------------------------------

// Parts of the sums stay in registers; they are added to the sums, in the tile, where they can hold no more.
template <class Products, int kBlocks, int kPixels>
void multiply_tile(const Strip& strip, Tile tile) {
    constexpr int kVectors = kBlocks * kParts;
    constexpr int kSplit = Products::kSplit;
    Ints part[kVectors][kPixels] = {};
    const std::uint8_t* input[kPixels];
    unroll<kPixels>([&](auto p) ADQ_INLINE_LAMBDA {
        input[p.value] = strip.origins[tile.first + p.value] + strip.channel;
    });
    bool first = true;
    const auto add_parts = [&]() ADQ_INLINE_LAMBDA {
        unroll<kPixels>([&](auto p) ADQ_INLINE_LAMBDA {
            unroll<kVectors>([&](auto v) ADQ_INLINE_LAMBDA {
                float* to = tile.values + kWidth * (p.value * kVectors + v.value);
                const Ints sum = first ? load_ints(strip.epilogue.initial + kWidth * v.value) : load_ints(to);
                store_ints(to, sum + Products::total(part[v.value][p.value]));
                part[v.value][p.value] = Ints{};
            });
        });
        first = false;
    };
    std::int64_t room = strip.steps_held;
    for (const Run* run = strip.runs; run != strip.runs + strip.run_count; ++run) {
        const Ints* weights = static_cast<const Ints*>(strip.panel) + run->step * kVectors * kSplit;
        std::int64_t at = run->offset;
        for (std::int64_t left = run->steps; left > 0;) {
            if (room == 0) {
                add_parts();
                room = strip.steps_held;
            }
            const std::int64_t steps = std::min(left, room);
            const std::int64_t end = at + kBlockInputs * steps;
            for (; at < end; at += kBlockInputs) {
                Ints weight[kVectors][kSplit];
                unroll<kVectors * kSplit>([&](auto i) ADQ_INLINE_LAMBDA {
                    weight[i.value / kSplit][i.value % kSplit] = weights[i.value];
                });
                unroll<kPixels>([&](auto p) ADQ_INLINE_LAMBDA {
                    const auto levels = broadcast_quads<Products>(input[p.value] + at);
                    unroll<kVectors>([&](auto v) ADQ_INLINE_LAMBDA {
                        Ints& to = part[v.value][p.value];
                        to = levels.add_dot(to, weight[v.value]);
                    });
                });
                weights += kVectors * kSplit;
            }
            left -= steps;
            room -= steps;
        }
    }
    add_parts();
}

// A tile of as many pixels as it has.
template <class Products, int kBlocks, int kPixels>
void multiply_pixels(const Strip& strip, Tile tile) {
    if constexpr (kPixels > 0) {
        if (tile.pixels == kPixels) return multiply_tile<Products, kBlocks, kPixels>(strip, tile);
        multiply_pixels<Products, kBlocks, kPixels - 1>(strip, tile);
    }
}

// Tiles of nearly equal sizes.
template <class Products, int kBlocks>
void dense_blocks(const Strip& strip) {
    constexpr int kPixels = tile_pixels<Products>(kBlocks);
    alignas(64) float values[kPixels * kBlocks * kBlockOutputs];
    const int tiles = (strip.pixels + kPixels - 1) / kPixels;
    for (int i = 0; i < tiles; ++i) {
        const int first = strip.pixels * i / tiles;
        const Tile tile{first, strip.pixels * (i + 1) / tiles - first, values};
        multiply_pixels<Products, kBlocks, kPixels>(strip, tile);
        finish_tile<kBlocks>(strip.epilogue, tile);
    }
}

template <class Products, int kBlocks = kPanelBlocks>
void dense(const Strip& strip) {
    if constexpr (kBlocks > 0) {
        if (strip.blocks == kBlocks) return dense_blocks<Products, kBlocks>(strip);
        dense<Products, kBlocks - 1>(strip);
    }
}

// ---- depthwise ---------------------------------------------------------------------------------------

#if defined(__AVX512F__)

// The sums of a pixel: the bytes of four taps are put side by side within each quarter of a vector, so a
// vector of sums holds four channels of every block until the end.
template <int kBlocks>
ADQ_INLINE void multiply_channels(const Strip& strip, int pixel, float* to) {
    constexpr __mmask64 kBytes = ~__mmask64{0} >> (64 - kBlockOutputs * kBlocks);
    const std::uint8_t* origin = strip.origins[pixel] + strip.channel;
    const Ints* weights = static_cast<const Ints*>(strip.panel);
    Ints quarters[kBlockInputs] = {}, sums[kBlockInputs];
    for (int i = 0; i < strip.run_count; i += kBlockInputs) {
        __m512i tap[kBlockInputs];
        unroll<kBlockInputs>([&](auto t) ADQ_INLINE_LAMBDA {
            tap[t.value] = _mm512_maskz_loadu_epi8(kBytes, origin + strip.runs[i + t.value].offset);
        });
        const __m512i low[] = {_mm512_unpacklo_epi8(tap[0], tap[1]), _mm512_unpacklo_epi8(tap[2], tap[3])};
        const __m512i high[] = {_mm512_unpackhi_epi8(tap[0], tap[1]), _mm512_unpackhi_epi8(tap[2], tap[3])};
        const __m512i quads[] = {_mm512_unpacklo_epi16(low[0], low[1]), _mm512_unpackhi_epi16(low[0], low[1]),
                                 _mm512_unpacklo_epi16(high[0], high[1]),
                                 _mm512_unpackhi_epi16(high[0], high[1])};
        unroll<kBlockInputs>([&](auto j) ADQ_INLINE_LAMBDA {
            quarters[j.value] = AnyBytes::Quads((Ints)quads[j.value])
                                    .add_dot(quarters[j.value], weights + AnyBytes::kSplit * j.value);
        });
        weights += kBlockInputs * AnyBytes::kSplit;
    }
    transpose_quarters(quarters, sums);
    unroll<kBlocks>([&](auto block) ADQ_INLINE_LAMBDA {
        const Ints initial = load_ints(strip.epilogue.initial + kBlockOutputs * block.value);
        store_ints(to + kBlockOutputs * block.value, sums[block.value] + initial);
    });
}

#else

// The sums of a pixel, with the levels of four taps side by side in a lane for each channel.
template <int kBlocks>
ADQ_INLINE void multiply_channels(const Strip& strip, int pixel, float* to) {
    constexpr int kVectors = kBlocks * kParts;
    const std::uint8_t* origin = strip.origins[pixel] + strip.channel;
    for (int v = 0; v < kVectors; ++v) {
        Ints sum = load_ints(strip.epilogue.initial + kWidth * v);
        const Ints* weights = static_cast<const Ints*>(strip.panel) + AnyBytes::kSplit * v;
        for (int i = 0; i < strip.run_count; i += kBlockInputs) {
            Ints bytes = fill(0);
            unroll<kBlockInputs>([&](auto t) ADQ_INLINE_LAMBDA {
                const Ints levels = widen(origin + strip.runs[i + t.value].offset + kWidth * v);
                bytes = bytes | (levels << (8 * t.value));
            });
            sum = AnyBytes::Quads(bytes).add_dot(sum, weights);
            weights += kVectors * AnyBytes::kSplit;
        }
        store_ints(to + kWidth * v, sum);
    }
}

#endif

template <int kBlocks>
void depthwise_blocks(const Strip& strip) {
    constexpr int kPixels = 4;
    constexpr int kRow = kBlocks * kBlockOutputs;
    alignas(64) float values[kPixels * kRow];
    for (int first = 0; first < strip.pixels; first += kPixels) {
        const Tile tile{first, std::min(kPixels, strip.pixels - first), values};
        for (int p = 0; p < tile.pixels; ++p) multiply_channels<kBlocks>(strip, first + p, values + p * kRow);
        finish_tile<kBlocks>(strip.epilogue, tile);
    }
}

template <int kBlocks>
void depthwise_any(const Strip& strip) {
    if constexpr (kBlocks > 0) {
        if (strip.blocks == kBlocks) return depthwise_blocks<kBlocks>(strip);
        depthwise_any<kBlocks - 1>(strip);
    }
}

void depthwise(const Strip& strip) { depthwise_any<kPanelBlocks>(strip); }

template <class Products>
constexpr MultiplyKernels multiply_kernels(void (*multiply)(const Strip&)) {
    return {kBlockVectors<Products> * static_cast<int>(sizeof(Ints)), prepare<Products>, multiply};
}

}  // namespace

extern const IntegerKernels kIntegerKernels = {
    kPanelBlocks,
    multiply_kernels<AnyBytes>(dense<AnyBytes>),
    multiply_kernels<AnyBytes>(depthwise),
#if defined(ADQ_HAS_SMALL_BYTES)
    multiply_kernels<SmallBytes>(dense<SmallBytes>),
#endif
};

}  // namespace ADQ_ISA
}  // namespace adq
