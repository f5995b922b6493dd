// int8 blocks of 4 rows times activations of 8 bits, added up in integers.
//
// Instructions for this (AVX-512 VNNI) take four products of one row at once. Four blocks together are that: 4 rows,
// and 4 columns whose activations are interleaved on the way. Activations come as q + 128, since one factor must be
// unsigned; 128 times the sum of a row's weights is taken off at the end.
#include "int8.h"

namespace sct {
namespace SCT_ISA {
namespace {

typedef uint32_t Sums __attribute__((vector_size(SCT_LANES * 4)));  // modulo 2^32: what passes over comes back
typedef uint8_t Small __attribute__((vector_size(SCT_LANES)));

[[maybe_unused]] inline Sums widened(Small bytes) {
#if defined(__AVX512F__)
    return Sums(_mm512_maskz_cvtepu8_epi32(0xffff, __m128i(bytes)));
#else
    return __builtin_convertvector(__builtin_convertvector(bytes, Halves), Sums);
#endif
}

// The blocks that are multiplied together, and the tokens (times LANES).
#if defined(__AVX512VNNI__)
constexpr int JOINED = 4, WIDEST = 4;
#elif defined(__AVX2__)
constexpr int JOINED = 2, WIDEST = 2;
#else
constexpr int JOINED = 1, WIDEST = 4;
#endif

// sums[r][t] += the weights of row r of JOINED blocks times the activations of their columns.
#if defined(__AVX512VNNI__)
template <int T>
inline void interleave(const uint8_t* const (&at)[4], __m512i (&tokens)[T]) {
    if constexpr (T == 4) {
        const __m512i a = _mm512_loadu_si512(at[0]), b = _mm512_loadu_si512(at[1]);
        const __m512i c = _mm512_loadu_si512(at[2]), d = _mm512_loadu_si512(at[3]);
        const __m512i low_ab = _mm512_unpacklo_epi8(a, b), low_cd = _mm512_unpacklo_epi8(c, d);
        const __m512i high_ab = _mm512_unpackhi_epi8(a, b), high_cd = _mm512_unpackhi_epi8(c, d);
        tokens[0] = _mm512_unpacklo_epi16(low_ab, low_cd), tokens[1] = _mm512_unpackhi_epi16(low_ab, low_cd);
        tokens[2] = _mm512_unpacklo_epi16(high_ab, high_cd), tokens[3] = _mm512_unpackhi_epi16(high_ab, high_cd);
    } else {
        Sums joined{};
        for (int i = 0; i < 4; i++) {
            Small bytes;
            std::memcpy(&bytes, at[i], sizeof bytes);
            joined |= widened(bytes) << (8 * i);
        }
        tokens[0] = __m512i(joined);
    }
}

template <int T>
inline void multiply(const int8_t* values, const uint8_t* const (&at)[4], Sums (&sums)[4][T]) {
    __m512i tokens[T];
    interleave(at, tokens);
    const __m512i all = _mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    for (int r = 0; r < 4; r++) {
        const __m512i weights = _mm512_shuffle_epi8(all, _mm512_set1_epi32(0x0c080400 + 0x01010101 * r));
        for (int t = 0; t < T; t++) sums[r][t] = Sums(_mm512_dpbusd_epi32(__m512i(sums[r][t]), tokens[t], weights));
    }
}
#elif defined(__AVX2__)
template <int T>
inline void multiply(const int8_t* values, const uint8_t* const (&at)[2], Sums (&sums)[4][T]) {
    static_assert(T == 2, "16 tokens");
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at[0]));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at[1]));
    const __m256i tokens[2] = {_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b)),
                               _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b))};
    for (int r = 0; r < 4; r++) {
        const uint32_t pair = uint16_t(values[r]) | uint32_t(uint16_t(values[r + 4])) << 16;
        const __m256i weights = _mm256_set1_epi32(int32_t(pair));
        for (int t = 0; t < 2; t++) sums[r][t] += Sums(_mm256_madd_epi16(tokens[t], weights));
    }
}
#else
template <int T>
inline void multiply(const int8_t* values, const uint8_t* const (&at)[1], Sums (&sums)[4][T]) {
    for (int t = 0; t < T; t++) {
        Small bytes;
        std::memcpy(&bytes, at[0] + t * LANES, sizeof bytes);
        const Sums tokens = widened(bytes);
        for (int r = 0; r < 4; r++) sums[r][t] += tokens * uint32_t(int32_t(values[r]));
    }
}
#endif

