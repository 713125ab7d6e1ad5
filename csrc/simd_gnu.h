// Vectors by the vector extensions of GCC and Clang; AVX-512 has its mask registers, the others lane masks.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define ADQ_INLINE inline __attribute__((always_inline))
#define ADQ_INLINE_LAMBDA __attribute__((always_inline))

namespace adq {
namespace ADQ_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef std::uint16_t Shorts __attribute__((vector_size(2 * kWidth)));
typedef std::uint8_t Bytes __attribute__((vector_size(kWidth)));
typedef std::int8_t ByteLanes __attribute__((vector_size(4 * kWidth)));
typedef std::uint64_t Words __attribute__((vector_size(4 * kWidth)));
typedef float Pair __attribute__((vector_size(8)));

ADQ_INLINE void set_word(Words& words, int i, std::uint64_t value) { words[i] = value; }
ADQ_INLINE Floats fill(float value) { return value - Floats{}; }
ADQ_INLINE Ints fill(std::int32_t value) { return value - Ints{}; }
ADQ_INLINE Ints bits(Floats a) { return (Ints)a; }
ADQ_INLINE Floats from_bits(Ints a) { return (Floats)a; }
ADQ_INLINE Floats to_float(Ints a) { return __builtin_convertvector(a, Floats); }
ADQ_INLINE Ints truncate(Floats a) { return __builtin_convertvector(a, Ints); }

// Of kWidth integers of 16 or 8 bits, and to them (their low bits).
#if defined(__AVX512F__)
ADQ_INLINE Ints widen(const std::uint8_t* from) {
    return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
}
ADQ_INLINE Ints widen(const std::uint16_t* from) {
    return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
}
ADQ_INLINE void narrow(std::uint16_t* to, Ints a) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)a));
}
ADQ_INLINE void narrow(std::uint8_t* to, Ints a) {
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)a));
}
#elif defined(__AVX2__)
ADQ_INLINE Ints widen(const std::uint8_t* from) {
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
}
ADQ_INLINE Ints widen(const std::uint16_t* from) {
    return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
}
ADQ_INLINE void narrow(std::uint16_t* to, Ints a) {
    const __m256i low_halves = _mm256_set1_epi64x(0x0d0c090805040100);
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)a, low_halves), 0x08);
    _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(halves));
}
ADQ_INLINE void narrow(std::uint8_t* to, Ints a) {
    const __m256i bytes = _mm256_shuffle_epi8((__m256i)a, _mm256_set1_epi32(0x0c080400));
    const __m128i upper = _mm256_extracti128_si256(bytes, 1);
    _mm_storel_epi64((__m128i*)to, _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), upper));
}
#else
ADQ_INLINE Ints widen(const std::uint8_t* from) {
    Bytes small;
    std::memcpy(&small, from, sizeof small);
    return __builtin_convertvector(small, Ints);
}
ADQ_INLINE Ints widen(const std::uint16_t* from) {
    Shorts small;
    std::memcpy(&small, from, sizeof small);
    return __builtin_convertvector(small, Ints);
}
ADQ_INLINE void narrow(std::uint16_t* to, Ints a) {
    const Shorts small = __builtin_convertvector(a, Shorts);
    std::memcpy(to, &small, sizeof small);
}
ADQ_INLINE void narrow(std::uint8_t* to, Ints a) {
    const Bytes small = __builtin_convertvector(a, Bytes);
    std::memcpy(to, &small, sizeof small);
}
#endif

#if defined(__AVX512F__)

using Mask = __mmask16;

ADQ_INLINE Mask greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
ADQ_INLINE Mask greater(Ints a, Ints b) { return _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b); }
ADQ_INLINE Mask equal(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
ADQ_INLINE Mask is_number(Floats a) { return _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q); }
ADQ_INLINE Mask and_not(Mask yes, Mask no) { return _kandn_mask16(no, yes); }
ADQ_INLINE Floats select(Mask mask, Floats yes, Floats no) { return _mm512_mask_blend_ps(mask, no, yes); }
ADQ_INLINE Ints select(Mask mask, Ints yes, Ints no) {
    return (Ints)_mm512_mask_blend_epi32(mask, (__m512i)no, (__m512i)yes);
}
ADQ_INLINE Floats only_where(Mask mask, Floats a) { return _mm512_maskz_mov_ps(mask, a); }
ADQ_INLINE Floats add_where(Floats a, Mask mask, Floats b) { return _mm512_mask_add_ps(a, mask, a, b); }
ADQ_INLINE Ints add_where(Ints a, Mask mask, Ints b) {
    return (Ints)_mm512_mask_add_epi32((__m512i)a, mask, (__m512i)a, (__m512i)b);
}
ADQ_INLINE ByteLanes count_equal(ByteLanes count, ByteLanes a, std::int8_t value) {
    const __mmask64 equal = _mm512_cmpeq_epi8_mask((__m512i)a, _mm512_set1_epi8(value));
    return (ByteLanes)_mm512_mask_sub_epi8((__m512i)count, equal, (__m512i)count, _mm512_set1_epi8(-1));
}

#else

using Mask = Ints;

ADQ_INLINE Mask greater(Floats a, Floats b) { return a > b; }
ADQ_INLINE Mask greater(Ints a, Ints b) { return a > b; }
ADQ_INLINE Mask equal(Ints a, Ints b) { return a == b; }
ADQ_INLINE Mask is_number(Floats a) { return a == a; }
ADQ_INLINE Mask and_not(Mask yes, Mask no) { return yes & ~no; }
ADQ_INLINE Floats select(Mask mask, Floats yes, Floats no) { return mask ? yes : no; }
ADQ_INLINE Ints select(Mask mask, Ints yes, Ints no) { return mask ? yes : no; }
ADQ_INLINE Floats only_where(Mask mask, Floats a) { return from_bits(mask & bits(a)); }
ADQ_INLINE Floats add_where(Floats a, Mask mask, Floats b) { return a + only_where(mask, b); }
ADQ_INLINE Ints add_where(Ints a, Mask mask, Ints b) { return a + (mask & b); }
ADQ_INLINE ByteLanes count_equal(ByteLanes count, ByteLanes a, std::int8_t value) {
    return count - (a == value);
}

#endif

}  // namespace ADQ_ISA
}  // namespace adq
