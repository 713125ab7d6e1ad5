// adq._C: the kernels of adq.h for Python. Pointers come as integers (tensor.data_ptr()), null as 0;
// the caller vouches for dtypes, sizes and memory. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <signal.h>
#include <unistd.h>
#endif

#include "adq.h"
#include "dispatch.h"
#include "pool.h"
#include "tensors.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void codebook_lookup(int dtype, Address w, std::int64_t n, Address codebook, Address thresholds, int levels,
                     Address w_q, Address codes, Address count, Address total, int threads) {
    adq::Lookup args;
    args.dtype = static_cast<adq::Dtype>(dtype);
    args.w = pointer<void>(w);
    args.n = n;
    args.codebook = pointer<float>(codebook);
    args.thresholds = pointer<float>(thresholds);
    args.levels = levels;
    args.w_q = pointer<void>(w_q);
    args.codes = pointer<std::uint8_t>(codes);
    args.count = pointer<std::int64_t>(count);
    args.total = pointer<float>(total);
    adq::codebook_lookup(args, threads);
}

// (dtype, w, outer, channels, inner, scale, codebook, levels, w_q) and, for a step, (ema_count, ema_total,
// rate, snap).
using Weight =
    std::tuple<int, Address, std::int64_t, std::int64_t, std::int64_t, Address, Address, int, Address>;
using Step = std::tuple<Address, Address, float, bool>;

adq::Layer layer(const Weight& weight) {
    adq::Layer args{};
    args.dtype = static_cast<adq::Dtype>(std::get<0>(weight));
    args.w = pointer<void>(std::get<1>(weight));
    args.outer = std::get<2>(weight);
    args.channels = std::get<3>(weight);
    args.inner = std::get<4>(weight);
    args.scale = pointer<float>(std::get<5>(weight));
    args.codebook = pointer<float>(std::get<6>(weight));
    args.levels = std::get<7>(weight);
    args.w_q = pointer<void>(std::get<8>(weight));
    return args;
}

void quantize_layers(const std::vector<Weight>& weights, int threads) {
    std::vector<adq::Layer> layers;
    for (const Weight& weight : weights) layers.push_back(layer(weight));
    adq::quantize_layers(layers, threads);
}

void step_layers(const std::vector<Weight>& weights, const std::vector<Step>& steps, int threads) {
    std::vector<adq::Layer> layers;
    for (std::size_t i = 0; i < weights.size(); ++i) {
        adq::Layer args = layer(weights[i]);
        args.ema_count = pointer<float>(std::get<0>(steps.at(i)));
        args.ema_total = pointer<float>(std::get<1>(steps[i]));
        args.rate = std::get<2>(steps[i]);
        args.snap = std::get<3>(steps[i]);
        layers.push_back(args);
    }
    adq::step_layers(layers, threads);
}

adq::Quantizer quantizer(Address start, Address interval, Address in_scale, Address out_scale, Address offset,
                         int intervals, int steps) {
    return {pointer<float>(start),
            pointer<float>(interval),
            pointer<float>(in_scale),
            pointer<float>(out_scale),
            pointer<float>(offset),
            intervals,
            steps};
}

void threshold_quantize(int dtype, Address x, std::int64_t n, Address start, Address interval,
                        Address in_scale, Address out_scale, Address offset, int intervals, int steps,
                        Address y, int threads) {
    adq::threshold_quantize(static_cast<adq::Dtype>(dtype), pointer<void>(x), n,
                            quantizer(start, interval, in_scale, out_scale, offset, intervals, steps),
                            pointer<void>(y), threads);
}

// (start, interval, in_scale, intervals, steps, levels)
using LevelsOf = std::tuple<Address, Address, Address, int, int, Address>;

adq::Quantizer level_quantizer(const LevelsOf& of) {
    return quantizer(std::get<0>(of), std::get<1>(of), std::get<2>(of), 0, 0, std::get<3>(of),
                     std::get<4>(of));
}

void threshold_levels(int dtype, Address x, std::int64_t n, const LevelsOf& levels, int threads) {
    adq::threshold_levels(static_cast<adq::Dtype>(dtype), pointer<void>(x), n, level_quantizer(levels),
                          pointer<std::uint8_t>(std::get<5>(levels)), threads);
}

using Pair = std::array<std::int64_t, 2>;

