// Vector blocks: height x 1 weights that share a column index; height 1 is CSR.
//
// Times a panel of tokens, the loads of activations are what limits CSR: one load a multiply-add. Blocks of 4 rows use
// each load four times. Blocks of 16 rows run as four passes of 4 rows over the same indices: more rows at once would
// need more registers than there are.
#include "blocks.h"

#include "product.h"

namespace sct {
namespace SCT_ISA {
namespace {

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

template <class Index, class Stored>
void decode_rows(const Matrix& m, uint32_t first, uint32_t last, const float* x, float* y) {
    const Index* index = static_cast<const Index*>(m.indices);
    const Stored* values = static_cast<const Stored*>(m.values);
    for (uint32_t row = first; row < last; row++) {
        const uint32_t at = m.starts[row];
        y[row] = dot(index + at, values + at, m.starts[row + 1] - at, x);
    }
}

typedef float Four __attribute__((vector_size(16)));

template <class Few, class Stored>
inline Few widened(const Stored* p) {
    if constexpr (sizeof(Few) == sizeof(Vec))
        return load_wide(p);
    else
        return Few{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}

template <int HEIGHT, class Index, class Stored>
void decode_blocks(const Matrix& m, uint32_t first, uint32_t last, const float* x, float* y) {
    constexpr int WIDE = HEIGHT < LANES ? HEIGHT : LANES, PARTS = HEIGHT / WIDE, SETS = PARTS > 2 ? 2 : 8 / PARTS;
    using Few = std::conditional_t<WIDE == LANES, Vec, Four>;
    const Index* index = static_cast<const Index*>(m.indices);
    const Stored* values = static_cast<const Stored*>(m.values);
    for (uint32_t row = first; row < last; row++) {
        Few sums[SETS][PARTS];
        clear(sums);
        size_t column = 0;
        const auto step = [&](Few (&into)[PARTS], uint32_t i) __attribute__((always_inline)) {
            column = sizeof(Index) == 1 ? column + index[i] : index[i];
            const float token = x[column];
            for (int p = 0; p < PARTS; p++)
                into[p] += widened<Few>(values + size_t(i) * HEIGHT + p * WIDE) * token;
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
    if (m.value == Value::bf16) return by_index<uint16_t>(m, strip, x, places, tokens, tile);
    by_index<int8_t>(m, strip, x, places, tokens, tile);
}

void blocks_decode(const Matrix& m, uint32_t first, uint32_t last, const float* x, float* y) {
    if (m.value == Value::f32) return decode_index<float>(m, first, last, x, y);
    if (m.value == Value::bf16) return decode_index<uint16_t>(m, first, last, x, y);
    decode_index<int8_t>(m, first, last, x, y);
}

}  // namespace SCT_ISA
}  // namespace sct
