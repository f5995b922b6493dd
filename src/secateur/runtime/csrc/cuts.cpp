#include "cuts.h"

#include "matrix.h"

namespace sct {
namespace {

constexpr uint64_t LEAST = 5;  // blocks of a row in a tile; with fewer, sums are loaded and stored too often

template <class Index>
void cut(const Matrix& m, Cuts& cuts) {
    const Index* index = static_cast<const Index*>(m.indices);
    for (uint32_t row = 0; row < m.rows; row++) {
        uint32_t at = m.starts[row];
        size_t column = 0;  // of the block before
        for (uint32_t tile = 0; tile < cuts.tiles; tile++) {
            cuts.starts[size_t(tile) * m.rows + row] = at;
            cuts.columns[size_t(tile) * m.rows + row] = uint32_t(column);
            for (; at < m.starts[row + 1]; at++) {
                const size_t next = sizeof(Index) == 1 ? column + index[at] : index[at];
                if (next >= size_t(tile + 1) * Cuts::TILE) break;
                column = next;
            }
        }
        cuts.starts[size_t(cuts.tiles) * m.rows + row] = at;
    }
}

}  // namespace

Cuts::Cuts(const Matrix& m) {
    const uint64_t wanted = (uint64_t(m.cols) + TILE - 1) / TILE;
    if (m.format != Format::blocks || m.height != 1 || m.value == Value::i8) return;
    if (wanted < 2 || m.count < LEAST * wanted * m.rows) return;
    tiles = uint32_t(wanted);
    starts.resize((wanted + 1) * m.rows);
    columns.resize(wanted * m.rows);
    if (m.index == 1)
        cut<uint8_t>(m, *this);
    else if (m.index == 2)
        cut<uint16_t>(m, *this);
    else
        cut<uint32_t>(m, *this);
}

}  // namespace sct
