// Partial groups: the last elements of a range, when they do not fill the 16 lanes, pass through buffers.
#pragma once

#include "storage.h"

namespace adq {
namespace ADQ_ISA {

// Sums leave float32 lanes for doubles every kBlock elements.
constexpr std::int64_t kBlock = 2048;

inline std::int64_t whole_groups(std::int64_t n) { return n / kLanes * kLanes; }

// The last elements of an input, padded with NaN, which no sum counts.
template <class T>
struct InputTail {
    T lane[kLanes];

    InputTail(const T* from, std::int64_t n) {
        for (int p = 0; p < kParts; ++p) Storage<T>::store_bits(lane + kWidth * p, fill(Storage<T>::kNan));
        std::memcpy(lane, from + whole_groups(n), (n - whole_groups(n)) * sizeof(T));
    }
};

// A buffer for the last elements of an output; null if the output is.
template <class T>
class OutputTail {
 public:
    OutputTail(T* to, std::int64_t n) : to_(to), n_(n) {}
    T* data() { return to_ != nullptr ? lane_ : nullptr; }
    void copy() const {
        if (to_ != nullptr) std::memcpy(to_ + whole_groups(n_), lane_, (n_ - whole_groups(n_)) * sizeof(T));
    }

 private:
    T lane_[kLanes];
    T* to_;
    std::int64_t n_;
};

// The lanes of a vector, one by one.
struct Lanes {
    union {
        float real[kWidth];
        std::int32_t number[kWidth];
    };
    explicit ADQ_INLINE Lanes(Floats a) { std::memcpy(real, &a, sizeof a); }
    explicit ADQ_INLINE Lanes(Ints a) { std::memcpy(number, &a, sizeof a); }
};

// sums[k] += lanes[0][k] + lanes[1][k] + .., one lane after the other; rows are kRow entries long.
template <int kRow, class Lane, class Sum>
inline void add_rows(const Lane (*lanes)[kRow], int count, Sum* sums) {
    for (int l = 0; l < kLanes; ++l) {
        for (int k = 0; k < count; ++k) sums[k] += lanes[l][k];
    }
}

// kRows sums of 16 lanes each, in double, which float32 lanes are added to block by block.
template <int kRows>
class LaneTotals {
 public:
    LaneTotals() { std::memset(total_, 0, sizeof total_); }

    ADQ_INLINE void add(const float (*lanes)[kLanes]) {
        for (int k = 0; k < kRows; ++k) {
            for (int l = 0; l < kLanes; ++l) total_[k][l] += lanes[k][l];
        }
    }

    // sums[k] += the lanes of row k, one after the other.
    void finish(double* sums) const {
        for (int l = 0; l < kLanes; ++l) {
            for (int k = 0; k < kRows; ++k) sums[k] += total_[k][l];
        }
    }

 private:
    double total_[kRows][kLanes];
};

}  // namespace ADQ_ISA
}  // namespace adq
