#include "dispatch.h"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <limits>

#include "integer_layout.h"
#include "pool.h"
#include "tensors.h"

namespace adq {
namespace {

int thread_count() {
    std::uint32_t threads;
    check(torch.torch_get_num_threads(&threads));
    return static_cast<int>(threads);
}

// Whether a result is one for this file: there is something to do, and it is too small for the pool.
bool is_small(std::int64_t numel, std::int64_t bytes = 4) {
    return numel > 0 && numel < static_cast<std::int64_t>(kPoolFrom) / bytes;
}

// The same of a result of several dimensions, whose product may be beyond 64 bits.
bool is_small(std::initializer_list<std::int64_t> sizes, std::int64_t bytes = 4) {
    std::int64_t numel = 1;
    for (const std::int64_t size : sizes) {
        if (!is_small(size, bytes) || !is_small(numel *= size, bytes)) return false;
    }
    return true;
}

// Dense data of a float dtype.
bool is_data(const View& tensor, Dtype& dtype) {
    return is_small(tensor.numel) && to_dtype(tensor, dtype) && is_dense(tensor);
}

// (w, codebook, thresholds, codes) -> (w_q, codes[, count, total])
bool lookup(const Value* arguments, Value* results, bool statistics) {
    const View w(arguments[0]), codebook(arguments[1]), thresholds(arguments[2]);
    Lookup args{};
    const bool fits = is_data(w, args.dtype) && is_table(codebook) && is_table(thresholds) &&
                      codebook.numel == thresholds.numel + 1 && codebook.numel <= kMaxLevels;
    if (!fits) return false;
    const bool codes = as<bool>(arguments[3]);
    const std::int32_t uint8 = torch.aoti_torch_dtype_uint8();
    NewTensor w_q(w), code = codes ? NewTensor(w, uint8) : NewTensor(0, uint8);
    args.w = w.data;
    args.n = w.numel;
    args.codebook = codebook.pointer<float>();
    args.thresholds = thresholds.pointer<float>();
    args.levels = static_cast<int>(codebook.numel);
    args.w_q = w_q.data();
    args.codes = codes ? code.pointer<std::uint8_t>() : nullptr;
    if (statistics) {
        NewTensor count(codebook.numel, torch.aoti_torch_dtype_int64());
        NewTensor total(codebook.numel, torch.aoti_torch_dtype_float32());
        args.count = count.pointer<std::int64_t>();
        args.total = total.pointer<float>();
        codebook_lookup(args, thread_count());
        results[2] = count.release();
        results[3] = total.release();
    } else {
        codebook_lookup(args, thread_count());
    }
    results[0] = w_q.release();
    results[1] = code.release();
    return true;
}

bool lookup_alone(const Value* arguments, Value* results) { return lookup(arguments, results, false); }

bool lookup_statistics(const Value* arguments, Value* results) { return lookup(arguments, results, true); }

// Fills the layer's scale and its layout, if the scale is one element or one for each channel of some axis.
bool set_scale(Layer& layer, const View& w, const View& scale) {
    if (scale.dim != w.dim || scale.dtype != torch.aoti_torch_dtype_float32() || !is_contiguous(scale))
        return false;
    layer.scale = scale.pointer<float>();
    layer.channels = layer.outer = 1;
    layer.inner = w.numel;
    if (scale.numel == 1) return true;
    std::int64_t axis = -1;
    for (std::int64_t d = 0; d < w.dim; ++d) {
        if (scale.sizes[d] == 1) continue;
        if (axis >= 0 || scale.sizes[d] != w.sizes[d]) return false;
        axis = d;
    }
    layer.channels = w.sizes[axis];
    layer.inner = w.strides[axis];
    layer.outer = w.numel / (layer.channels * layer.inner);
    return true;
}

// (weights, scales, codebooks) -> quantized weights
bool quantize_all(const Value* arguments, Value* results) {
    const std::vector<View> weights = views(arguments[0]), scales = views(arguments[1]);
    const std::vector<View> codebooks = views(arguments[2]);
    if (scales.size() != weights.size() || codebooks.size() != weights.size()) return false;
    std::vector<Layer> layers(weights.size());
    for (std::size_t i = 0; i < weights.size(); ++i) {
        const bool fits = is_data(weights[i], layers[i].dtype) &&
                          set_scale(layers[i], weights[i], scales[i]) && is_table(codebooks[i]) &&
                          codebooks[i].numel >= 1 && codebooks[i].numel <= kMaxLevels;
        if (!fits) return false;
        layers[i].w = weights[i].data;
        layers[i].codebook = codebooks[i].pointer<float>();
        layers[i].levels = static_cast<int>(codebooks[i].numel);
    }
    std::vector<NewTensor> quantized;
    quantized.reserve(weights.size());
    for (std::size_t i = 0; i < weights.size(); ++i)
        layers[i].w_q = quantized.emplace_back(weights[i]).data();
    quantize_layers(layers, thread_count());
    results[0] = to_list(quantized);
    return true;
}

// Tables of an activation quantizer: start, interval, in_scale, out_scale, offset.
struct QuantizerViews {
    explicit QuantizerViews(const Value* arguments)
        : start(arguments[0]),
          interval(arguments[1]),
          in_scale(arguments[2]),
          out_scale(arguments[3]),
          offset(arguments[4]) {}

