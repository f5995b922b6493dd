// CSR in tiles of columns, so that the activations of a tile stay in the first cache while all rows go over them.
#pragma once
#include <cstdint>
#include <vector>

namespace sct {

struct Matrix;

struct Cuts {
    static constexpr uint32_t TILE = 128;  // columns; times PANEL tokens they are 32 KB

    uint32_t tiles = 0;             // 0: rows have too little in a tile, or the matrix is no CSR of floats
    std::vector<uint32_t> starts;   // [tiles + 1][rows], the first block of a row that lies in the tile or beyond
    std::vector<uint32_t> columns;  // [tiles][rows], what the distance of that block counts from

    Cuts() = default;
    explicit Cuts(const Matrix&);
};

}  // namespace sct
