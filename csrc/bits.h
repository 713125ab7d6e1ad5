// Packing of codes of kBits bits into a little-endian stream, eight codes (kBits bytes) at a time.
//
// Eight codes are the bytes of a 64-bit word; three folding steps bring their low bits together, pairs
// first, then fours, then all eight. Unpacking takes the same steps backwards. A vector of words is stored
// 16 bytes at a time, each store covering what the one before wrote beyond its own bytes; so vectors
// stop kSlack bytes before the end of the packed range, and single words do the rest.
#pragma once

#include "simd.h"

namespace adq {
namespace ADQ_ISA {

constexpr int kWordCodes = 8;
constexpr int kSlack = 16;
constexpr int kVectorCodes = sizeof(Words);

// Fields of 2 kField bits: two numbers of kBits bits, kField apart, become adjacent; and back.
template <int kBits, int kField, class W>
ADQ_INLINE W join(W word) {
    constexpr Word low = low_fields(kBits, 2 * kField);
    return (word & low) | ((word >> (kField - kBits)) & (low << kBits));
}
template <int kBits, int kField, class W>
ADQ_INLINE W split(W word) {
    constexpr Word low = low_fields(kBits, 2 * kField);
    return (word & low) | ((word & (low << kBits)) << (kField - kBits));
}

template <int kBits, class W>
ADQ_INLINE W fold(W word) {
    return join<4 * kBits, 32>(join<2 * kBits, 16>(join<kBits, 8>(word)));
}
template <int kBits, class W>
ADQ_INLINE W unfold(W word) {
    return split<kBits, 8>(split<2 * kBits, 16>(split<4 * kBits, 32>(word)));
}

#if ADQ_HAS_PERMUTE

// Byte shuffles of 16 bytes: the low kBits bytes of two words become adjacent; and back, clearing the others.
template <int kBits>
struct WordShuffle {
    std::int8_t close[16];
    std::int8_t spread[16];

    constexpr WordShuffle() : close(), spread() {
        for (int i = 0; i < 16; ++i) {
            close[i] = static_cast<std::int8_t>(i < 2 * kBits ? i / kBits * 8 + i % kBits : -1);
            spread[i] = static_cast<std::int8_t>(i % 8 < kBits ? i / 8 * kBits + i % 8 : -1);
        }
    }
};

ADQ_INLINE Words shuffle_bytes(Words words, const std::int8_t* order) {
    const __m128i pattern = _mm_loadu_si128((const __m128i*)order);
#if defined(__AVX512F__)
    return (Words)_mm512_shuffle_epi8((__m512i)words, _mm512_broadcast_i32x4(pattern));
#else
    return (Words)_mm256_shuffle_epi8((__m256i)words, _mm256_broadcastsi128_si256(pattern));
#endif
}

// The lowest bit of every byte.
ADQ_INLINE Word lowest_bits(Words words) {
#if defined(__AVX512F__)
    return _mm512_test_epi8_mask((__m512i)words, _mm512_set1_epi8(1));
#else
    return static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi64((__m256i)words, 7)));
#endif
}

template <int kBits>
ADQ_INLINE void store_words(std::uint8_t* packed, Words words) {
    static constexpr WordShuffle<kBits> order;
    words = shuffle_bytes(words, order.close);
    unroll<sizeof(Words) / 16>([&](auto lane) ADQ_INLINE_LAMBDA {
#if defined(__AVX512F__)
        const __m128i part = _mm512_extracti32x4_epi32((__m512i)words, lane.value);
#else
        const __m128i part = _mm256_extracti128_si256((__m256i)words, lane.value);
#endif
        _mm_storeu_si128((__m128i*)(packed + 2 * kBits * lane.value), part);
    });
}

template <int kBits>
ADQ_INLINE Words load_words(const std::uint8_t* packed) {
    static constexpr WordShuffle<kBits> order;
    const auto part = [&](int lane) ADQ_INLINE_LAMBDA {
        return _mm_loadu_si128((const __m128i*)(packed + 2 * kBits * lane));
    };
#if defined(__AVX512F__)
    __m512i words = _mm512_castsi128_si512(part(0));
    words = _mm512_inserti32x4(words, part(1), 1);
    words = _mm512_inserti32x4(words, part(2), 2);
    words = _mm512_inserti32x4(words, part(3), 3);
#else
    const __m256i words = _mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(1), 1);
