// Products of four uint8 with four int8, added to an int32 lane: exact on every instruction set.
//
// With VNNI that is one instruction. Elsewhere the bytes become 16-bit numbers, the even ones and the odd
// ones, whose products are added in pairs: the 8-bit instruction of AVX2 and AVX-512 (vpmaddubsw) saturates.
// Levels of a few bits do not let it: AVX2 then has products of bytes, and adds them in 16 bits for a while.
//
// A way to multiply has Quads, four levels in every lane, which add their products with kSplit vectors of
// weights to a part of a sum; split() makes these of a vector of bytes, total() a sum of the part.
#pragma once

#include "simd.h"

#if defined(__SSE2__) && defined(__GNUC__) && !defined(ADQ_PLAIN_VECTORS)
#include <emmintrin.h>
#endif

namespace adq {
namespace ADQ_ISA {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

// Any levels and weights.
struct AnyBytes {
    static constexpr int kSplit = 1;

    struct Quads {
        Ints word;
        explicit ADQ_INLINE Quads(Ints bytes) : word(bytes) {}
        ADQ_INLINE Ints add_dot(Ints sum, const Ints* weights) const {
#if defined(__AVX512VNNI__)
            return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)word, (__m512i)weights[0]);
#else
            return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)word, (__m256i)weights[0]);
#endif
        }
    };

    static ADQ_INLINE void split(Ints bytes, Ints* to) { to[0] = bytes; }
    static ADQ_INLINE Ints total(Ints part) { return part; }
};

#else

// Products of signed 16-bit numbers, added in pairs.
ADQ_INLINE Ints multiply_pairs(Ints a, Ints b) {
#if defined(__AVX512BW__)
    return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && defined(__GNUC__) && !defined(ADQ_PLAIN_VECTORS)
    return (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Any levels and weights.
struct AnyBytes {
    static constexpr int kSplit = 2;

    struct Quads {
        Ints even, odd;
        explicit ADQ_INLINE Quads(Ints bytes) : even(bytes & 0x00ff00ff), odd((bytes >> 8) & 0x00ff00ff) {}
        ADQ_INLINE Ints add_dot(Ints sum, const Ints* weights) const {
            return sum + (multiply_pairs(even, weights[0]) + multiply_pairs(odd, weights[1]));
        }
    };

    // Bytes 0 and 2, and bytes 1 and 3, as 16-bit numbers.
    static ADQ_INLINE void split(Ints bytes, Ints* to) {
        to[0] = (((bytes << 24) >> 24) & 0xffff) | ((((bytes << 8) >> 24)) << 16);
        to[1] = (((bytes << 16) >> 24) & 0xffff) | ((bytes >> 24) << 16);
    }
    static ADQ_INLINE Ints total(Ints part) { return part; }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
#define ADQ_HAS_SMALL_BYTES 1

// Levels and weights of which some steps fit 16-bit sums (Strip::steps_held).
struct SmallBytes {
    static constexpr int kSplit = 1;

    struct Quads {
        Ints word;
        explicit ADQ_INLINE Quads(Ints bytes) : word(bytes) {}
        ADQ_INLINE Ints add_dot(Ints part, const Ints* weights) const {
            const __m256i pairs = _mm256_maddubs_epi16((__m256i)word, (__m256i)weights[0]);
            return (Ints)_mm256_add_epi16((__m256i)part, pairs);
        }
    };

    static ADQ_INLINE void split(Ints bytes, Ints* to) { to[0] = bytes; }
    static ADQ_INLINE Ints total(Ints part) { return multiply_pairs(part, fill(0x00010001)); }
};

#endif

#endif

// The four bytes in every lane.
template <class Products>
ADQ_INLINE typename Products::Quads broadcast_quads(const std::uint8_t* from) {
    std::int32_t word;
    std::memcpy(&word, from, sizeof word);
    return typename Products::Quads(fill(word));
}

ADQ_INLINE Ints load_ints(const void* from) {
    Ints out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
ADQ_INLINE void store_ints(void* to, Ints a) { std::memcpy(to, &a, sizeof a); }

// Numbers of 0 .. 255 as bytes, one vector after the other.
template <int kVectors>
ADQ_INLINE void narrow_all(std::uint8_t* to, const Ints* from) {
#if defined(__AVX512F__)
    static_assert(kVectors <= 4, "they fill one register at most");
    __m512i part[4] = {};
    unroll<kVectors>([&](auto v) ADQ_INLINE_LAMBDA { part[v.value] = (__m512i)from[v.value]; });
    // Each quarter of `bytes` holds four bytes of every vector.
    const __m512i bytes =
        _mm512_packus_epi16(_mm512_packus_epi32(part[0], part[1]), _mm512_packus_epi32(part[2], part[3]));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i sorted = _mm512_permutexvar_epi32(order, bytes);
    if constexpr (kVectors == 4) {
        _mm512_storeu_si512(to, sorted);
    } else {
        if constexpr (kVectors == 1) _mm_storeu_si128((__m128i*)to, _mm512_castsi512_si128(sorted));
        if constexpr (kVectors >= 2) _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(sorted));
        if constexpr (kVectors == 3)
            _mm_storeu_si128((__m128i*)(to + 32), _mm512_extracti32x4_epi32(sorted, 2));
    }
#else
    unroll<kVectors>([&](auto v) ADQ_INLINE_LAMBDA { narrow(to + kWidth * v.value, from[v.value]); });
#endif
}

}  // namespace ADQ_ISA
}  // namespace adq