void integer_conv2d(Address x, const std::array<std::int64_t, 4>& shape, Address weight, Address table,
                    int table_levels, const std::array<Address, 4>& outputs, Address y,
                    const std::array<std::int64_t, 3>& out_shape, float low, float high,
                    const std::vector<LevelsOf>& levels, const std::array<Pair, 4>& geometry,
                    std::int64_t groups, int zero, int threads) {
    adq::Convolution args{};
    args.x = pointer<std::uint8_t>(x);
    std::tie(args.batch, args.channels, args.height, args.width) = std::tuple_cat(shape);
    args.weight = pointer<std::uint8_t>(weight);
    args.table = pointer<std::int8_t>(table);
    args.table_levels = table_levels;
    args.initial = pointer<std::int32_t>(outputs[0]);
    args.multiplier = pointer<float>(outputs[1]);
    args.bias = pointer<float>(outputs[2]);
    args.residual = pointer<float>(outputs[3]);
    args.y = pointer<float>(y);
    std::tie(args.outputs, args.out_height, args.out_width) = std::tuple_cat(out_shape);
    args.low = low;
    args.high = high;
    for (const LevelsOf& of : levels)
        args.levels.push_back({level_quantizer(of), pointer<std::uint8_t>(std::get<5>(of))});
    for (int i = 0; i < 2; ++i) {
        args.kernel[i] = geometry[0][i];
        args.stride[i] = geometry[1][i];
        args.padding[i] = geometry[2][i];
        args.dilation[i] = geometry[3][i];
    }
    args.groups = groups;
    args.zero = static_cast<std::uint8_t>(zero);
    adq::integer_conv2d(args, threads);
}

void threshold_quantize_backward(int dtype, Address grad, Address x, std::int64_t n, Address start,
                                 Address interval, Address in_scale, Address out_scale, Address offset,
                                 int intervals, int steps, Address d_x, Address d_start, Address d_interval,
                                 Address d_in_scale, Address d_out_scale, int threads) {
    const adq::QuantizerGradients gradients = {pointer<void>(d_x), pointer<float>(d_start),
                                               pointer<float>(d_interval), pointer<float>(d_in_scale),
                                               pointer<float>(d_out_scale)};
    adq::threshold_quantize_backward(
        static_cast<adq::Dtype>(dtype), pointer<void>(grad), pointer<void>(x), n,
        quantizer(start, interval, in_scale, out_scale, offset, intervals, steps), gradients, threads);
}

void pack_bits(Address codes, std::int64_t n, int bits, Address packed, int threads) {
    adq::pack_bits(pointer<std::uint8_t>(codes), n, bits, pointer<std::uint8_t>(packed), threads);
}

void unpack_bits(Address packed, int bits, std::int64_t n, Address codes, int threads) {
    adq::unpack_bits(pointer<std::uint8_t>(packed), bits, n, pointer<std::uint8_t>(codes), threads);
}

void codebook_decode(Address packed, int bits, Address codebook, int levels, Address scale,
                     std::int64_t outer, std::int64_t channels, std::int64_t inner, Address w_q,
                     int threads) {
    adq::Decode args{};
    args.packed = pointer<std::uint8_t>(packed);
    args.bits = bits;
    args.codebook = pointer<float>(codebook);
    args.levels = levels;
    args.scale = pointer<float>(scale);
    args.outer = outer;
    args.channels = channels;
    args.inner = inner;
    args.w_q = pointer<float>(w_q);
    adq::codebook_decode(args, threads);
}

void codebook_linear(Address x, std::int64_t rows, std::int64_t inputs, std::int64_t outputs, Address packed,
                     int bits, Address codebook, int levels, Address scale, std::int64_t channels, Address y,
                     int threads) {
    adq::CodebookLinear args{};
    args.x = pointer<float>(x);
    args.rows = rows;
    args.inputs = inputs;
    args.outputs = outputs;
    args.packed = pointer<std::uint8_t>(packed);
    args.bits = bits;
    args.codebook = pointer<float>(codebook);
    args.levels = levels;
    args.scale = pointer<float>(scale);
    args.channels = channels;
    args.y = pointer<float>(y);
    adq::codebook_linear(args, threads);
}

// Bytes of the pool that go back to it with their last reference; torch.frombuffer makes a tensor of them.
class PoolBuffer {
 public:
    explicit PoolBuffer(std::size_t bytes) : bytes_(bytes), memory_(adq::pool_take(bytes)) {
        if (memory_ == nullptr) throw std::bad_alloc();
    }
    ~PoolBuffer() { adq::pool_give(memory_, bytes_); }
    PoolBuffer(const PoolBuffer&) = delete;
    PoolBuffer& operator=(const PoolBuffer&) = delete;

