// Vector blocks: height x 1 weights that share a column index; height 1 is CSR.
//
// Times a panel of tokens, the loads of activations are what limits CSR: one load a multiply-add. Blocks of 4 rows use
// each load four times. Blocks of 16 rows run as four passes of 4 rows over the same indices: more rows at once would
// need more registers than there are.
#include "blocks.h"

namespace sct {
namespace SCT_ISA {
namespace {

constexpr int REGISTERS = LANES == 8 ? 16 : 32;

struct Strided {
    size_t step;
    size_t operator()(size_t column) const { return column * step; }
};

struct Tabled {
    const uint32_t* table;
    size_t operator()(size_t column) const { return table[column]; }
};

// tile[r][t] = the sum of values[i][r] * x[place of column i][t] over the blocks of one block row, r < ROWS, t < T * LANES.
// SETS independent sums hide the latency of multiply-adds where ROWS * T are too few.
template <int ROWS, int HEIGHT, int T, class Index, class Stored, class Place>
inline void product(const Index* index, const Stored* values, uint32_t blocks, const float* x, Place place, float* tile) {
    constexpr int SETS = ROWS * T >= 8 ? 1 : ROWS * T >= 4 ? 2 : ROWS * T >= 2 ? 4 : 8;
    Vec sums[SETS][ROWS][T] = {};
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
            Vec total = sums[0][r][t];
            for (int s = 1; s < SETS; s++) total += sums[s][r][t];
            store(tile + r * PANEL + t * LANES, total);
        }
}

template <int ROWS, int HEIGHT, int T, class Index, class Stored, class Place>
void rows_of_strip(const Matrix& m, uint32_t strip, const float* x, Place place, float* tile) {
    const Index* index = static_cast<const Index*>(m.indices);
    const Stored* values = static_cast<const Stored*>(m.values);
    for (uint32_t r = 0; r < STRIP && strip * STRIP + r < m.rows; r += ROWS) {
        const uint32_t row = (strip * STRIP + r) / HEIGHT, inside = (strip * STRIP + r) % HEIGHT;
        const uint32_t first = m.starts[row];
        product<ROWS, HEIGHT, T>(index + first, values + size_t(first) * HEIGHT + inside, m.starts[row + 1] - first, x,
                                 place, tile + r * PANEL);
    }
}

// Registers: sums, the tokens of one column, a weight.
template <int ROWS>
constexpr int most() {
    for (int t = PANEL / LANES; t > 1; t /= 2)
        if ((ROWS * t >= 8 ? 1 : 2) * ROWS * t + t + 1 <= REGISTERS && t <= 4) return t;
    return 1;
}

template <int ROWS, int HEIGHT, class Index, class Stored, class Place>
void panel(const Matrix& m, uint32_t strip, const float* x, Place place, int64_t tokens, float* tile) {
    constexpr int MOST = most<ROWS>();
    int64_t done = 0;
    for (; done + (MOST - 1) * LANES < tokens; done += MOST * LANES)
        rows_of_strip<ROWS, HEIGHT, MOST, Index, Stored>(m, strip, x + done, place, tile + done);
    if constexpr (MOST > 2)
        for (; done + LANES < tokens; done += 2 * LANES)
            rows_of_strip<ROWS, HEIGHT, 2, Index, Stored>(m, strip, x + done, place, tile + done);
    for (; done < tokens; done += LANES)
        rows_of_strip<ROWS, HEIGHT, 1, Index, Stored>(m, strip, x + done, place, tile + done);
}

template <int ROWS, int HEIGHT, class Index, class Stored>
void by_place(const Matrix& m, uint32_t strip, const float* x, Places places, int64_t tokens, float* tile) {
    if (places.table)
        panel<ROWS, HEIGHT, Index, Stored>(m, strip, x, Tabled{places.table}, tokens, tile);
    else
        panel<ROWS, HEIGHT, Index, Stored>(m, strip, x, Strided{places.step}, tokens, tile);
}

template <class Index, class Stored>
void by_height(const Matrix& m, uint32_t strip, const float* x, Places places, int64_t tokens, float* tile) {
    if (m.height == 1) return by_place<1, 1, Index, Stored>(m, strip, x, places, tokens, tile);
    if (m.height == 4) return by_place<4, 4, Index, Stored>(m, strip, x, places, tokens, tile);
    by_place<4, 16, Index, Stored>(m, strip, x, places, tokens, tile);
}

template <class Stored>
void by_index(const Matrix& m, uint32_t strip, const float* x, Places places, int64_t tokens, float* tile) {
    if (m.index == 1) return by_height<uint8_t, Stored>(m, strip, x, places, tokens, tile);
    if (m.index == 2) return by_height<uint16_t, Stored>(m, strip, x, places, tokens, tile);
    by_height<uint32_t, Stored>(m, strip, x, places, tokens, tile);
}

// --- one token ------------------------------------------------------------------------------------------------------

// Scalar multiply-adds: two loads each, which beats gathering, and no sums across lanes but at the end of a row.
template <class Index, class Stored>
void decode_rows(const Matrix& m, uint32_t first, uint32_t last, const float* x, float* y) {
    const Index* index = static_cast<const Index*>(m.indices);
    const Stored* values = static_cast<const Stored*>(m.values);
    for (uint32_t row = first; row < last; row++) {
        constexpr int SETS = 8;
        float sums[SETS] = {};
        size_t column = 0;
        const auto step = [&](float& into, uint32_t i) __attribute__((always_inline)) {
            column = sizeof(Index) == 1 ? column + index[i] : index[i];
            into += widen(values[i]) * x[column];
        };
        uint32_t i = m.starts[row];
        const uint32_t end = m.starts[row + 1];
        for (; i + SETS <= end; i += SETS)
            for (int s = 0; s < SETS; s++) step(sums[s], i + s);
        for (; i < end; i++) step(sums[0], i);
        y[row] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    }
}

template <int N>
struct Some {
    typedef float Type __attribute__((vector_size(N * 4)));
};

template <int HEIGHT, class Index, class Stored>
void decode_blocks(const Matrix& m, uint32_t first, uint32_t last, const float* x, float* y) {
    constexpr int WIDE = HEIGHT < LANES ? HEIGHT : LANES, PARTS = HEIGHT / WIDE, SETS = PARTS > 2 ? 2 : 8 / PARTS;
    using Few = typename Some<WIDE>::Type;
    const Index* index = static_cast<const Index*>(m.indices);
    const Stored* values = static_cast<const Stored*>(m.values);
    for (uint32_t row = first; row < last; row++) {
        Few sums[SETS][PARTS] = {};
        size_t column = 0;
        const auto step = [&](Few (&into)[PARTS], uint32_t i) __attribute__((always_inline)) {
            column = sizeof(Index) == 1 ? column + index[i] : index[i];
            const float token = x[column];
            for (int p = 0; p < PARTS; p++) {
                const Stored* at = values + size_t(i) * HEIGHT + p * WIDE;
                Few weight;
                if constexpr (sizeof(Stored) == 4)
                    std::memcpy(&weight, at, sizeof weight);
                else
                    for (int w = 0; w < WIDE; w++) weight[w] = widen(at[w]);
                into[p] += weight * token;
            }
        };
        uint32_t i = m.starts[row];
        const uint32_t end = m.starts[row + 1];
        for (; i + SETS <= end; i += SETS)
            for (int s = 0; s < SETS; s++) {
                if (s == 0) __builtin_prefetch(values + size_t(i) * HEIGHT + 1024 / sizeof(Stored));
                step(sums[s], i + s);
            }
        for (; i < end; i++) step(sums[0], i);
        for (int p = 0; p < PARTS; p++)
            for (int w = 0; w < WIDE; w++) {
                const size_t at = size_t(row) * HEIGHT + p * WIDE + w;
                float total = 0;
                for (int s = 0; s < SETS; s++) total += sums[s][p][w];
                if (at < m.rows) y[at] = total;
            }
    }
}

template <class Index, class Stored>
void decode_height(const Matrix& m, uint32_t first, uint32_t last, const float* x, float* y) {
    const auto block_row = [&](uint32_t strip) {
        const uint32_t row = strip * STRIP < m.rows ? strip * STRIP : m.rows;
        return (row + m.height - 1) / m.height;
    };
    if (m.height == 1) return decode_rows<Index, Stored>(m, block_row(first), block_row(last), x, y);
    if (m.height == 4) return decode_blocks<4, Index, Stored>(m, block_row(first), block_row(last), x, y);
    decode_blocks<16, Index, Stored>(m, block_row(first), block_row(last), x, y);
}

template <class Stored>
void decode_index(const Matrix& m, uint32_t first, uint32_t last, const float* x, float* y) {
    if (m.index == 1) return decode_height<uint8_t, Stored>(m, first, last, x, y);
    if (m.index == 2) return decode_height<uint16_t, Stored>(m, first, last, x, y);
    decode_height<uint32_t, Stored>(m, first, last, x, y);
}

}  // namespace

void blocks_strip(const Matrix& m, uint32_t strip, const float* x, Places places, int64_t tokens, float* tile) {
    if (m.value == Value::f32) return by_index<float>(m, strip, x, places, tokens, tile);
    by_index<uint16_t>(m, strip, x, places, tokens, tile);
}

void blocks_decode(const Matrix& m, uint32_t first, uint32_t last, const float* x, float* y) {
    if (m.value == Value::f32) return decode_index<float>(m, first, last, x, y);
    decode_index<uint16_t>(m, first, last, x, y);
}

}  // namespace SCT_ISA
}  // namespace sct
