// The activation quantizer with one interval for all steps, in closed form:
// q = clamp(ceil((u - start) / width - 0.5), 0, steps), y = out_scale * (step * q - offset).
#pragma once

#include "groups.h"
#include "kernels.h"

namespace adq {
namespace ADQ_ISA {

struct UniformLevel {
    const Floats start, width, steps;

    explicit ADQ_INLINE UniformLevel(const UniformTable& table)
        : start(fill(table.start)), width(fill(table.width)), steps(fill(table.steps)) {}

    // The position whose ceiling, clamped, is the level.
    ADQ_INLINE Floats position(Floats u) const { return (u - start) / width - fill(0.5f); }

    // Clamping first keeps the conversion in range; NaN gives 0.
    ADQ_INLINE Floats level(Floats position) const {
        Floats v = only_where(greater(position, fill(0.0f)), position);
        v = select(greater(v, steps), steps, v);
        const Floats floor = to_float(truncate(v));
        return add_where(floor, greater(v, floor), fill(1.0f));
    }
};

// n is a multiple of 16.
template <class T>
void sweep_uniform(const UniformTable& table, const T* x, std::int64_t n, T* y, std::uint8_t* levels) {
    const UniformLevel level(table);
    const Floats scale = fill(table.scale), out_scale = fill(table.out_scale);
    const Floats step = fill(table.step), offset = fill(table.offset);
    const Output<T> out(y, table.stream);
    for (std::int64_t i = 0; i < n; i += kWidth) {
        const Floats position = level.position(Storage<T>::load(x + i) * scale);
        const Floats q = level.level(position);
        if (levels != nullptr) narrow(levels + i, truncate(q));
        if (!out.wanted()) continue;
        const Ints word = Storage<T>::encode(out_scale * (step * q - offset));
        out.put(i, select(is_number(position), word, fill(Storage<T>::kNan)));
    }
}

template <class T>
void uniform(const UniformTable& table, const T* x, std::int64_t n, T* y, std::uint8_t* levels) {
    sweep_uniform(table, x, whole_groups(n), y, levels);
    if (whole_groups(n) == n) return;
    const InputTail<T> x_tail(x, n);
    OutputTail<T> y_tail(y, n);
    OutputTail<std::uint8_t> levels_tail(levels, n);
    sweep_uniform(table, x_tail.lane, kLanes, y_tail.data(), levels_tail.data());
    y_tail.copy();
    levels_tail.copy();
}

}  // namespace ADQ_ISA
}  // namespace adq
