// The inner loops that formats share: stored values times a panel of tokens, and times one token.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace sct {
namespace SCT_ISA {

constexpr int REGISTERS = LANES == 8 ? 16 : 32;

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
inline void product(const Index* index, const Stored* values, uint32_t blocks, const float* x, Place place, float* tile,
                    bool more = false) {
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

// The sum of values[i] * x[column i]. Scalar multiply-adds: two loads each, which beats gathering, and no sums across
// lanes but at the end.
template <class Index, class Stored>
inline float dot(const Index* index, const Stored* values, uint32_t count, const float* x) {
    constexpr int SETS = 8;
    float sums[SETS] = {};
    size_t column = 0;
    const auto step = [&](float& into, uint32_t i) __attribute__((always_inline)) {
        column = sizeof(Index) == 1 ? column + index[i] : index[i];
        into += widen(values[i]) * x[column];
    };
    uint32_t i = 0;
    for (; i + SETS <= count; i += SETS)
        for (int s = 0; s < SETS; s++) step(sums[s], i + s);
    for (; i < count; i++) step(sums[0], i);
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

}  // namespace SCT_ISA
}  // namespace sct
