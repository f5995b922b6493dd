#include "tiles.h"

#include "product.h"

namespace sct {
namespace SCT_ISA {
namespace {

constexpr uint32_t AHEAD_ROWS = 4;  // that are asked for before they are needed

struct Paneled {
    size_t operator()(size_t column) const { return column * PANEL; }
};

// Sums go on from what is there. One register for every LANES tokens is enough to add up in: rows are short, and
// processors work on the next one while the last multiply-adds of a row are under way.
template <class Index, class Stored, int T, class Place>
void rows(const Matrix& m, const Cuts& cuts, uint32_t tile, uint32_t first, uint32_t last, const float* x, Place place,
          float* sums) {
    const uint32_t* const starts = cuts.starts.data() + size_t(tile) * m.rows;
    const uint32_t* const columns = cuts.columns.data() + size_t(tile) * m.rows;
    const Index* const index = static_cast<const Index*>(m.indices);
    const Stored* const values = static_cast<const Stored*>(m.values);
    const size_t begin = size_t(tile) * Cuts::TILE;
    for (uint32_t row = first; row < last; row++, sums += PANEL) {
        // Rows of a tile lie far apart in memory, where no processor guesses.
        const uint32_t ahead = starts[row + AHEAD_ROWS < m.rows ? row + AHEAD_ROWS : row];
        __builtin_prefetch(index + ahead);
        __builtin_prefetch(values + ahead);
        __builtin_prefetch(values + ahead + 16);
        // Distances count from the block before the tile.
        size_t column = (sizeof(Index) == 1 ? size_t(columns[row]) : 0) - begin;
        Vec total[T];
        for (int t = 0; t < T; t++) total[t] = load(sums + t * LANES);
        const uint32_t end = starts[row + m.rows];
        for (uint32_t i = starts[row]; i < end; i++) {
            column = sizeof(Index) == 1 ? column + index[i] : index[i] - begin;
            const float* const at = x + place(column);
            const Vec weight = all(widen(values[i]));
            for (int t = 0; t < T; t++) total[t] += weight * load(at + t * LANES);
        }
        for (int t = 0; t < T; t++) store(sums + t * LANES, total[t]);
    }
}

template <class Index, class Stored, class Place>
void panel(const Matrix& m, const Cuts& cuts, uint32_t tile, uint32_t first, uint32_t last, const float* x, Place place,
           int64_t tokens, float* sums) {
    constexpr int MOST = most<1>();
    int64_t done = 0;
    for (; done + (MOST - 1) * LANES < tokens; done += MOST * LANES)
        rows<Index, Stored, MOST>(m, cuts, tile, first, last, x + done, place, sums + done);
    if constexpr (MOST > 2)
        for (; done + LANES < tokens; done += 2 * LANES)
            rows<Index, Stored, 2>(m, cuts, tile, first, last, x + done, place, sums + done);
    for (; done < tokens; done += LANES)
        rows<Index, Stored, 1>(m, cuts, tile, first, last, x + done, place, sums + done);
}

template <class Index, class Stored>
void by_width(const Matrix& m, const Cuts& cuts, uint32_t tile, uint32_t first, uint32_t last, const float* x,
              int64_t width, int64_t tokens, float* sums) {
    if (width == PANEL) return panel<Index, Stored>(m, cuts, tile, first, last, x, Paneled{}, tokens, sums);
    panel<Index, Stored>(m, cuts, tile, first, last, x, Strided{size_t(width)}, tokens, sums);
}

template <class Stored>
void by_index(const Matrix& m, const Cuts& cuts, uint32_t tile, uint32_t first, uint32_t last, const float* x,
              int64_t width, int64_t tokens, float* sums) {
    if (m.index == 1) return by_width<uint8_t, Stored>(m, cuts, tile, first, last, x, width, tokens, sums);
    if (m.index == 2) return by_width<uint16_t, Stored>(m, cuts, tile, first, last, x, width, tokens, sums);
    by_width<uint32_t, Stored>(m, cuts, tile, first, last, x, width, tokens, sums);
}

}  // namespace

void gather(const float* x, Places places, uint32_t first, uint32_t last, int64_t tokens, float* into) {
    for (uint32_t column = first; column < last; column++, into += PANEL) {
        const float* const at = x + (places.table ? places.table[column] : size_t(column) * places.step);
        int64_t t = 0;
        for (; t + LANES <= tokens; t += LANES) store(into + t, load(at + t));
        if (t < tokens) store(into + t, load_first(at + t, int(tokens - t)));
    }
}

void add_tile(const Matrix& m, const Cuts& cuts, uint32_t tile, uint32_t first, uint32_t last, const float* x,
              int64_t width, int64_t tokens, float* sums) {
    if (m.value == Value::f32) return by_index<float>(m, cuts, tile, first, last, x, width, tokens, sums);
    by_index<uint16_t>(m, cuts, tile, first, last, x, width, tokens, sums);
}

}  // namespace SCT_ISA
}  // namespace sct
