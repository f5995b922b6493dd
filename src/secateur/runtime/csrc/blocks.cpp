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

// The rows that a block row has of ``sums``, which is as many as the height.
void store_rows(const Matrix& m, uint32_t block_row, const float* sums, float* y) {
    const size_t row = size_t(block_row) * m.height, left = m.rows - row;
    std::memcpy(y + row, sums, (left < m.height ? left : m.height) * sizeof(float));
}

// Each of the activations as often as a block has rows.
#if SCT_LANES == 16
inline Vec each_four_times(const float* x, size_t a, size_t b, size_t c, size_t d) {
    const Ints order = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    const Four four = {x[a], x[b], x[c], x[d]};
    return Vec(_mm512_maskz_permutexvar_ps(0xffff, __m512i(order), _mm512_castps128_ps512(__m128(four))));
}
#endif

// Blocks of 4 rows: as many at once as a register holds.
template <class Index, class Stored>
void decode_fours(const Matrix& m, uint32_t first, uint32_t last, const float* x, float* y) {
    constexpr uint32_t JOINED = LANES / 4, SETS = 4, STEP = SETS * JOINED;
    for (uint32_t row = first; row < last; row++) {
        const Index* index = static_cast<const Index*>(m.indices) + m.starts[row];
        const Stored* values = static_cast<const Stored*>(m.values) + size_t(m.starts[row]) * 4;
        const float* at = x;
        uint32_t left = m.starts[row + 1] - m.starts[row];
        Vec sums[SETS];
        clear(sums);
        for (; left >= STEP; left -= STEP, index += STEP, values += STEP * 4) {
            for (uint32_t line = 0; line < STEP * 4 * sizeof(Stored); line += 64)
                __builtin_prefetch(values + (AHEAD + line) / sizeof(Stored));
            for (uint32_t s = 0; s < SETS; s++) {
                size_t column[JOINED];
                for (uint32_t j = 0; j < JOINED; j++)
                    column[j] = (sizeof(Index) == 1 && j ? column[j - 1] : 0) + index[s * JOINED + j];
                Vec tokens;
#if SCT_LANES == 16
                tokens = each_four_times(at, column[0], column[1], column[2], column[3]);
#else
                for (uint32_t i = 0; i < LANES; i++) tokens[i] = at[column[i / 4]];
#endif
                sums[s] += load_wide(values + s * LANES) * tokens;
                if (sizeof(Index) == 1) at += column[JOINED - 1];  // so that distances are added up a few at once
            }
        }
        const Vec joined = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        float parts[LANES], total[4] = {};
        store(parts, joined);
        for (int i = 0; i < LANES; i++) total[i % 4] += parts[i];
        size_t column = 0;
        for (uint32_t i = 0; i < left; i++) {
            column = (sizeof(Index) == 1 ? column : 0) + index[i];
            for (int r = 0; r < 4; r++) total[r] += widen(values[i * 4 + r]) * at[column];
        }
        store_rows(m, row, total, y);
    }
}

template <class Index, class Stored>
void decode_sixteens(const Matrix& m, uint32_t first, uint32_t last, const float* x, float* y) {
    constexpr uint32_t PARTS = 16 / LANES, SETS = PARTS > 2 ? 2 : 8 / PARTS;
    for (uint32_t row = first; row < last; row++) {
        const Index* index = static_cast<const Index*>(m.indices);
        const Stored* values = static_cast<const Stored*>(m.values);
        Vec sums[SETS][PARTS];
        clear(sums);
        size_t column = 0;
        const auto step = [&](Vec (&into)[PARTS], uint32_t i) __attribute__((always_inline)) {
            column = sizeof(Index) == 1 ? column + index[i] : index[i];
            const Vec token = all(x[column]);
            for (uint32_t p = 0; p < PARTS; p++) into[p] += load_wide(values + size_t(i) * 16 + p * LANES) * token;
        };
        uint32_t i = m.starts[row];
        const uint32_t end = m.starts[row + 1];
        for (; i + SETS <= end; i += SETS)
            for (uint32_t s = 0; s < SETS; s++) {
                if (s == 0) __builtin_prefetch(values + size_t(i) * 16 + AHEAD / sizeof(Stored));
                step(sums[s], i + s);
            }
        for (; i < end; i++) step(sums[0], i);
        float total[16];
        for (uint32_t p = 0; p < PARTS; p++) {
            for (uint32_t s = 1; s < SETS; s++) sums[0][p] += sums[s][p];
            store(total + p * LANES, sums[0][p]);
        }
        store_rows(m, row, total, y);
    }
}

template <class Index, class Stored>
void decode_height(const Matrix& m, uint32_t first, uint32_t last, const float* x, float* y) {
    const auto block_row = [&](uint32_t strip) {
        const uint32_t row = strip * STRIP < m.rows ? strip * STRIP : m.rows;
        return (row + m.height - 1) / m.height;
    };
    if (m.height == 1) return decode_rows<Index, Stored>(m, block_row(first), block_row(last), x, y);
    if (m.height == 4) return decode_fours<Index, Stored>(m, block_row(first), block_row(last), x, y);
    decode_sixteens<Index, Stored>(m, block_row(first), block_row(last), x, y);
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
