// Vectors of kWidth float or int32 lanes, the few operations the kernels need, and nothing else.
//
// Sixteen virtual lanes are kParts vectors: a kernel takes 16 elements at a time, so sums group the same
// elements whatever the instruction set. Compiled once per instruction set, in its own namespace ADQ_ISA.
#pragma once

#if defined(__GNUC__) && !defined(ADQ_PLAIN_VECTORS)
#include "simd_gnu.h"
#else
#include "simd_plain.h"
#endif

namespace adq {
namespace ADQ_ISA {

constexpr int kLanes = 16;
constexpr int kParts = kLanes / kWidth;

template <int kIndex>
struct Constant {
    static constexpr int value = kIndex;
};

// function(Constant<0>), .. function(Constant<count - 1>), unrolled.
template <int kCount, class Function>
ADQ_INLINE void unroll(Function&& function) {
    if constexpr (kCount > 0) {
        unroll<kCount - 1>(function);
        function(Constant<kCount - 1>{});
    }
}

ADQ_INLINE Floats load_floats(const float* from) {
    Floats out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

// table[index], lane by lane.
ADQ_INLINE Floats gather(const float* table, Ints index) {
#if defined(__AVX512F__)
    return _mm512_i32gather_ps((__m512i)index, table, 4);
#elif defined(__AVX2__)
    return _mm256_i32gather_ps(table, (__m256i)index, 4);
#else
    Floats out{};
    for (int i = 0; i < kWidth; ++i) out[i] = table[index[i]];
    return out;
#endif
}

#if defined(__AVX2__)
#define ADQ_HAS_PERMUTE 1

#if defined(__AVX512F__)
constexpr int kMaxRegisterTable = 256;
#else
constexpr int kMaxRegisterTable = 16;
#endif

// kCells floats in registers; pick(index) is table[index modulo max(kCells, kWidth)].
template <int kCells>
class RegisterTable {
 public:
    static constexpr int kRegisters = kCells < kWidth ? 1 : kCells / kWidth;

    explicit ADQ_INLINE RegisterTable(const float* table) {
        unroll<kRegisters>([&](auto p)
                               ADQ_INLINE_LAMBDA { part_[p.value] = load_floats(table + kWidth * p.value); });
    }

    ADQ_INLINE Floats pick(Ints index) const {
#if defined(__AVX512F__)
        if constexpr (kCells <= 16)
            return _mm512_permutexvar_ps((__m512i)index, part_[0]);
        else
            return pick_part<0, kRegisters>(index);
#else
        const Floats low = _mm256_permutevar8x32_ps(part_[0], (__m256i)index);
        if constexpr (kRegisters == 1) return low;
        const Floats high = _mm256_permutevar8x32_ps(part_[kRegisters - 1], (__m256i)index);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)index, 28)));
#endif
    }

 private:
#if defined(__AVX512F__)
    // From kCount registers: permutes of pairs, then selections by the higher bits of the index.
    template <int kFirst, int kCount>
    ADQ_INLINE Floats pick_part(Ints index) const {
        if constexpr (kCount == 2) {
            return _mm512_permutex2var_ps(part_[kFirst], (__m512i)index, part_[kFirst + 1]);
        } else {
            const Mask upper = _mm512_test_epi32_mask((__m512i)index, _mm512_set1_epi32(kCount / 2 * 16));
            return select(upper, pick_part<kFirst + kCount / 2, kCount / 2>(index),
                          pick_part<kFirst, kCount / 2>(index));
        }
    }
#endif

    Floats part_[kRegisters];
};
#else
#define ADQ_HAS_PERMUTE 0
#endif

}  // namespace ADQ_ISA
}  // namespace adq