    bool fits(std::int64_t steps) const {
        return is_scalar(start) && is_scalar(in_scale) && is_scalar(out_scale) && is_scalar(offset) &&
               is_table(interval) && steps >= 1 && steps < kMaxLevels &&
               (interval.numel == 1 || interval.numel == steps);
    }

    Quantizer quantizer(std::int64_t steps) const {
        return {start.pointer<float>(),     interval.pointer<float>(), in_scale.pointer<float>(),
                out_scale.pointer<float>(), offset.pointer<float>(),   static_cast<int>(interval.numel),
                static_cast<int>(steps)};
    }

    View start, interval, in_scale, out_scale, offset;
};

// (x, start, interval, in_scale, out_scale, offset, steps) -> y
bool quantize(const Value* arguments, Value* results) {
    const View x(arguments[0]);
    const QuantizerViews parameters(arguments + 1);
    const auto steps = as<std::int64_t>(arguments[6]);
    Dtype dtype;
    if (!is_data(x, dtype) || !parameters.fits(steps)) return false;
    NewTensor y(x);
    threshold_quantize(dtype, x.data, x.numel, parameters.quantizer(steps), y.data(), thread_count());
    results[0] = y.release();
    return true;
}

// (grad, x, start, interval, in_scale, out_scale, offset, steps) -> gradients of x and of the first four
// tables
bool quantize_backward(const Value* arguments, Value* results) {
    const View grad(arguments[0]), x(arguments[1]);
    const QuantizerViews parameters(arguments + 2);
    const auto steps = as<std::int64_t>(arguments[7]);
    Dtype dtype;
    const bool fits =
        is_data(x, dtype) && grad.dtype == x.dtype && same_layout(grad, x) && parameters.fits(steps);
    if (!fits) return false;
    NewTensor gradients[] = {NewTensor(x), NewTensor(parameters.start), NewTensor(parameters.interval),
                             NewTensor(parameters.in_scale), NewTensor(parameters.out_scale)};
    const QuantizerGradients addresses = {gradients[0].data(), gradients[1].pointer<float>(),
                                          gradients[2].pointer<float>(), gradients[3].pointer<float>(),
                                          gradients[4].pointer<float>()};
    threshold_quantize_backward(dtype, grad.data, x.data, x.numel, parameters.quantizer(steps), addresses,
                                thread_count());
    for (int i = 0; i < 5; ++i) results[i] = gradients[i].release();
    return true;
}

// A table for each quantizer of which the levels are wanted.
bool to_levels(const View& start, const View& interval, const View& in_scale, std::int64_t steps,
               Quantizer& quantizer) {
    const bool fits = is_scalar(start) && is_scalar(in_scale) && is_table(interval) && steps >= 1 &&
                      steps < kMaxLevels && (interval.numel == 1 || interval.numel == steps);
    quantizer = {start.pointer<float>(),
                 interval.pointer<float>(),
                 in_scale.pointer<float>(),
                 nullptr,
                 nullptr,
                 static_cast<int>(interval.numel),
                 static_cast<int>(steps)};
    return fits;
}

// (x, start, interval, in_scale, steps) -> levels
bool levels(const Value* arguments, Value* results) {
    const View x(arguments[0]), start(arguments[1]), interval(arguments[2]), in_scale(arguments[3]);
    Dtype dtype;
    Quantizer quantizer;
    if (!is_data(x, dtype) ||
        !to_levels(start, interval, in_scale, as<std::int64_t>(arguments[4]), quantizer))
        return false;
    NewTensor level(x, torch.aoti_torch_dtype_uint8());
    threshold_levels(dtype, x.data, x.numel, quantizer, level.pointer<std::uint8_t>(), thread_count());
    results[0] = level.release();
    return true;
}

// Two numbers, neither too small nor so large that products of them overflow.
bool to_pair(Value list, std::int64_t least, std::int64_t (&pair)[2]) {
    constexpr std::int64_t kMost = 1 << 20;
    const std::vector<Value> numbers = items(list);
    if (numbers.size() != 2) return false;
    for (int i = 0; i < 2; ++i) pair[i] = as<std::int64_t>(numbers[i]);
    return std::min(pair[0], pair[1]) >= least && std::max(pair[0], pair[1]) <= kMost;
}

bool is_parameter(const View& tensor, std::int32_t dtype, std::int64_t outputs) {
    return tensor.dim == 1 && tensor.numel == outputs && tensor.dtype == dtype && is_contiguous(tensor);
}

// The part of an integer convolution that is its own: x, weights and what they are multiplied with.
bool set_operands(Convolution& args, const Value* arguments) {
    const View x(arguments[0]), weight(arguments[1]), table(arguments[2]);
    const View initial(arguments[3]), multiplier(arguments[4]), bias(arguments[5]);
    const std::int32_t uint8 = torch.aoti_torch_dtype_uint8(), float32 = torch.aoti_torch_dtype_float32();
    args.outputs = initial.numel;
    const bool fits = x.dtype == uint8 && is_channels_last(x) && x.numel > 0 && weight.dtype == uint8 &&
                      is_contiguous(weight) && table.dtype == torch.aoti_torch_dtype_int8() &&
                      is_contiguous(table) && table.numel <= 16 && args.outputs > 0 &&
                      is_parameter(initial, torch.aoti_torch_dtype_int32(), args.outputs) &&
                      is_parameter(multiplier, float32, args.outputs) &&
                      is_parameter(bias, float32, args.outputs) && as<std::int64_t>(arguments[17]) >= 0 &&
                      as<std::int64_t>(arguments[17]) <= 255;
    if (!fits) return false;
    args.x = x.pointer<std::uint8_t>();
    args.batch = x.sizes[0];
    args.channels = x.sizes[1];
    args.height = x.sizes[2];
    args.width = x.sizes[3];
    args.weight = weight.pointer<std::uint8_t>();
    args.table = table.pointer<std::int8_t>();
    args.table_levels = static_cast<int>(table.numel);
    args.initial = initial.pointer<std::int32_t>();
    args.multiplier = multiplier.pointer<float>();
    args.bias = bias.pointer<float>();
    args.groups = as<std::int64_t>(arguments[16]);
    args.zero = static_cast<std::uint8_t>(as<std::int64_t>(arguments[17]));
    return true;
}

// Whether the weight is laid out for this convolution, as adq/layout.py does it.
bool is_arranged(const Convolution& args, const View& weight) {
    int bits = 0;
    for (const int each : {1, 2, 3, 4}) {
        if (args.table_levels == 1 << each) bits = each;
    }
    if (args.table_levels == 0) bits = 8;
    const Layout layout = find_layout(args);
    const std::int64_t sums = layout.taps * (layout.depthwise ? 1 : layout.inputs);
    if (bits == 0 || sums > std::numeric_limits<std::int32_t>::max() / (255 * 128)) return false;
    if (layout.depthwise)
        return weight.dim == 2 && weight.sizes[0] == layout.taps && weight.sizes[1] == args.outputs;
    const std::array<std::int64_t, 4> expected = {layout.groups, layout.blocks, layout.steps, 8 * bits};
    return weight.dim == 4 && std::equal(expected.begin(), expected.end(), weight.sizes);
}

bool set_geometry(Convolution& args, const Value* arguments) {
    const bool fits = args.groups >= 1 && args.channels % args.groups == 0 &&
                      args.outputs % args.groups == 0 && to_pair(arguments[12], 1, args.kernel) &&
                      to_pair(arguments[13], 1, args.stride) && to_pair(arguments[14], 0, args.padding) &&
                      to_pair(arguments[15], 1, args.dilation) && is_arranged(args, View(arguments[1]));
    if (!fits) return false;
    const std::int64_t sizes[] = {args.height, args.width};
    std::int64_t* const results[] = {&args.out_height, &args.out_width};
    for (int i = 0; i < 2; ++i) {
        const std::int64_t room =
            sizes[i] + 2 * args.padding[i] - args.dilation[i] * (args.kernel[i] - 1) - 1;
        if (room < 0) return false;
        *results[i] = room / args.stride[i] + 1;
    }
    const std::int64_t bytes = as<bool>(arguments[11]) ? 4 : 1;
    return is_small({args.batch, args.outputs, args.out_height, args.out_width}, bytes);
}

// An optional tensor of the result's shape and layout.
bool set_residual(Convolution& args, Value optional) {
    if (optional == 0) return true;
    const View residual(*reinterpret_cast<const Value*>(optional));
    args.residual = residual.pointer<float>();
    return residual.dtype == torch.aoti_torch_dtype_float32() && is_channels_last(residual) &&
           residual.sizes[0] == args.batch && residual.sizes[1] == args.outputs &&
           residual.sizes[2] == args.out_height && residual.sizes[3] == args.out_width;
}

// Quantizers of the levels that are wanted; where those go is still open.
bool set_quantizers(Convolution& args, Value quantizers, Value steps) {
    const std::vector<View> tables = views(quantizers);
    const std::vector<Value> counts = items(steps);
    if (tables.size() != 3 * counts.size()) return false;
    for (std::size_t i = 0; i < counts.size(); ++i) {
        Convolution::Levels level{};
        if (!to_levels(tables[3 * i], tables[3 * i + 1], tables[3 * i + 2], as<std::int64_t>(counts[i]),
                       level.quantizer))
            return false;
        args.levels.push_back(level);
    }
    return true;
}

// (x, weight, table, initial, multiplier, bias, residual, low, high, quantizers, steps, keep, kernel, stride,
// padding, dilation, groups, zero) -> (y, levels)
bool convolve(const Value* arguments, Value* results) {
    Convolution args{};
    const bool fits = set_operands(args, arguments) && set_geometry(args, arguments) &&
                      set_residual(args, arguments[6]) && set_quantizers(args, arguments[9], arguments[10]);
    if (!fits) return false;
    args.low = static_cast<float>(as<double>(arguments[7]));
    args.high = static_cast<float>(as<double>(arguments[8]));
    const std::int64_t sizes[] = {args.batch, args.outputs, args.out_height, args.out_width};
    const std::int64_t row = args.outputs * args.out_width;
    const std::int64_t strides[] = {row * args.out_height, 1, row, args.outputs};
    const std::int32_t float32 = torch.aoti_torch_dtype_float32();
    const bool keep = as<bool>(arguments[11]);
    NewTensor y = keep ? NewTensor(4, sizes, strides, float32) : NewTensor(0, float32);
    args.y = keep ? y.pointer<float>() : nullptr;
    std::vector<NewTensor> level_tensors;
    for (Convolution::Levels& level : args.levels) {
        level_tensors.emplace_back(4, sizes, strides, torch.aoti_torch_dtype_uint8());
        level.levels = level_tensors.back().pointer<std::uint8_t>();
    }
    integer_conv2d(args, thread_count());
    results[1] = to_list(level_tensors);
    results[0] = y.release();
    return true;
}

// (x, packed, codebook, scale, bits, outputs) -> y
bool linear(const Value* arguments, Value* results) {
    const View x(arguments[0]), packed(arguments[1]), codebook(arguments[2]), scale(arguments[3]);
    const auto bits = as<std::int64_t>(arguments[4]), outputs = as<std::int64_t>(arguments[5]);
    const std::int32_t float32 = torch.aoti_torch_dtype_float32();
    if (x.dim == 0 || x.numel == 0 || x.dtype != float32 || !is_contiguous(x)) return false;
    const std::int64_t inputs = x.sizes[x.dim - 1], rows = x.numel / inputs;
    const bool fits = is_small({rows, outputs}) && bits >= 1 && bits <= 8 && is_table(codebook) &&
                      codebook.numel >= 1 && codebook.numel <= std::int64_t{1} << bits && packed.dim == 1 &&
                      packed.dtype == torch.aoti_torch_dtype_uint8() && is_contiguous(packed) &&
                      packed.numel == (outputs * inputs * bits + 7) / 8 && scale.dtype == float32 &&
                      is_contiguous(scale) && scale.dim == 2 && scale.sizes[1] == 1 &&
                      (scale.numel == 1 || scale.numel == outputs);
    if (!fits) return false;
    std::vector<std::int64_t> sizes(x.sizes, x.sizes + x.dim), strides(x.dim, 1);
    sizes.back() = outputs;
    for (std::size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * sizes[d];
    NewTensor y(x.dim, sizes.data(), strides.data(), float32);
    CodebookLinear args{};
    args.x = x.pointer<float>();
    args.rows = rows;
    args.inputs = inputs;
    args.outputs = outputs;
    args.packed = packed.pointer<std::uint8_t>();
    args.bits = static_cast<int>(bits);
    args.codebook = codebook.pointer<float>();
    args.levels = static_cast<int>(codebook.numel);
    args.scale = scale.pointer<float>();
    args.channels = scale.numel;
    args.y = y.pointer<float>();
    codebook_linear(args, thread_count());
    results[0] = y.release();
    return true;
}

}  // namespace

const NativeOperator kNative[kNativeOperators] = {
    {"codebook_lookup", "tttb", "tt", lookup_alone},
    {"codebook_lookup_statistics", "tttb", "tttt", lookup_statistics},
    {"foreach_codebook_quantize", "lll", "l", quantize_all},
    {"threshold_quantize", "tttttti", "t", quantize},
    {"threshold_quantize_backward", "ttttttti", "ttttt", quantize_backward},
    {"threshold_levels", "tttti", "t", levels},
    {"integer_conv2d", "ttttttofflnbnnnnii", "tl", convolve},
    {"codebook_linear", "ttttii", "t", linear},
};

HeldArguments::~HeldArguments() {
    for (std::size_t i = 0; letters_[i] != '\0'; ++i) {
        const Value value = values_[i];
        switch (letters_[i]) {
            case 't': torch.aoti_torch_delete_tensor_object(as<TensorHandle>(value)); break;
            case 'l': delete_list(value, true); break;
            case 'n': delete_list(value, false); break;
            case 'o':
                if (value == 0) break;
                torch.aoti_torch_delete_tensor_object(as<TensorHandle>(*reinterpret_cast<Value*>(value)));
                torch.torch_delete_stable_ivalue(reinterpret_cast<Value*>(value));
                break;
            default: break;
        }
    }
}

}  // namespace adq