template <int T, class Index>
void four_rows(const Matrix& m, uint32_t row, const uint8_t* x, int64_t width, Sums (&sums)[4][T]) {
    const uint32_t first = m.starts[row / 4], end = m.starts[row / 4 + 1];
    const Index* index = static_cast<const Index*>(m.indices) + first;
    const int8_t* values = static_cast<const int8_t*>(m.values) + size_t(first) * 4;
    size_t column = 0;
    const auto next = [&]() __attribute__((always_inline)) {
        column = sizeof(Index) == 1 ? column + *index++ : *index++;
        return x + column * size_t(width);
    };
    clear(sums);
    uint32_t left = end - first;
    const uint8_t* at[JOINED];
    for (; left >= JOINED; left -= JOINED, values += JOINED * 4) {
        for (int i = 0; i < JOINED; i++) at[i] = next();
        multiply(values, at, sums);
    }
    if (!left) return;
    int8_t last[JOINED * 4] = {};
    std::memcpy(last, values, left * 4);
    for (uint32_t i = 0; i < JOINED; i++) at[i] = i < left ? next() : x;
    multiply(last, at, sums);
}

template <int T, class Index>
void strip_tokens(const Matrix& m, const int32_t* row_sums, uint32_t strip, const uint8_t* x, const float* scales,
                  int64_t width, float* tile) {
    for (uint32_t row = strip * STRIP; row < m.rows && row < (strip + 1) * STRIP; row += 4, tile += 4 * PANEL) {
        Sums sums[4][T];
        four_rows<T, Index>(m, row, x, width, sums);
        for (uint32_t r = 0; r < 4 && row + r < m.rows; r++)
            for (int t = 0; t < T; t++) {
                const Ints exact = Ints(sums[r][t] - 128 * uint32_t(row_sums[row + r]));
                const Vec product = __builtin_convertvector(exact, Vec) * load(scales + t * LANES);
                store(tile + r * PANEL + t * LANES, product * all(m.scales[row + r]));
            }
    }
}

template <class Index>
void by_width(const Matrix& m, const int32_t* sums, uint32_t strip, const uint8_t* x, const float* scales,
              int64_t width, float* tile) {
    if (width == PANEL && WIDEST * LANES == PANEL)
        return strip_tokens<WIDEST, Index>(m, sums, strip, x, scales, width, tile);
    constexpr int T = 16 / LANES;
    for (int64_t t = 0; t < width; t += 16) strip_tokens<T, Index>(m, sums, strip, x + t, scales + t, width, tile + t);
}

// The lowest byte of the result is 128 + x * inverse, rounded to an even integer at a tie.
inline Ints rounded(Vec x, Vec inverse) {
    Vec q = x * inverse;
    // Besides keeping to the range, this keeps compilers from joining the product and the sum, which would round once.
    q = q > all(127.0f) ? all(127.0f) : q;
    return Ints(q + all(12582912.0f + 128.0f)) & 255;
}

}  // namespace

float largest(const float* x, int64_t cols) {
    Ints most{};
    Vec none{};  // x - x is NaN for what is not finite
    for (int64_t k = 0; k < cols; k += LANES) {
        const Vec v = load_first(x + k, cols - k < LANES ? int(cols - k) : LANES);
        const Ints size = Ints(v) & 0x7fffffff;  // orders like the number
        most = size > most ? size : most;
        none += v - v;
    }
    float one[LANES], value = 0;
    std::memcpy(one, &most, sizeof one);
    for (float each : one) value = each > value ? each : value;
    return value + sum(none);
}

void quantize(const float* panel, const float* inverse, int64_t cols, int64_t width, uint8_t* bytes) {
    for (int64_t k = 0; k < cols; k++, panel += width, bytes += width) {
#if defined(__AVX512VNNI__)
        if (width == PANEL) {  // in the order that interleaving brings back to that of the tokens
            __m512i q[4];
            for (int t = 0; t < 4; t++) q[t] = __m512i(rounded(load(panel + t * 16), load(inverse + t * 16)));
            const __m512i low = _mm512_packus_epi32(q[0], q[1]), high = _mm512_packus_epi32(q[2], q[3]);
            _mm512_storeu_si512(bytes, _mm512_packus_epi16(low, high));
            continue;
        }
#endif
        for (int64_t t = 0; t < width; t += LANES) {
            const Ints exact = rounded(load(panel + t), load(inverse + t));
#if defined(__AVX512F__)
            const Small q = Small(_mm512_maskz_cvtepi32_epi8(0xffff, __m512i(exact)));
#else
            const Small q = __builtin_convertvector(__builtin_convertvector(exact, Halves), Small);
#endif
            std::memcpy(bytes + t, &q, sizeof q);
        }
    }
}

void strip_int8(const Matrix& m, const int32_t* sums, uint32_t strip, const uint8_t* bytes, const float* scales,
                int64_t width, float* tile) {
    if (m.index == 1) return by_width<uint8_t>(m, sums, strip, bytes, scales, width, tile);
    if (m.index == 2) return by_width<uint16_t>(m, sums, strip, bytes, scales, width, tile);
    by_width<uint32_t>(m, sums, strip, bytes, scales, width, tile);
}

}  // namespace SCT_ISA
}  // namespace sct
