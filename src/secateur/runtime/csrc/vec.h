// Vectors of floats, by the compiler's own vector types: one source for every instruction set. SCT_ISA names the
// namespace, SCT_LANES says how many floats a register holds; both come from the build.
#pragma once
#ifdef __AVX2__
#include <immintrin.h>
#endif
#include <cstdint>
#include <cstring>
#include <utility>

namespace sct {
namespace SCT_ISA {

constexpr int LANES = SCT_LANES;

typedef float Vec __attribute__((vector_size(SCT_LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(SCT_LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(SCT_LANES * 2)));
typedef int16_t Shorts __attribute__((vector_size(SCT_LANES * 2)));
typedef int8_t Bytes __attribute__((vector_size(SCT_LANES)));

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec all(float x) { return x - Vec{}; }  // x - 0.0: keeps the sign of zero

// The first n values, zeros after them; nothing beyond is touched.
inline Vec load_first(const float* p, int n) {
    if (n >= LANES) return load(p);
#ifdef __AVX512F__
    return Vec(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
#else
    Vec v{};
    for (int i = 0; i < n; i++) v[i] = p[i];
    return v;
#endif
}

inline void store_first(float* p, Vec v, int n) {
    if (n >= LANES) return store(p, v);
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), __m512(v));
#else
    for (int i = 0; i < n; i++) p[i] = v[i];
#endif
}

// Zeroes an array of vectors that is to live in registers: one by one, since GCC would fill memory for ``= {}``.
template <class T>
inline void clear(T& vector) {
    vector = T{};
}

template <class T, size_t N>
inline void clear(T (&array)[N]) {
    for (T& part : array) clear(part);
}

inline float widen(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float widen(int8_t x) { return x; }

inline float widen(float x) { return x; }

inline Vec load_wide(const float* p) { return load(p); }

// GCC makes several instructions of a conversion that is one.
#if SCT_LANES == 16 && defined(__AVX512F__)
inline Vec wide(Bytes b) {
    return Vec(_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, __m128i(b))));
}

inline Vec wide(Halves h) { return Vec(Ints(_mm512_maskz_cvtepu16_epi32(0xffff, __m256i(h))) << 16); }
#elif SCT_LANES == 8 && defined(__AVX2__)
inline Vec wide(Bytes b) {
    int64_t eight;
    std::memcpy(&eight, &b, sizeof eight);
    return Vec(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(eight))));
}

inline Vec wide(Halves h) { return Vec(Ints(_mm256_cvtepu16_epi32(__m128i(h))) << 16); }
#else
inline Vec wide(Bytes b) {
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(b, Shorts), Ints), Vec);
}

inline Vec wide(Halves h) { return Vec(__builtin_convertvector(h, Ints) << 16); }
#endif

inline Vec load_wide(const uint16_t* p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return wide(h);
}

inline Vec load_wide(const int8_t* p) {
    Bytes b;
    std::memcpy(&b, p, sizeof b);
    return wide(b);
}

inline float sum(Vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// One step of a transpose: swaps what lies ``step`` lanes off the diagonal between two registers.
template <int STEP, size_t... I>
inline void swap_lanes(Vec& a, Vec& b, std::index_sequence<I...>) {
    const Vec low = __builtin_shufflevector(a, b, (I & STEP ? int(I) - STEP + LANES : int(I))...);
    const Vec high = __builtin_shufflevector(a, b, (I & STEP ? int(I) + LANES : int(I) + STEP)...);
    a = low;
    b = high;
}

template <int STEP>
inline void transpose_step(Vec* rows) {
    if constexpr (STEP < LANES) {
        for (int i = 0; i < LANES; i++)
            if (!(i & STEP)) swap_lanes<STEP>(rows[i], rows[i + STEP], std::make_index_sequence<LANES>());
        transpose_step<STEP * 2>(rows);
    }
}

inline void transpose(Vec (&rows)[LANES]) { transpose_step<1>(rows); }

}  // namespace SCT_ISA
}  // namespace sct
