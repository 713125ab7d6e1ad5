// Passes over one row of a weight, whose elements share a scale.
#pragma once

#include "groups.h"

namespace adq {
namespace ADQ_ISA {

// n is a multiple of 16 in the sweeps.
template <class T>
void sweep_divide(const T* w, std::int64_t n, float scale, float* v) {
    const Floats divisor = fill(scale);
    for (std::int64_t i = 0; i < n; i += kWidth) store(v + i, Storage<T>::load(w + i) / divisor);
}

template <class T>
void divide(const T* w, std::int64_t n, float scale, float* v) {
    sweep_divide(w, whole_groups(n), scale, v);
    if (whole_groups(n) == n) return;
    const InputTail<T> w_tail(w, n);
    OutputTail<float> v_tail(v, n);
    sweep_divide(w_tail.lane, kLanes, scale, v_tail.data());
    v_tail.copy();
}

template <class T>
void sweep_multiply(const float* q, std::int64_t n, float scale, T* y) {
    const Floats factor = fill(scale);
    for (std::int64_t i = 0; i < n; i += kWidth) store(y + i, load_floats(q + i) * factor);
}

template <class T>
void multiply(const float* q, std::int64_t n, float scale, T* y) {
    sweep_multiply(q, whole_groups(n), scale, y);
    if (whole_groups(n) == n) return;
    const InputTail<float> q_tail(q, n);
    OutputTail<T> y_tail(y, n);
    sweep_multiply(q_tail.lane, kLanes, scale, y_tail.data());
    y_tail.copy();
}

template <class T>
void sweep_products(const T* w, const float* q, std::int64_t n, LaneTotals<2>& totals) {
    for (std::int64_t i = 0; i < n;) {
        const std::int64_t end = n - i < kBlock ? n : i + kBlock;
        Floats sum[2][kParts];
        for (int p = 0; p < kParts; ++p) sum[0][p] = sum[1][p] = fill(0.0f);
        for (; i < end; i += kLanes) {
            unroll<kParts>([&](auto part) ADQ_INLINE_LAMBDA {
                const std::int64_t at = i + kWidth * part.value;
                const Floats value = load_floats(q + at);
                sum[0][part.value] = sum[0][part.value] + Storage<T>::load(w + at) * value;
                sum[1][part.value] = sum[1][part.value] + value * value;
            });
        }
        float lanes[2][kLanes];
        std::memcpy(lanes, sum, sizeof lanes);
        totals.add(lanes);
    }
}

template <class T>
void products(const T* w, const float* q, std::int64_t n, double* sums) {
    LaneTotals<2> totals;
    const std::int64_t whole = whole_groups(n);
    sweep_products(w, q, whole, totals);
    if (whole != n) {
        T w_tail[kLanes] = {};
        float q_tail[kLanes] = {};
        std::memcpy(w_tail, w + whole, (n - whole) * sizeof(T));
        std::memcpy(q_tail, q + whole, (n - whole) * sizeof(float));
        sweep_products(w_tail, q_tail, kLanes, totals);
    }
    totals.finish(sums);
}

}  // namespace ADQ_ISA
}  // namespace adq