    py::buffer_info info() const {
        return py::buffer_info(static_cast<std::uint8_t*>(memory_), static_cast<py::ssize_t>(bytes_));
    }

 private:
    std::size_t bytes_;
    void* memory_;
};

using adq::Value;

py::object tensor_to_python(adq::TensorHandle tensor) {
    void* object;
    adq::check(adq::torch.torch_tensor_to_pyobject(tensor, nullptr, &object));
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

Value tensor_from_python(const py::handle& object) {
    adq::TensorHandle tensor;
    adq::check(adq::torch.torch_tensor_from_pyobject(object.ptr(), &tensor));
    return reinterpret_cast<Value>(tensor);
}

py::object to_python(Value value, char letter) {
    switch (letter) {
        case 't': return tensor_to_python(adq::as<adq::TensorHandle>(value));
        case 'o': return value == 0 ? py::none() : to_python(*reinterpret_cast<const Value*>(value), 't');
        case 'b': return py::bool_(adq::as<bool>(value));
        case 'i': return py::int_(adq::as<std::int64_t>(value));
        case 'f': return py::float_(adq::as<double>(value));
        default: break;
    }
    py::list list;
    for (const Value item : adq::items(value)) list.append(to_python(item, letter == 'l' ? 't' : 'i'));
    return list;
}

Value from_python(const py::handle& object, char letter) {
    if (letter == 't') return tensor_from_python(object);
    adq::ListHandle list;
    adq::check(adq::torch.torch_new_list_reserve_size(py::len(object), &list));
    for (const py::handle& item : object)
        adq::check(adq::torch.torch_list_push_back(list, tensor_from_python(item)));
    return reinterpret_cast<Value>(list);
}

// The Python function of each native operator, for the arguments that the operator leaves to it. They are
// never given back: torch may call them as long as the process lives.
PyObject* python_functions[adq::kNativeOperators];

void call_python(int index, const Value* arguments, Value* results) {
    const adq::NativeOperator& native = adq::kNative[index];
    const py::gil_scoped_acquire gil;
    py::tuple values(std::strlen(native.arguments));
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = to_python(arguments[i], native.arguments[i]);
    const py::object result = py::handle(python_functions[index])(*values);
    if (std::strlen(native.results) == 1) {
        results[0] = from_python(result, native.results[0]);
        return;
    }
    std::size_t i = 0;
    for (const py::handle& item : result) {
        results[i] = from_python(item, native.results[i]);
        ++i;
    }
}

template <int index>
void call_native(Value* stack, std::uint64_t, std::uint64_t count) {
    const adq::NativeOperator& native = adq::kNative[index];
    Value results[adq::kMaxResults];
    {
        const adq::HeldArguments held(stack, native.arguments);
        if (!native.run(stack, results)) call_python(index, stack, results);
    }
    std::copy(results, results + count, stack);
}

template <int... index>
constexpr std::array<adq::Kernel, sizeof...(index)> native_kernels(std::integer_sequence<int, index...>) {
    return {&call_native<index>...};
}

// Registers the native operators for CPU tensors, after which torch calls them itself. `addresses` has
// torch's functions by name, `functions` the operators' Python functions.
void register_native(const std::map<std::string, Address>& addresses,
                     const std::map<std::string, py::function>& functions) {
#define ADQ_SET(result, name, arguments) \
    adq::torch.name = reinterpret_cast<decltype(adq::torch.name)>(addresses.at(#name));
    ADQ_TORCH_FUNCTIONS(ADQ_SET)
#undef ADQ_SET
    static constexpr auto kernels = native_kernels(std::make_integer_sequence<int, adq::kNativeOperators>());
    adq::LibraryHandle library;
    adq::check(adq::torch.aoti_torch_library_init_impl("adq", "CPU", __FILE__, __LINE__, &library));
    for (int i = 0; i < adq::kNativeOperators; ++i) {
        const char* name = adq::kNative[i].name;
        python_functions[i] = py::object(functions.at(name)).release().ptr();
        adq::check(adq::torch.torch_library_impl(library, name, kernels[i], adq::kTorchVersion));
    }
}

std::vector<std::string> native_operators() {
    std::vector<std::string> names;
    for (const adq::NativeOperator& native : adq::kNative) names.emplace_back(native.name);
    return names;
}

std::vector<std::string> torch_functions() {
    return {
#define ADQ_NAME(result, name, arguments) #name,
        ADQ_TORCH_FUNCTIONS(ADQ_NAME)
#undef ADQ_NAME
    };
}

// SIGTERM ends this process if its parent has sent it, on whichever thread it arrives; Python does not see
// the sender.
void end_for_parent_only() {
#if defined(__unix__) || defined(__APPLE__)
    struct sigaction action = {};
    action.sa_sigaction = [](int, siginfo_t* info, void*) {
        if (info->si_pid == getppid()) _exit(0);
    };
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    sigemptyset(&action.sa_mask);
    sigaction(SIGTERM, &action, nullptr);
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    using NoGil = py::call_guard<py::gil_scoped_release>;
    module.doc() = "C++ kernels of adq; the interface for users is adq.backends.cpu.";
    module.def("codebook_lookup", &codebook_lookup, NoGil(),
               "(dtype, w, n, codebook, thresholds, levels, w_q, codes, count, total, threads)");
    module.def("quantize_layers", &quantize_layers, NoGil(),
               "([(dtype, w, outer, channels, inner, scale, codebook, levels, w_q)], threads)");
    module.def("step_layers", &step_layers, NoGil(),
               "(as quantize_layers, w_q may be null; [(ema_count, ema_total, rate, snap)], threads)");
    module.def("threshold_quantize", &threshold_quantize, NoGil(),
               "(dtype, x, n, start, interval, in_scale, out_scale, offset, intervals, steps, y, threads)");
    module.def(
        "threshold_quantize_backward", &threshold_quantize_backward, NoGil(),
        "(dtype, grad, x, n, start, interval, in_scale, out_scale, offset, intervals, steps, d_x, d_start, "
        "d_interval, d_in_scale, d_out_scale, threads)");
    module.def("threshold_levels", &threshold_levels, NoGil(),
               "(dtype, x, n, (start, interval, in_scale, intervals, steps, levels), threads)");
    module.def(
        "integer_conv2d", &integer_conv2d, NoGil(),
        "(x, (batch, channels, height, width), weight, table, table_levels, (initial, multiplier, bias, "
        "residual), y, (outputs, height, width), low, high, [as in threshold_levels], (kernel, stride, "
        "padding, dilation), groups, zero, threads)");
    module.def("pack_bits", &pack_bits, NoGil(), "(codes, n, bits, packed, threads)");
    module.def("unpack_bits", &unpack_bits, NoGil(), "(packed, bits, n, codes, threads)");
    module.def("codebook_decode", &codebook_decode, NoGil(),
               "(packed, bits, codebook, levels, scale, outer, channels, inner, w_q, threads)");
    module.def("codebook_linear", &codebook_linear, NoGil(),
               "(x, rows, inputs, outputs, packed, bits, codebook, levels, scale, channels, y, threads)");
    module.def("register_native", &register_native,
               "({name of a torch function: address}, {name of an operator: Python function})");
    module.def("native_operators", &native_operators,
               "Names of the operators that register_native registers.");
    module.def("torch_functions", &torch_functions, "Names of the functions that register_native needs.");
    module.attr("POOL_FROM") = adq::kPoolFrom;
    py::class_<PoolBuffer>(module, "PoolBuffer", py::buffer_protocol(),
                           "Bytes of the pool for large results.")
        .def(py::init<std::size_t>())
        .def_buffer(&PoolBuffer::info);
    module.def("has_pool", &adq::has_pool, "Whether this system has a pool for large results.");
    module.def("set_pool_limit", &adq::set_pool_limit, "Most bytes that may wait to be used again.");
    module.def("pool_idle", &adq::pool_idle, "Bytes that wait to be used again.");
    module.def("isa", &adq::isa, "Name of the instruction set in use.");
    module.def("available_isas", &adq::available_isas,
               "Names of the instruction sets this processor has, best first.");
    module.def("set_isa", &adq::set_isa, "Choose an instruction set; ValueError if it is not available.");
    module.def("end_for_parent_only", &end_for_parent_only,
               "Let SIGTERM end this process if it is from the parent, and ignore it otherwise.");
    module.def("openmp", &adq::has_openmp, "Whether the kernels were built with OpenMP.");
}
