// One bit a weight, and the values of the bits that are set.
//
// Times a panel of tokens, bits become column indices, some words at a time, and the rest is as for CSR. Times one
// token, values are spread over the places of their bits: work for every weight, whether it is there or not, but in
// vectors; by AVX-512's "expand", by a table for AVX2. The portable build takes the bits one by one.
#include "bitmask.h"

#include <cstdlib>

#include "product.h"

namespace sct {
namespace SCT_ISA {
namespace {

constexpr size_t CHUNK = 32;  // words whose bits become indices at once

size_t words_of(const Matrix& m) { return (size_t(m.cols) + 63) / 64; }

const uint64_t* mask_of(const Matrix& m, uint32_t row) {
    return static_cast<const uint64_t*>(m.indices) + row * words_of(m);
}

template <class Stored>
const Stored* values_of(const Matrix& m, uint32_t row) {
    return static_cast<const Stored*>(m.values) + m.starts[row];
}

// The places of the set bits of at most CHUNK words, and how many there are.
struct Columns {
    uint16_t at[CHUNK * 64 + 32];
    uint32_t count;

    Columns(const uint64_t* words, size_t some) {
        uint16_t* next = at;
        for (size_t w = 0; w < some; w++) {
#ifdef __AVX512VBMI2__
            for (int half = 0; half < 64; half += 32) {
                const uint32_t bits = uint32_t(words[w] >> half);
                const __m512i places = _mm512_add_epi16(counting(), _mm512_set1_epi16(short(w * 64 + half)));
                _mm512_storeu_si512(next, _mm512_maskz_compress_epi16(bits, places));
                next += __builtin_popcount(bits);
            }
#else
            for (uint64_t bits = words[w]; bits; bits &= bits - 1) *next++ = uint16_t(w * 64 + __builtin_ctzll(bits));
#endif
        }
        count = uint32_t(next - at);
    }

#ifdef __AVX512VBMI2__
    static __m512i counting() {
        typedef uint16_t Places __attribute__((vector_size(64)));
        return __m512i(Places{0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                              16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31});
    }
#endif
};

// Activations and places as seen from a later column.
const float* shifted(const float* x, Strided place, size_t column) { return x + column * place.step; }
const float* shifted(const float* x, Tabled, size_t) { return x; }
Strided from(Strided place, size_t) { return place; }
Tabled from(Tabled place, size_t column) { return {place.table + column}; }

template <class Stored, class Place>
void strip_rows(const Matrix& m, uint32_t strip, const float* x, Place place, int64_t tokens, float* tile) {
    constexpr int MOST = most<1>();
    const size_t words = words_of(m);
    std::memset(tile, 0, STRIP * PANEL * sizeof(float));
    for (uint32_t r = 0; r < STRIP && strip * STRIP + r < m.rows; r++, tile += PANEL) {
        const uint64_t* const mask = mask_of(m, strip * STRIP + r);
        const Stored* values = values_of<Stored>(m, strip * STRIP + r);
        for (size_t w = 0; w < words; w += CHUNK) {
            const Columns columns(mask + w, words - w < CHUNK ? words - w : CHUNK);
            const float* const here = shifted(x, place, w * 64);
            const auto some = [&](auto t, int64_t done) __attribute__((always_inline)) {
                product<1, 1, decltype(t)::value>(columns.at, values, columns.count, here + done, from(place, w * 64),
                                                  tile + done, true);
            };
            int64_t done = 0;
            for (; done + (MOST - 1) * LANES < tokens; done += MOST * LANES)
                some(std::integral_constant<int, MOST>(), done);
            for (; done < tokens; done += LANES) some(std::integral_constant<int, 1>(), done);
            values += columns.count;
        }
    }
}

template <class Stored>
void by_place(const Matrix& m, uint32_t strip, const float* x, Places places, int64_t tokens, float* tile) {
    if (places.table) return strip_rows<Stored>(m, strip, x, Tabled{places.table}, tokens, tile);
    strip_rows<Stored>(m, strip, x, Strided{places.step}, tokens, tile);
}

// --- one token ------------------------------------------------------------------------------------------------------

template <class Stored>
void scan(const Matrix& m, uint32_t first, uint32_t last, const float* x, float* y) {
    const size_t words = words_of(m);
    for (uint32_t row = first; row < last; row++) {
        const uint64_t* const mask = mask_of(m, row);
        const Stored* values = values_of<Stored>(m, row);
        float total = 0;
        for (size_t w = 0; w < words; w += CHUNK) {
            const Columns columns(mask + w, words - w < CHUNK ? words - w : CHUNK);
            total += dot(columns.at, values, columns.count, x + w * 64);
            values += columns.count;
        }
        y[row] = total;
    }
}

#ifdef __AVX2__
// The activations in the order in which expanded values come, a whole number of words of them; kept for each thread.
struct Arranged {
    float* at = nullptr;
    size_t size = 0;
    ~Arranged() { std::free(at); }

