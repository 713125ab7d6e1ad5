// Loads and stores of float32, bfloat16 and float16 elements, as kWidth float lanes.
#pragma once

#include "simd.h"

namespace adq {
namespace ADQ_ISA {

struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

// encode() gives the element in the low bits of each lane; what is above them does not matter.
template <class T>
struct Storage;

template <>
struct Storage<float> {
    static constexpr std::int32_t kNan = 0x7fc00000;
    static ADQ_INLINE Floats load(const float* from) { return load_floats(from); }
    static ADQ_INLINE void store_bits(float* to, Ints word) { std::memcpy(to, &word, sizeof word); }
    static ADQ_INLINE Ints encode(Floats a) { return bits(a); }
};

template <>
struct Storage<BFloat16> {
    static constexpr std::int32_t kNan = 0x7fc0;
    static ADQ_INLINE Floats load(const BFloat16* from) { return from_bits(widen(&from->bits) << 16); }
    static ADQ_INLINE void store_bits(BFloat16* to, Ints word) { narrow(&to->bits, word); }
    static ADQ_INLINE Ints encode(Floats a) {
        const Ints word = bits(a);
        const Ints high = word >> 16;
        const Ints rounded = (word + ((high & 1) + 0x7fff)) >> 16;
        return select(is_number(a), rounded, high | 0x40);
    }
};

template <>
struct Storage<Float16> {
    static constexpr std::int32_t kNan = 0x7e00;
    static ADQ_INLINE void store_bits(Float16* to, Ints word) { narrow(&to->bits, word); }

#if defined(__AVX512F__)
    static ADQ_INLINE Floats load(const Float16* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static ADQ_INLINE Ints encode(Floats a) {
        return (Ints)_mm512_cvtepu16_epi32(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    }
#elif defined(__F16C__)
    static ADQ_INLINE Floats load(const Float16* from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static ADQ_INLINE Ints encode(Floats a) {
        return (Ints)_mm256_cvtepu16_epi32(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    }
#else
    // Shifted into place, a float16 is a float32 whose exponent is 112 too small.
    static ADQ_INLINE Floats load(const Float16* from) {
        const Ints half = widen(&from->bits);
        const Ints magnitude = (half & 0x7fff) << 13;
        const Ints scaled = bits(from_bits(magnitude) * 0x1p112f);
        const Ints special = greater(magnitude, fill(0x0f7fffff)) & 0x7f800000;
        return from_bits(scaled | special | ((half & 0x8000) << 16));
    }
    // Normal results round by integer addition; subnormal ones by adding 0.5, whose last bit is theirs.
    static ADQ_INLINE Ints encode(Floats a) {
        const Ints magnitude = bits(a) & 0x7fffffff;
        const Ints sign = (bits(a) >> 16) & 0x8000;
        const Ints odd = (magnitude >> 13) & 1;
        const Ints normal = (magnitude + odd + (0xfff - (112 << 23))) >> 13;
        const Ints small = bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
        Ints half = select(greater(fill(0x38800000), magnitude), small, normal);
        half = select(greater(magnitude, fill(0x477fffff)), fill(0x7c00), half);
        const Ints nan = ((magnitude >> 13) & 0x3ff) | 0x7e00;
        return sign | select(greater(magnitude, fill(0x7f800000)), nan, half);
    }
#endif
};

// Stores elements given as their bits. A result too large for the caches goes past them, so that its lines
// are not read before they are written.
template <class T>
class Output {
 public:
    // Whole vectors from an aligned address can pass the caches, `stream` says whether they shall.
    ADQ_INLINE Output(T* to, bool stream)
        : to_(to), stream_(stream && reinterpret_cast<std::uintptr_t>(to) % kLineBytes == 0) {}
    ADQ_INLINE ~Output() {
        if (stream_) finish_streams();
    }

    ADQ_INLINE bool wanted() const { return to_ != nullptr; }
    ADQ_INLINE void put(std::int64_t at, Ints word) const {
        if (stream_)
            stream_bits(to_ + at, word);
        else
            Storage<T>::store_bits(to_ + at, word);
    }

 private:
    static constexpr int kLineBytes = 64;

#if defined(__AVX512F__)
    static ADQ_INLINE void stream_bits(T* to, Ints word) {
        if constexpr (sizeof(T) == 4)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)word);
        else
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)word));
    }
    static ADQ_INLINE void finish_streams() { _mm_sfence(); }
#elif defined(__AVX2__)
    static ADQ_INLINE void stream_bits(T* to, Ints word) {
        if constexpr (sizeof(T) == 4)
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)word);
        else
            Storage<T>::store_bits(to, word);
    }
    static ADQ_INLINE void finish_streams() { _mm_sfence(); }
#else
    static ADQ_INLINE void stream_bits(T* to, Ints word) { Storage<T>::store_bits(to, word); }
    static ADQ_INLINE void finish_streams() {}
#endif

    T* to_;
    bool stream_;
};

template <class T>
ADQ_INLINE void store(T* to, Floats a) {
    Storage<T>::store_bits(to, Storage<T>::encode(a));
}

}  // namespace ADQ_ISA
}  // namespace adq
