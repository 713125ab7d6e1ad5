// The part of torch's stable C interface (torch/csrc/stable/c/shim.h, torch 2.14 and newer) that dispatch.cpp
// uses.
//
// Nothing of torch is included or linked: the functions are looked up by name in the torch that is running,
// so that one build serves every torch, and one without them is served from Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace adq {

struct TensorObject;
using TensorHandle = TensorObject*;
struct ListObject;
using ListHandle = ListObject*;
struct LibraryObject;
using LibraryHandle = LibraryObject*;

// An argument or a result: the bits of an int64, a double or a bool, or the handle of a tensor or a list.
// Handles belong to whoever holds the value.
using Value = std::uint64_t;
using Kernel = void (*)(Value* stack, std::uint64_t arguments, std::uint64_t results);
using Status = std::int32_t;  // 0: it went well

constexpr std::uint64_t kTorchVersion = std::uint64_t{2} << 56 | std::uint64_t{14}
                                                                     << 48;  // of the conventions

// NAME(result, name, arguments)
#define ADQ_TORCH_FUNCTIONS(NAME)                                                                           \
    NAME(std::int32_t, aoti_torch_device_type_cpu, ())                                                      \
    NAME(std::int32_t, aoti_torch_dtype_float32, ())                                                        \
    NAME(std::int32_t, aoti_torch_dtype_bfloat16, ())                                                       \
    NAME(std::int32_t, aoti_torch_dtype_float16, ())                                                        \
    NAME(std::int32_t, aoti_torch_dtype_uint8, ())                                                          \
    NAME(std::int32_t, aoti_torch_dtype_int8, ())                                                           \
    NAME(std::int32_t, aoti_torch_dtype_int32, ())                                                          \
    NAME(std::int32_t, aoti_torch_dtype_int64, ())                                                          \
    NAME(Status, aoti_torch_get_device_type, (TensorHandle, std::int32_t*))                                 \
    NAME(Status, aoti_torch_get_dtype, (TensorHandle, std::int32_t*))                                       \
    NAME(Status, aoti_torch_get_dim, (TensorHandle, std::int64_t*))                                         \
    NAME(Status, aoti_torch_get_numel, (TensorHandle, std::int64_t*))                                       \
    NAME(Status, aoti_torch_get_sizes, (TensorHandle, std::int64_t**))                                      \
    NAME(Status, aoti_torch_get_strides, (TensorHandle, std::int64_t**))                                    \
    NAME(Status, aoti_torch_get_data_ptr, (TensorHandle, void**))                                           \
    NAME(Status, aoti_torch_empty_strided,                                                                  \
         (std::int64_t, const std::int64_t*, const std::int64_t*, std::int32_t, std::int32_t, std::int32_t, \
          TensorHandle*))                                                                                   \
    NAME(Status, aoti_torch_delete_tensor_object, (TensorHandle))                                           \
    NAME(Status, torch_new_list_reserve_size, (std::size_t, ListHandle*))                                   \
    NAME(Status, torch_list_size, (ListHandle, std::size_t*))                                               \
    NAME(Status, torch_list_get_item, (ListHandle, std::size_t, Value*))                                    \
    NAME(Status, torch_list_push_back, (ListHandle, Value))                                                 \
    NAME(Status, torch_delete_list, (ListHandle))                                                           \
    NAME(Status, torch_delete_stable_ivalue, (Value*))                                                      \
    NAME(Status, torch_get_num_threads, (std::uint32_t*))                                                   \
    NAME(Status, torch_tensor_from_pyobject, (void*, TensorHandle*))                                        \
    NAME(Status, torch_tensor_to_pyobject, (TensorHandle, void*, void**))                                   \
    NAME(Status, aoti_torch_library_init_impl,                                                              \
         (const char*, const char*, const char*, std::uint32_t, LibraryHandle*))                            \
    NAME(Status, torch_library_impl, (LibraryHandle, const char*, Kernel, std::uint64_t))

struct TorchFunctions {
#define ADQ_MEMBER(result, name, arguments) result(*name) arguments;
    ADQ_TORCH_FUNCTIONS(ADQ_MEMBER)
#undef ADQ_MEMBER
};

// The functions of the torch that is running; all null until they have been set.
extern TorchFunctions torch;

}  // namespace adq
