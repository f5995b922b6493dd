// The inner loops that formats share: stored values times a panel of tokens, and times one token.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace sct {
namespace SCT_ISA {

constexpr int REGISTERS = LANES == 8 ? 16 : 32;

constexpr uint32_t AHEAD = 1024;  // bytes of values that are asked for before they are needed

struct Strided {
    size_t step;
    size_t operator()(size_t column) const { return column * step; }
};

struct Tabled {
    const uint32_t* table;
    size_t operator()(size_t column) const { return table[column]; }
};

// tile[r][t] = the sum of values[i][r] * x[place of column i][t] over ``blocks`` blocks, r < ROWS, t < T * LANES; added
// to what is there if ``more``. SETS independent sums hide the latency of multiply-adds where ROWS * T are too few.
template <int ROWS, int HEIGHT, int T, class Index, class Stored, class Place>
[[gnu::always_inline]] inline void product(const Index* index, const Stored* values, uint32_t blocks, const float* x,
                                           Place place, float* tile, bool more = false) {
    constexpr int SETS = ROWS * T >= 8 ? 1 : ROWS * T >= 4 ? 2 : ROWS * T >= 2 ? 4 : 8;
    Vec sums[SETS][ROWS][T];
    clear(sums);
    size_t column = 0;
    const auto step = [&](Vec (&into)[ROWS][T], uint32_t i) __attribute__((always_inline)) {
        column = sizeof(Index) == 1 ? column + index[i] : index[i];
        const float* at = x + place(column);
        Vec tokens[T];
        for (int t = 0; t < T; t++) tokens[t] = load(at + t * LANES);
        for (int r = 0; r < ROWS; r++) {
            const Vec weight = all(widen(values[size_t(i) * HEIGHT + r]));
            for (int t = 0; t < T; t++) into[r][t] += weight * tokens[t];
        }
    };
    uint32_t i = 0;
    for (; i + SETS <= blocks; i += SETS)
        for (int s = 0; s < SETS; s++) step(sums[s], i + s);
    for (; i < blocks; i++) step(sums[0], i);
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < T; t++) {
            float* const at = tile + r * PANEL + t * LANES;
            Vec total = sums[0][r][t];
            for (int s = 1; s < SETS; s++) total += sums[s][r][t];
            store(at, more ? load(at) + total : total);
        }
}

// How many registers of tokens to work on at once: there must be some for sums, the tokens of one column, a weight.
template <int ROWS>
constexpr int most() {
    for (int t = PANEL / LANES; t > 1; t /= 2)
        if ((ROWS * t >= 8 ? 1 : 2) * ROWS * t + t + 1 <= REGISTERS && t <= 4) return t;
    return 1;
}

typedef float Four __attribute__((vector_size(16)));

inline Four four(const float* p) {
    Four v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Four four(const uint16_t* p) {
    typedef uint16_t Narrow __attribute__((vector_size(8)));
    typedef uint32_t Wide __attribute__((vector_size(16)));
    Narrow v;
    std::memcpy(&v, p, sizeof v);
    return Four(__builtin_convertvector(v, Wide) << 16);
}

inline Four four(const int8_t* p) {
#ifdef __AVX2__
    int32_t v;
    std::memcpy(&v, p, sizeof v);
    return Four(_mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(v))));
#else
    return Four{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
#endif
}

// The sum of values[i] * x[column i]. Activations are picked up one by one, which beats gathering; values, the other
// half of all loads, four at once: a third faster than one by one on Zen 5.
template <class Index, class Stored>
inline float dot(const Index* index, const Stored* values, uint32_t count, const float* x) {
    constexpr uint32_t SETS = 4, STEP = SETS * 4;
    Four sums[SETS];
    clear(sums);
    const auto place = [&](uint32_t i, size_t before) __attribute__((always_inline)) {
        return sizeof(Index) == 1 ? before + index[i] : index[i];
    };
    for (; count >= STEP; count -= STEP, index += STEP, values += STEP) {
        __builtin_prefetch(values + AHEAD / sizeof(Stored));
        for (uint32_t s = 0; s < SETS; s++) {
            const uint32_t i = s * 4;
            const size_t a = place(i, 0), b = place(i + 1, a), c = place(i + 2, b), d = place(i + 3, c);
            sums[s] += four(values + i) * Four{x[a], x[b], x[c], x[d]};
            if (sizeof(Index) == 1) x += d;  // so that distances are added up four by four
        }
    }
    float rest = 0;
    size_t column = 0;
    for (uint32_t i = 0; i < count; i++) {
        column = place(i, column);
        rest += widen(values[i]) * x[column];
    }
    const Four all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return ((all[0] + all[1]) + (all[2] + all[3])) + rest;
}

}  // namespace SCT_ISA
}  // namespace sct
