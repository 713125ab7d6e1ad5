// The vectors of simd_gnu.h for compilers without vector extensions: four lanes in plain loops.
#pragma once

#include <cstdint>
#include <cstring>

#define ADQ_INLINE inline
#define ADQ_INLINE_LAMBDA

namespace adq {
namespace ADQ_ISA {

constexpr int kWidth = 4;

template <class Lane>
struct Vector {
    Lane lane[kWidth];
    Lane operator[](int i) const { return lane[i]; }
    Lane& operator[](int i) { return lane[i]; }
};

using Floats = Vector<float>;
using Ints = Vector<std::int32_t>;
using Mask = Ints;
using Words = Vector<std::uint64_t>;
struct Pair {
    float lane[2];
};
inline Pair operator+(Pair a, Pair b) { return {{a.lane[0] + b.lane[0], a.lane[1] + b.lane[1]}}; }

inline void set_word(Words& words, int i, std::uint64_t value) { words.lane[i] = value; }

struct ByteLanes {
    std::int8_t lane[sizeof(Words)];
};

template <class To, class From, class Function>
inline Vector<To> map(const Vector<From>& a, const Vector<From>& b, Function function) {
    Vector<To> out;
    for (int i = 0; i < kWidth; ++i) out.lane[i] = function(a.lane[i], b.lane[i]);
    return out;
}

template <class Lane>
inline Vector<Lane> fill(Lane value) {
    Vector<Lane> out;
    for (int i = 0; i < kWidth; ++i) out.lane[i] = value;
    return out;
}

#define ADQ_OPERATOR(op, Lane)                                                      \
    inline Vector<Lane> operator op(const Vector<Lane>& a, const Vector<Lane>& b) { \
        return map<Lane>(a, b, [](Lane x, Lane y) -> Lane { return x op y; });      \
    }                                                                               \
    inline Vector<Lane> operator op(const Vector<Lane>& a, Lane b) { return a op fill(b); }
ADQ_OPERATOR(+, float)
ADQ_OPERATOR(-, float)
ADQ_OPERATOR(*, float)
ADQ_OPERATOR(/, float)
ADQ_OPERATOR(+, std::int32_t)
ADQ_OPERATOR(-, std::int32_t)
ADQ_OPERATOR(*, std::int32_t)
ADQ_OPERATOR(&, std::int32_t)
ADQ_OPERATOR(|, std::int32_t)
ADQ_OPERATOR(<<, std::int32_t)
ADQ_OPERATOR(>>, std::int32_t)
ADQ_OPERATOR(+, std::uint64_t)
ADQ_OPERATOR(&, std::uint64_t)
ADQ_OPERATOR(|, std::uint64_t)
ADQ_OPERATOR(<<, std::uint64_t)
ADQ_OPERATOR(>>, std::uint64_t)
#undef ADQ_OPERATOR

template <class To, class From>
inline Vector<To> copy_bits(const Vector<From>& a) {
    Vector<To> out;
    std::memcpy(&out, &a, sizeof out);
    return out;
}
inline Ints bits(const Floats& a) { return copy_bits<std::int32_t>(a); }
inline Floats from_bits(const Ints& a) { return copy_bits<float>(a); }

template <class To, class From>
inline Vector<To> convert(const Vector<From>& a) {
    return map<To>(a, a, [](From x, From) { return static_cast<To>(x); });
}
inline Floats to_float(const Ints& a) { return convert<float>(a); }
inline Ints truncate(const Floats& a) { return convert<std::int32_t>(a); }

template <class Lane>
inline Ints widen(const Lane* from) {
    Ints out;
    for (int i = 0; i < kWidth; ++i) out.lane[i] = from[i];
    return out;
}

template <class Lane>
inline void narrow(Lane* to, const Ints& a) {
    for (int i = 0; i < kWidth; ++i) to[i] = static_cast<Lane>(a.lane[i]);
}

template <class Lane>
inline Mask greater(const Vector<Lane>& a, const Vector<Lane>& b) {
    return map<std::int32_t>(a, b, [](Lane x, Lane y) { return x > y ? -1 : 0; });
}
template <class Lane>
inline Mask equal(const Vector<Lane>& a, const Vector<Lane>& b) {
    return map<std::int32_t>(a, b, [](Lane x, Lane y) { return x == y ? -1 : 0; });
}
inline Mask is_number(const Floats& a) { return equal(a, a); }
inline Mask and_not(const Mask& yes, const Mask& no) {
    return map<std::int32_t>(yes, no, [](std::int32_t x, std::int32_t y) { return x & ~y; });
}
inline Ints select(const Mask& mask, const Ints& yes, const Ints& no) {
    return (mask & yes) | and_not(no, mask);
}
inline Floats select(const Mask& mask, const Floats& yes, const Floats& no) {
    return from_bits(select(mask, bits(yes), bits(no)));
}
inline Floats only_where(const Mask& mask, const Floats& a) { return from_bits(mask & bits(a)); }
inline Floats add_where(const Floats& a, const Mask& mask, const Floats& b) {
    return a + only_where(mask, b);
}
inline Ints add_where(const Ints& a, const Mask& mask, const Ints& b) { return a + (mask & b); }
inline ByteLanes count_equal(ByteLanes count, const ByteLanes& a, std::int8_t value) {
    for (std::size_t i = 0; i < sizeof(Words); ++i) count.lane[i] += a.lane[i] == value ? 1 : 0;
    return count;
}

}  // namespace ADQ_ISA
}  // namespace adq
