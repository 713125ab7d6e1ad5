// torch's tensors and lists, as operators read and make them.
#pragma once

#include <cstring>
#include <utility>
#include <vector>

#include "adq.h"
#include "torch_abi.h"

namespace adq {

// Throws std::runtime_error if a function of torch reported an error.
void check(Status status);

template <class T>
T as(Value value) {
    return static_cast<T>(static_cast<std::int64_t>(value));
}
template <>
inline bool as<bool>(Value value) {
    return (value & 0xff) != 0;
}
template <>
inline double as<double>(Value value) {
    double number;
    static_assert(sizeof number == sizeof value, "a double takes all bits of a value");
    std::memcpy(&number, &value, sizeof number);
    return number;
}
template <>
inline TensorHandle as<TensorHandle>(Value value) {
    return reinterpret_cast<TensorHandle>(value);
}
template <>
inline ListHandle as<ListHandle>(Value value) {
    return reinterpret_cast<ListHandle>(value);
}

// What a kernel must know of a tensor; valid as long as the tensor is.
struct View {
    explicit View(Value tensor);

    template <class T>
    T* pointer() const {
        return static_cast<T*>(data);
    }

    std::int32_t dtype;
    std::int64_t dim;
    std::int64_t numel;
    const std::int64_t* sizes;
    const std::int64_t* strides;
    void* data;
};

bool is_contiguous(const View& tensor);

// Whether the elements fill a stretch of memory, in whatever order of the dimensions.
bool is_dense(const View& tensor);

// Whether four dimensions [N, C, H, W] lie in memory as [N, H, W, C].
bool is_channels_last(const View& tensor);

bool same_layout(const View& a, const View& b);

// The kernels' name of a float dtype; false if it is none of theirs.
bool to_dtype(const View& tensor, Dtype& dtype);

// Contiguous float32 of one dimension.
bool is_table(const View& tensor);
bool is_scalar(const View& tensor);

// A new tensor, deleted unless it is released.
class NewTensor {
 public:
    NewTensor(std::int64_t dim, const std::int64_t* sizes, const std::int64_t* strides, std::int32_t dtype);
    NewTensor(std::int64_t size, std::int32_t dtype);  // of one dimension
    NewTensor(const View& like, std::int32_t dtype) : NewTensor(like.dim, like.sizes, like.strides, dtype) {}
    explicit NewTensor(const View& like) : NewTensor(like, like.dtype) {}
    NewTensor(NewTensor&& other) noexcept
        : handle_(std::exchange(other.handle_, nullptr)), data_(other.data_) {}
    NewTensor(const NewTensor&) = delete;
    NewTensor& operator=(const NewTensor&) = delete;
    NewTensor& operator=(NewTensor&&) = delete;
    ~NewTensor();

    template <class T>
    T* pointer() const {
        return static_cast<T*>(data_);
    }
    void* data() const { return data_; }
    Value release() { return reinterpret_cast<Value>(std::exchange(handle_, nullptr)); }

 private:
    TensorHandle handle_ = nullptr;
    void* data_ = nullptr;
};

// The items of a list, which keeps them.
std::vector<Value> items(Value list);
std::vector<View> views(Value list);

Value to_list(std::vector<NewTensor>& tensors);

// Delete a list, with the tensors in it or without.
void delete_list(Value list, bool tensors) noexcept;

}  // namespace adq