    // Whether there is room, and every activation is finite: a place without a value is multiplied like all others.
    bool take(const float* x, size_t cols, bool apart) {
        const size_t wanted = (cols + 63) / 64 * 64;
        if (wanted > size) {
            std::free(at);
            at = static_cast<float*>(std::aligned_alloc(64, wanted * sizeof(float)));
            size = at ? wanted : 0;
            if (!at) return false;
        }
        Vec none{};  // x - x is NaN for what is not finite
        for (size_t k = 0; k < wanted; k += LANES) {
            const Vec v = k < cols ? load_first(x + k, cols - k < LANES ? int(cols - k) : LANES) : Vec{};
            none += v - v;
            store(at + k, v);
        }
#ifdef __AVX512VBMI2__
        for (size_t k = 0; apart && k < wanted; k += 32) {  // evens, then odds
            const Vec a = load(at + k), b = load(at + k + 16);
            store(at + k, __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
            store(at + k + 16, __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
        }
#else
        (void)apart;
#endif
        return sum(none) == 0;
    }
};

inline uint32_t ones(uint64_t bits) { return uint32_t(__builtin_popcountll(bits)); }
#endif

#ifdef __AVX512VBMI2__
// Zeros that the compiler does not know to be zeros. Expanding into them, rather than with the form that zeroes, keeps
// one expansion from waiting for the last one into the same register, as Zen 5 does: three times as fast.
inline __m512i zeros() {
    __m512i v = _mm512_setzero_si512();
    asm("" : "+v"(v));
    return v;
}

// The weights of 64 places, of which those with a bit have values. Counting the bits of every part of the word by
// itself keeps one part from waiting for the one before.
inline void spread(uint64_t bits, const float* at, __m512i zero, Vec (&weights)[4]) {
    const auto some = [&](uint64_t mask, const float* from) __attribute__((always_inline)) {
        return Vec(_mm512_mask_expand_epi32(zero, __mmask16(mask), _mm512_loadu_si512(from)));
    };
    weights[0] = some(bits, at);
    weights[1] = some(bits >> 16, at + ones(bits & 0xffff));
    weights[2] = some(bits >> 32, at + ones(bits & 0xffffffff));
    weights[3] = some(bits >> 48, at + ones(bits & 0xffffffffffff));
}

// In 32 bits lie two values: the lower one shifted up is the even place, the upper one as it is the odd place.
inline void spread(uint64_t bits, const uint16_t* at, __m512i zero, Vec (&weights)[4]) {
    const uint16_t* const next = at + ones(bits & 0xffffffff);
    const Ints low = Ints(_mm512_mask_expand_epi16(zero, __mmask32(bits), _mm512_loadu_si512(at)));
    const Ints high = Ints(_mm512_mask_expand_epi16(zero, __mmask32(bits >> 32), _mm512_loadu_si512(next)));
    const Ints upper = Ints{} - 65536;
    weights[0] = Vec(low << 16), weights[1] = Vec(low & upper);
    weights[2] = Vec(high << 16), weights[3] = Vec(high & upper);
}

inline void spread(uint64_t bits, const int8_t* at, __m512i zero, Vec (&weights)[4]) {
    typedef int8_t All __attribute__((vector_size(64)));
    const All all = All(_mm512_mask_expand_epi8(zero, __mmask64(bits), _mm512_loadu_si512(at)));
    weights[0] = wide(__builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    weights[1] = wide(__builtin_shufflevector(all, all, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31));
    weights[2] = wide(__builtin_shufflevector(all, all, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47));
    weights[3] = wide(__builtin_shufflevector(all, all, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63));
}

template <class Stored>
float expand(const Matrix& m, uint32_t row, const float* x) {
    const size_t words = words_of(m);
    const uint64_t* const mask = mask_of(m, row);
    const Stored* at = values_of<Stored>(m, row);
    const __m512i zero = zeros();
    Vec a{}, b{}, c{}, d{};
    for (size_t w = 0; w < words; w++, x += 64) {
        const uint64_t bits = mask[w];
        Vec weights[4];
        spread(bits, at, zero, weights);
        __builtin_prefetch(at + AHEAD / sizeof(Stored));
        at += ones(bits);
        a += weights[0] * load(x);
        b += weights[1] * load(x + 16);
        c += weights[2] * load(x + 32);
        d += weights[3] * load(x + 48);
    }
    return sum((a + b) + (c + d));
}

#elif defined(__AVX2__)
// For every byte of bits, which of the next values each of 8 places takes; 0x80 where it takes none.
struct Table {
    uint8_t takes[256][8];

    constexpr Table() : takes() {
        for (int bits = 0; bits < 256; bits++)
            for (int i = 0, next = 0; i < 8; i++) takes[bits][i] = uint8_t(bits >> i & 1 ? next++ : 0x80);
    }
};
constexpr Table TABLE;

template <class Stored>
float expand(const Matrix& m, uint32_t row, const float* x) {
    const size_t words = words_of(m);
    const uint64_t* const mask = mask_of(m, row);
    const Stored* at = values_of<Stored>(m, row);
    Vec sums[4];
    clear(sums);
    for (size_t w = 0; w < words; w++, x += 64) {
        __builtin_prefetch(at + AHEAD / sizeof(Stored));
        for (int i = 0; i < 8; i++) {
            const uint8_t bits = uint8_t(mask[w] >> (8 * i));
            int64_t eight;
            std::memcpy(&eight, TABLE.takes[bits], sizeof eight);
            const __m256i takes = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(eight));
            const __m256 packed = _mm256_permutevar8x32_ps(__m256(load_wide(at)), takes);
            // Only the sign of ``takes`` counts.
            const __m256 weights = _mm256_blendv_ps(packed, _mm256_setzero_ps(), _mm256_castsi256_ps(takes));
            sums[i % 4] += Vec(weights) * load(x + i * 8);
            at += ones(bits);
        }
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}
#endif

template <class Stored>
void rows(const Matrix& m, uint32_t first, uint32_t last, const float* x, float* y) {
#ifdef __AVX2__
    static thread_local Arranged arranged;
    if (arranged.take(x, m.cols, sizeof(Stored) == 2)) {
        for (uint32_t row = first; row < last; row++) y[row] = expand<Stored>(m, row, arranged.at);
        return;
    }
#endif
    scan<Stored>(m, first, last, x, y);
}

}  // namespace

void bitmask_strip(const Matrix& m, uint32_t strip, const float* x, Places places, int64_t tokens, float* tile) {
    if (m.value == Value::f32) return by_place<float>(m, strip, x, places, tokens, tile);
    if (m.value == Value::bf16) return by_place<uint16_t>(m, strip, x, places, tokens, tile);
    by_place<int8_t>(m, strip, x, places, tokens, tile);
}

void bitmask_decode(const Matrix& m, uint32_t first, uint32_t last, const float* x, float* y) {
    const auto row = [&](uint32_t strip) { return strip * STRIP < m.rows ? strip * STRIP : m.rows; };
    if (m.value == Value::f32) return rows<float>(m, row(first), row(last), x, y);
    if (m.value == Value::bf16) return rows<uint16_t>(m, row(first), row(last), x, y);
    rows<int8_t>(m, row(first), row(last), x, y);
}

}  // namespace SCT_ISA
}  // namespace sct
