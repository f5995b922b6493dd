// A packed weight as the kernels see it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "cuts.h"
#include "secateur.h"

namespace sct {

constexpr uint32_t STRIP = 16;   // rows that are worked on together
constexpr uint32_t GROUP = 4;    // strips whose outputs are written together
constexpr int64_t PANEL = 64;    // tokens that are worked on together

enum class Format : uint8_t { blocks = 1, bitmask = 2 };
enum class Value : uint8_t { f32 = 0, bf16 = 1, i8 = 2 };

// Blocks: columns of ``height`` rows that share one column index; height 1 is CSR. ``starts`` has the first block of
// every block row, and their count at its end. Indices are columns of 2 or 4 bytes, or of 1 byte: the distance from the
// block before, from 0 at the start of a row.
// Bitmask: one bit a weight in 64-bit words, each row beginning a word; ``starts`` has the first value of every row.
struct Matrix {
    Format format;
    Value value;
    uint32_t height;  // 1, 4 or 16
    uint32_t index;   // 1, 2 or 4 bytes
    uint32_t rows, cols;
    uint64_t count;   // blocks, or values of a bitmask
    const uint32_t* starts;
    const void* indices;  // or the words of the bitmask
    const void* values;
    const float* scales;  // of int8 values, one a row

    uint32_t strips() const { return (rows + STRIP - 1) / STRIP; }
    // Stored bytes before a strip: what threads share evenly.
    uint64_t bytes_before(uint32_t strip) const;
};

// NULL, or what is wrong with the bytes.
const char* read_matrix(const void* bytes, uint64_t size, Matrix& matrix);

// The sum of every row of int8 blocks of 4 rows, rows that fill the last block included.
std::vector<int32_t> row_sums(const Matrix&);

}  // namespace sct

struct sct_matrix : sct::Matrix {
    // Both are made when they are first asked for: most weights never need the one or the other.
    const std::vector<int32_t>& sums() const {
        std::call_once(summed_, [this] { sums_ = sct::row_sums(*this); });
        return sums_;
    }

    const sct::Cuts& cuts() const {
        std::call_once(once_, [this] { cuts_ = sct::Cuts(*this); });
        return cuts_;
    }

  private:
    mutable std::once_flag summed_;
    mutable std::vector<int32_t> sums_;
    mutable std::once_flag once_;
    mutable sct::Cuts cuts_;
};
