#include "tiles.h"

#include "product.h"

namespace sct {
namespace SCT_ISA {
namespace {

template <class Index, class Stored, int T>
void rows(const Matrix& m, const Cuts& cuts, uint32_t tile, uint32_t first, uint32_t last, const float* x, int64_t width,
          float* sums) {
    const uint32_t* const starts = cuts.starts.data() + size_t(tile) * m.rows;
    const uint32_t* const columns = cuts.columns.data() + size_t(tile) * m.rows;
    const Index* const index = static_cast<const Index*>(m.indices);
    const Stored* const values = static_cast<const Stored*>(m.values);
    const int64_t begin = int64_t(tile) * Cuts::TILE;
    for (uint32_t row = first; row < last; row++, sums += PANEL) {
        // Distances count from the block before the tile.
        const int64_t from = (sizeof(Index) == 1 ? int64_t(columns[row]) : 0) - begin;
        product<1, 1, T>(index + starts[row], values + starts[row], starts[row + m.rows] - starts[row], x + from * width,
                         Strided{size_t(width)}, sums, true);
    }
}

template <class Index, class Stored>
void panel(const Matrix& m, const Cuts& cuts, uint32_t tile, uint32_t first, uint32_t last, const float* x, int64_t width,
           int64_t tokens, float* sums) {
    constexpr int MOST = most<1>();
    int64_t done = 0;
    for (; done + (MOST - 1) * LANES < tokens; done += MOST * LANES)
        rows<Index, Stored, MOST>(m, cuts, tile, first, last, x + done, width, sums + done);
    for (; done < tokens; done += LANES)
        rows<Index, Stored, 1>(m, cuts, tile, first, last, x + done, width, sums + done);
}

template <class Stored>
void by_index(const Matrix& m, const Cuts& cuts, uint32_t tile, uint32_t first, uint32_t last, const float* x,
              int64_t width, int64_t tokens, float* sums) {
    if (m.index == 1) return panel<uint8_t, Stored>(m, cuts, tile, first, last, x, width, tokens, sums);
    if (m.index == 2) return panel<uint16_t, Stored>(m, cuts, tile, first, last, x, width, tokens, sums);
    panel<uint32_t, Stored>(m, cuts, tile, first, last, x, width, tokens, sums);
}

}  // namespace

void gather(const float* x, Places places, uint32_t first, uint32_t last, int64_t tokens, float* into) {
    for (uint32_t column = first; column < last; column++, into += PANEL) {
        const float* const at = x + (places.table ? places.table[column] : size_t(column) * places.step);
        for (int64_t t = 0; t < tokens; t += LANES) store(into + t, load(at + t));
    }
}

void add_tile(const Matrix& m, const Cuts& cuts, uint32_t tile, uint32_t first, uint32_t last, const float* x,
              int64_t width, int64_t tokens, float* sums) {
    if (m.value == Value::f32) return by_index<float>(m, cuts, tile, first, last, x, width, tokens, sums);
    by_index<uint16_t>(m, cuts, tile, first, last, x, width, tokens, sums);
}

}  // namespace SCT_ISA
}  // namespace sct