#endif
    return shuffle_bytes((Words)words, order.spread);
}

#else

template <int kBits>
ADQ_INLINE void store_words(std::uint8_t* packed, Words words) {
    Word word[sizeof(Words) / 8];
    std::memcpy(word, &words, sizeof words);
    for (unsigned i = 0; i < sizeof(Words) / 8; ++i) std::memcpy(packed + kBits * i, word + i, 8);
}

template <int kBits>
ADQ_INLINE Words load_words(const std::uint8_t* packed) {
    Words words{};
    for (unsigned i = 0; i < sizeof(Words) / 8; ++i) {
        Word word;
        std::memcpy(&word, packed + kBits * i, sizeof word);
        set_word(words, i, word);
    }
    return words;
}

#endif

// How many of n codes are handled as vectors: their packed bytes and kSlack more lie in the range.
template <int kBits>
constexpr std::int64_t vector_codes(std::int64_t n) {
    const std::int64_t room = n * kBits / 8 - kSlack;
    return room < 0 ? 0 : room / (kVectorCodes / 8 * kBits) * kVectorCodes;
}

template <int kBits>
void pack_codes(const std::uint8_t* codes, std::int64_t n, std::uint8_t* packed) {
    std::int64_t i = 0;
    for (const std::int64_t end = vector_codes<kBits>(n); i < end; i += kVectorCodes) {
        Words words;
        std::memcpy(&words, codes + i, sizeof words);
        std::uint8_t* to = packed + i / kWordCodes * kBits;
#if ADQ_HAS_PERMUTE
        if constexpr (kBits == 1) {
            const Word bits = lowest_bits(words);
            std::memcpy(to, &bits, kVectorCodes / 8);
            continue;
        }
#endif
        store_words<kBits>(to, fold<kBits>(words));
    }
    for (; i < n; i += kWordCodes) {
        const int count = static_cast<int>(n - i < kWordCodes ? n - i : kWordCodes);
        Word word = 0;
        std::memcpy(&word, codes + i, count);
        word = fold<kBits>(word);
        std::memcpy(packed + i / kWordCodes * kBits, &word, (count * kBits + 7) / 8);
    }
}

template <int kBits>
void unpack_codes(const std::uint8_t* packed, std::int64_t n, std::uint8_t* codes) {
    std::int64_t i = 0;
    for (const std::int64_t end = vector_codes<kBits>(n); i < end; i += kVectorCodes) {
        const Words words = unfold<kBits>(load_words<kBits>(packed + i / kWordCodes * kBits));
        std::memcpy(codes + i, &words, sizeof words);
    }
    for (; i < n; i += kWordCodes) {
        const int count = static_cast<int>(n - i < kWordCodes ? n - i : kWordCodes);
        Word word = 0;
        std::memcpy(&word, packed + i / kWordCodes * kBits, (count * kBits + 7) / 8);
        word = unfold<kBits>(word);
        std::memcpy(codes + i, &word, count);
    }
}

inline void pack(const std::uint8_t* codes, std::int64_t n, int bits, std::uint8_t* packed) {
    switch (bits) {
        case 1: return pack_codes<1>(codes, n, packed);
        case 2: return pack_codes<2>(codes, n, packed);
        case 3: return pack_codes<3>(codes, n, packed);
        case 4: return pack_codes<4>(codes, n, packed);
        case 5: return pack_codes<5>(codes, n, packed);
        case 6: return pack_codes<6>(codes, n, packed);
        case 7: return pack_codes<7>(codes, n, packed);
        default: std::memcpy(packed, codes, static_cast<std::size_t>(n));
    }
}

inline void unpack(const std::uint8_t* packed, int bits, std::int64_t n, std::uint8_t* codes) {
    switch (bits) {
        case 1: return unpack_codes<1>(packed, n, codes);
        case 2: return unpack_codes<2>(packed, n, codes);
        case 3: return unpack_codes<3>(packed, n, codes);
        case 4: return unpack_codes<4>(packed, n, codes);
        case 5: return unpack_codes<5>(packed, n, codes);
        case 6: return unpack_codes<6>(packed, n, codes);
        case 7: return unpack_codes<7>(packed, n, codes);
        default: std::memcpy(codes, packed, static_cast<std::size_t>(n));
    }
}

}  // namespace ADQ_ISA
}  // namespace adq
