#include "tensors.h"

#include <algorithm>
#include <stdexcept>

namespace adq {

TorchFunctions torch{};

void check(Status status) {
    if (status != 0) throw std::runtime_error("adq: a function of torch's C interface failed");
}

View::View(Value value) {
    const auto tensor = as<TensorHandle>(value);
    std::int64_t *size_pointer, *stride_pointer;
    check(torch.aoti_torch_get_dtype(tensor, &dtype));
    check(torch.aoti_torch_get_dim(tensor, &dim));
    check(torch.aoti_torch_get_numel(tensor, &numel));
    check(torch.aoti_torch_get_sizes(tensor, &size_pointer));
    check(torch.aoti_torch_get_strides(tensor, &stride_pointer));
    check(torch.aoti_torch_get_data_ptr(tensor, &data));
    sizes = size_pointer;
    strides = stride_pointer;
}

namespace {

// Whether the elements lie without gaps, the innermost dimension first in `order(0), order(1), ...`.
template <typename Order>
bool is_packed(const View& tensor, Order order) {
    std::int64_t expected = 1;
    for (std::int64_t i = 0; i < tensor.dim; ++i) {
        const std::int64_t d = order(i);
        if (tensor.sizes[d] == 1) continue;
        if (tensor.strides[d] != expected) return false;
        expected *= tensor.sizes[d];
    }
    return true;
}

}  // namespace

bool is_contiguous(const View& tensor) {
    return is_packed(tensor, [&](std::int64_t i) { return tensor.dim - 1 - i; });
}

bool is_dense(const View& tensor) {
    std::int64_t expected = 1;
    while (expected < tensor.numel) {
        std::int64_t d = 0;
        while (d < tensor.dim && (tensor.sizes[d] == 1 || tensor.strides[d] != expected)) ++d;
        if (d == tensor.dim) return false;
        expected *= tensor.sizes[d];
    }
    return true;
}

bool is_channels_last(const View& tensor) {
    constexpr std::int64_t order[] = {1, 3, 2, 0};
    return tensor.dim == 4 && is_packed(tensor, [&](std::int64_t i) { return order[i]; });
}

bool same_layout(const View& a, const View& b) {
    return a.dim == b.dim && std::equal(a.sizes, a.sizes + a.dim, b.sizes) &&
           std::equal(a.strides, a.strides + a.dim, b.strides);
}

bool to_dtype(const View& tensor, Dtype& dtype) {
    if (tensor.dtype == torch.aoti_torch_dtype_float32())
        dtype = Dtype::kFloat32;
    else if (tensor.dtype == torch.aoti_torch_dtype_bfloat16())
        dtype = Dtype::kBFloat16;
    else if (tensor.dtype == torch.aoti_torch_dtype_float16())
        dtype = Dtype::kFloat16;
    else
        return false;
    return true;
}

bool is_table(const View& tensor) {
    return tensor.dim == 1 && tensor.dtype == torch.aoti_torch_dtype_float32() && is_contiguous(tensor);
}

bool is_scalar(const View& tensor) { return is_table(tensor) && tensor.numel == 1; }

NewTensor::NewTensor(std::int64_t dim, const std::int64_t* sizes, const std::int64_t* strides,
                     std::int32_t dtype) {
    const std::int32_t cpu = torch.aoti_torch_device_type_cpu();
    check(torch.aoti_torch_empty_strided(dim, sizes, strides, dtype, cpu, 0, &handle_));
    check(torch.aoti_torch_get_data_ptr(handle_, &data_));
}

NewTensor::NewTensor(std::int64_t size, std::int32_t dtype) {
    const std::int64_t stride = 1;
    NewTensor tensor(1, &size, &stride, dtype);
    std::swap(handle_, tensor.handle_);
    data_ = tensor.data_;
}

NewTensor::~NewTensor() {
    if (handle_ != nullptr) torch.aoti_torch_delete_tensor_object(handle_);
}

std::vector<Value> items(Value list) {
    std::size_t size;
    check(torch.torch_list_size(as<ListHandle>(list), &size));
    std::vector<Value> values(size);
    for (std::size_t i = 0; i < size; ++i)
        check(torch.torch_list_get_item(as<ListHandle>(list), i, &values[i]));
    return values;
}

std::vector<View> views(Value list) {
    std::vector<View> tensors;
    for (const Value item : items(list)) tensors.emplace_back(item);
    return tensors;
}

Value to_list(std::vector<NewTensor>& tensors) {
    ListHandle list;
    check(torch.torch_new_list_reserve_size(tensors.size(), &list));
    for (NewTensor& tensor : tensors) check(torch.torch_list_push_back(list, tensor.release()));
    return reinterpret_cast<Value>(list);
}

void delete_list(Value list, bool tensors) noexcept {
    std::size_t size = 0;
    if (tensors) torch.torch_list_size(as<ListHandle>(list), &size);
    for (std::size_t i = 0; i < size; ++i) {
        Value item;
        if (torch.torch_list_get_item(as<ListHandle>(list), i, &item) == 0)
            torch.aoti_torch_delete_tensor_object(as<TensorHandle>(item));
    }
    torch.torch_delete_list(as<ListHandle>(list));
}

}  // namespace adq
