// The C++ CPU kernels of adq: raw pointers and sizes, no torch, no Python.
//
// Conventions. `n` counts elements; data pointers need the alignment of their element type only and
// may be null where marked optional. Arithmetic is float32 without contraction, stores round to
// nearest even, NaN stays NaN. Every result is bit-identical for any `threads` and any Isa:
// reductions run over 16 virtual lanes and chunks of kChunk elements, whatever the hardware.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace adq {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int kMaxLevels = 256;
constexpr float kMinInterval = 1e-3f;     // smaller intervals are clamped, with gradient zero
constexpr double kActivationRange = 2.0;  // R of the activation quantizer
constexpr std::int64_t kChunk = 32768;    // elements a partial sum covers, and a thread's unit of work

// Nearest codeword of w[n]: code = #{k : w > thresholds[k]}, w_q = codebook[code].
struct Lookup {
    Dtype dtype;
    const void* w;  // [n]
    std::int64_t n;
    const float* codebook;    // [levels]; unused if w_q is null
    const float* thresholds;  // [levels - 1], ascending
    int levels;               // 1..256
    void* w_q;                // [n], optional
    std::uint8_t* codes;      // [n], optional; NaN has code 0
    std::int64_t* count;      // [levels], optional (both or neither): elements in each cell, NaN in none
    float* total;             // [levels]: their sum
};
void codebook_lookup(const Lookup& args, int threads);

// A layer's weight and the state of its quantizer: w_q = scale * codebook[code(w / scale)]. The weight lies
// in memory as [outer][channels][inner], with a scale for each channel; with one scale, channels = outer = 1.
struct Layer {
    Dtype dtype;
    const void* w;  // [outer * channels * inner]
    std::int64_t outer;
    std::int64_t channels;
    std::int64_t inner;
    float* scale;     // [channels]
    float* codebook;  // [levels], ascending
    int levels;       // 1..256
    void* w_q;        // [outer * channels * inner], optional in step_layers
    // For step_layers:
    float* ema_count;  // [levels]
    float* ema_total;  // [levels]
    float rate;        // of the exponential moving averages
    bool snap;         // hold the levels on an int8 grid
};

// The quantized weight of every layer.
void quantize_layers(const std::vector<Layer>& layers, int threads);

// One step of every layer's codebook and, where there are channels, scales towards its weight; then, where
// w_q is not null, the quantized weight. The rules are those of reference.py.
void step_layers(const std::vector<Layer>& layers, int threads);

// Parameters of the activation quantizer, y = out_scale * (D q - offset) with D = R / steps.
struct Quantizer {
    const float* start;      // [1] T_0
    const float* interval;   // [intervals] T_{i+1} - T_i before clamping
    const float* in_scale;   // [1] u = in_scale * x
    const float* out_scale;  // [1]; not read where only the levels are wanted
    const float* offset;     // [1]; likewise
    int intervals;           // steps, or 1: one interval for all steps
    int steps;               // 1..255
};

// y[n] of x[n]: q = #{i : u > T_i + interval[i] / 2}.
void threshold_quantize(Dtype dtype, const void* x, std::int64_t n, const Quantizer& quantizer, void* y,
                        int threads);

// levels[n] of x[n]: q alone; NaN has level 0.
void threshold_levels(Dtype dtype, const void* x, std::int64_t n, const Quantizer& quantizer,
                      std::uint8_t* levels, int threads);

// All gradients of threshold_quantize in one pass over (x, grad); the formulas stand in slopes.h.
struct QuantizerGradients {
    void* x;           // [n], optional
    float* start;      // [1]
    float* interval;   // [intervals]
    float* in_scale;   // [1]
    float* out_scale;  // [1]
};
void threshold_quantize_backward(Dtype dtype, const void* grad, const void* x, std::int64_t n,
                                 const Quantizer& quantizer, const QuantizerGradients& gradients,
                                 int threads);

// Levels convolved with int8 weights, a = initial + sum of x w in int32, and what follows, each one float32
// operation: v = float(a) * multiplier, v += bias, v += residual, y = clamp(v, low, high), and levels of y.
struct Convolution {
    struct Levels {
        Quantizer quantizer;
        std::uint8_t* levels;  // [batch][out_height][out_width][outputs]
    };
    const std::uint8_t* x;  // [batch][height][width][channels]
    std::int64_t batch, height, width, channels;
    std::int64_t out_height, out_width, outputs;
    std::int64_t kernel[2], stride[2], padding[2], dilation[2];  // height first
    std::int64_t groups;
    std::uint8_t zero;            // the level outside of the image
    const std::uint8_t* weight;   // as adq/layout.py lays it out
    const std::int8_t* table;     // [table_levels]
    int table_levels;             // 2, 4, 8, 16, or 0: the weight is int8
    const std::int32_t* initial;  // [outputs]
    const float* multiplier;      // [outputs]
    const float* bias;            // [outputs]
    const float* residual;        // [batch][out_height][out_width][outputs], optional
    float low, high;
    float* y;  // [batch][out_height][out_width][outputs], optional
    std::vector<Levels> levels;
};
void integer_conv2d(const Convolution& args, int threads);

// Code i of codes[n] <-> bits [i b, (i + 1) b) of the little-endian stream packed[ceil(n b / 8)], 1 <= b
// <= 8.
void pack_bits(const std::uint8_t* codes, std::int64_t n, int bits, std::uint8_t* packed, int threads);
void unpack_bits(const std::uint8_t* packed, int bits, std::int64_t n, std::uint8_t* codes, int threads);

// A weight from its packed codes: w_q = scale * codebook[code], a code that has no level taking the last one.
// The weight lies in memory as that of a Layer does.
struct Decode {
    const std::uint8_t* packed;  // [ceil(outer * channels * inner * bits / 8)]
    int bits;                    // 1..8
    const float* codebook;       // [levels]
    int levels;                  // 1..2^bits
    const float* scale;          // [channels]
    std::int64_t outer;
    std::int64_t channels;
    std::int64_t inner;
    float* w_q;  // [outer * channels * inner]
};
void codebook_decode(const Decode& args, int threads);

// y = x W^T for few rows of x and a weight in packed codes, which are decoded piece by piece: W[o][i] =
// scale[o] * codebook[code]. The products and 16 lanes of their sums are float32, added in double every
// kBlock inputs; the scale comes last.
struct CodebookLinear {
    const float* x;  // [rows][inputs]
    std::int64_t rows;
    std::int64_t inputs;
    std::int64_t outputs;
    const std::uint8_t* packed;  // [ceil(outputs * inputs * bits / 8)]
    int bits;                    // 1..8
    const float* codebook;       // [levels]
    int levels;                  // 1..2^bits
    const float* scale;          // [channels]
    std::int64_t channels;       // outputs, or 1: one scale for all of them
    float* y;                    // [rows][outputs]
};
void codebook_linear(const CodebookLinear& args, int threads);

// Instruction sets: "avx512vnni", "avx512", "avx2vnni", "avx2" or "baseline", the best available one until
// set_isa chooses another.
std::string isa();
std::vector<std::string> available_isas();
void set_isa(const std::string& name);  // throws std::invalid_argument
bool has_openmp();

}  // namespace adq
