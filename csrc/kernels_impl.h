// The kernel table of the instruction set ADQ_ISA; included once by each kernels_<isa>.cpp.
#pragma once

#include <type_traits>

#include "bits.h"
#include "kernels.h"
#include "levels.h"
#include "linear.h"
#include "scaled.h"
#include "slopes.h"
#include "steps.h"
#include "uniform.h"

namespace adq {
namespace ADQ_ISA {
namespace {

// Calls function with a null pointer of the element type that dtype names.
template <class Function>
void with_type(Dtype dtype, Function&& function) {
    switch (dtype) {
        case Dtype::kFloat32: return function(static_cast<float*>(nullptr));
        case Dtype::kBFloat16: return function(static_cast<BFloat16*>(nullptr));
        case Dtype::kFloat16: return function(static_cast<Float16*>(nullptr));
    }
}

void any_encode(Dtype dtype, float* values, int count) {
    with_type(dtype, [&](auto* type) {
        using T = typename std::remove_pointer<decltype(type)>::type;
        for (int i = 0; i < count; i += kWidth) {
            const Ints word = Storage<T>::encode(load_floats(values + i));
            std::memcpy(values + i, &word, sizeof word);
        }
    });
}

void any_steps(Dtype dtype, const StepTable& table, const void* x, std::int64_t n, void* y,
               std::uint8_t* codes, double* total, std::int64_t* count) {
    with_type(dtype, [&](auto* type) {
        using T = typename std::remove_pointer<decltype(type)>::type;
        steps<T>(table, static_cast<const T*>(x), n, static_cast<T*>(y), codes, total, count);
    });
}

void any_divide(Dtype dtype, const void* w, std::int64_t n, float scale, float* v) {
    with_type(dtype, [&](auto* type) {
        using T = typename std::remove_pointer<decltype(type)>::type;
        divide(static_cast<const T*>(w), n, scale, v);
    });
}

void any_multiply(Dtype dtype, const float* q, std::int64_t n, float scale, void* y) {
    with_type(dtype, [&](auto* type) {
        using T = typename std::remove_pointer<decltype(type)>::type;
        multiply(q, n, scale, static_cast<T*>(y));
    });
}

void any_products(Dtype dtype, const void* w, const float* q, std::int64_t n, double* sums) {
    with_type(dtype, [&](auto* type) {
        using T = typename std::remove_pointer<decltype(type)>::type;
        products(static_cast<const T*>(w), q, n, sums);
    });
}

void any_uniform(Dtype dtype, const UniformTable& table, const void* x, std::int64_t n, void* y,
                 std::uint8_t* levels) {
    with_type(dtype, [&](auto* type) {
        using T = typename std::remove_pointer<decltype(type)>::type;
        uniform<T>(table, static_cast<const T*>(x), n, static_cast<T*>(y), levels);
    });
}

void any_slopes(Dtype dtype, const SlopeTable& table, const void* grad, const void* x, std::int64_t n,
                void* d_x, SlopeSums* sums) {
    with_type(dtype, [&](auto* type) {
        using T = typename std::remove_pointer<decltype(type)>::type;
        slopes<T>(table, static_cast<const T*>(grad), static_cast<const T*>(x), n, static_cast<T*>(d_x),
                  sums);
    });
}

}  // namespace

extern const Kernels kKernels = {any_encode, any_steps, any_divide, any_multiply, any_products, any_uniform,
                                 any_slopes, pack,      unpack,     levels,       dots};

}  // namespace ADQ_ISA
}  // namespace adq
