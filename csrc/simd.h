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

using Word = std::uint64_t;

// The low `width` bits of every field of `field` bits.
constexpr Word low_fields(int width, int field) {
    Word mask = 0;
    for (int at = 0; at < 64; at += field) mask |= ((Word{1} << width) - 1) << at;
    return mask;
}

ADQ_INLINE Floats load_floats(const float* from) {
    Floats out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

// The larger and the smaller one: b where they are equal or one of them is NaN.
ADQ_INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return select(greater(a, b), a, b);
#endif
}
ADQ_INLINE Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_min_ps(a, b);
#else
    return select(greater(b, a), a, b);
#endif
}

// The sum of the bytes, eight to a word.
ADQ_INLINE Words byte_sums(ByteLanes a) {
#if defined(__AVX512F__)
    return (Words)_mm512_sad_epu8((__m512i)a, _mm512_setzero_si512());
#elif defined(__AVX2__)
    return (Words)_mm256_sad_epu8((__m256i)a, _mm256_setzero_si256());
#else
    Words words;
    std::memcpy(&words, &a, sizeof words);
    words = (words & low_fields(8, 16)) + ((words >> 8) & low_fields(8, 16));
    words = (words & low_fields(16, 32)) + ((words >> 16) & low_fields(16, 32));
    return (words & low_fields(32, 64)) + (words >> 32);
#endif
}

// Ask for `count` elements that a sweep will soon read; the address need not be valid.
template <class T>
ADQ_INLINE void prefetch(const T* from, int count) {
#if defined(__GNUC__)
    for (std::size_t byte = 0; byte < count * sizeof(T); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(from) + byte);
#else
    (void)from, (void)count;
#endif
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

// table[index] of 16 bytes, byte by byte; 0 where the index is 255.
ADQ_INLINE ByteLanes look_up_bytes(const std::int8_t* table, ByteLanes index) {
    const __m128i pattern = _mm_loadu_si128((const __m128i*)table);
#if defined(__AVX512F__)
    return (ByteLanes)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(pattern), (__m512i)index);
#else
    return (ByteLanes)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(pattern), (__m256i)index);
#endif
}

// table[index modulo kWidth].
ADQ_INLINE Floats permute(Floats table, Ints index) {
#if defined(__AVX512F__)
    return _mm512_permutexvar_ps((__m512i)index, table);
#else
    return _mm256_permutevar8x32_ps(table, (__m256i)index);
#endif
}

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
