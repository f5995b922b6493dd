// Reads and checks packed weights. Everything that the kernels later trust is decided here.
#include "matrix.h"

#include <cstring>

namespace sct {
namespace {

constexpr uint64_t ALIGN = 64, SLACK = 64;  // sections begin at multiples of ALIGN; values end with SLACK zero bytes

struct Header {
    char magic[8];
    uint8_t version, format, value, height, index, zero[3];
    uint32_t rows, cols;
    uint64_t count;
    uint8_t rest[32];
};
static_assert(sizeof(Header) == 64, "the header is 64 bytes");

uint64_t padded(uint64_t bytes) { return (bytes + ALIGN - 1) / ALIGN * ALIGN; }

uint64_t value_bytes(Value value) { return value == Value::f32 ? 4 : value == Value::bf16 ? 2 : 1; }

// Whether columns rise in every row and stay below the matrix's.
template <class Index>
bool columns_fit(const Matrix& m, uint32_t block_rows) {
    const Index* index = static_cast<const Index*>(m.indices);
    for (uint32_t row = 0; row < block_rows; row++) {
        uint64_t least = 0, column = 0;
        for (uint32_t i = m.starts[row]; i < m.starts[row + 1]; i++) {
            column = sizeof(Index) == 1 ? column + index[i] : index[i];
            if (column < least || column >= m.cols) return false;
            least = column + 1;
        }
    }
    return true;
}

bool bits_fit(const Matrix& m) {
    const uint64_t words = (uint64_t(m.cols) + 63) / 64;
    const uint64_t* mask = static_cast<const uint64_t*>(m.indices);
    const uint64_t beyond = m.cols % 64 ? ~uint64_t(0) << (m.cols % 64) : 0;
    for (uint32_t row = 0; row < m.rows; row++) {
        uint64_t bits = 0;
        for (uint64_t i = 0; i < words; i++) bits += uint64_t(__builtin_popcountll(mask[row * words + i]));
        if (bits != m.starts[row + 1] - m.starts[row]) return false;
        if (words && (mask[row * words + words - 1] & beyond)) return false;
    }
    return true;
}

const char* check_header(const Header& h) {
    if (std::memcmp(h.magic, "SECATEUR", 8) != 0) return "no packed weight: it does not begin with SECATEUR";
    if (h.version != 1) return "a packed weight of another version; this engine reads version 1";
    if (h.format != 1 && h.format != 2) return "the format is unknown; expected 1 (blocks) or 2 (bitmask)";
    if (h.value > 2) return "the kind of values is unknown; expected 0 (float32), 1 (bfloat16) or 2 (int8)";
    const bool blocks = h.format == 1;
    if (blocks && h.height != 1 && h.height != 4 && h.height != 16) return "the block height is not 1, 4 or 16";
    if (blocks && h.index != 1 && h.index != 2 && h.index != 4) return "an index is not of 1, 2 or 4 bytes";
    if (!blocks && (h.height != 1 || h.index != 0)) return "a bitmask has height 1 and no indices";
    if (h.count > 0xffffffffu) return "more than 4294967295 blocks or values";
    for (uint8_t byte : h.zero)
        if (byte) return "reserved bytes of the header are not zero";
    for (uint8_t byte : h.rest)
        if (byte) return "reserved bytes of the header are not zero";
    return nullptr;
}

}  // namespace

uint64_t Matrix::bytes_before(uint32_t strip) const {
    const uint64_t row = uint64_t(strip) * STRIP < rows ? uint64_t(strip) * STRIP : rows;
    const uint64_t block_row = (row + height - 1) / height;
    const uint64_t blocks = starts[block_row];
    const uint64_t bytes = blocks * (height * value_bytes(value) + index);
    return format == Format::bitmask ? bytes + row * ((uint64_t(cols) + 63) / 64) * 8 : bytes;
}

const char* read_matrix(const void* bytes, uint64_t size, Matrix& m) {
    Header h;
    if (size < sizeof h) return "fewer bytes than the header of a packed weight has";
    if (reinterpret_cast<uintptr_t>(bytes) % 8 != 0) return "a packed weight must begin at a multiple of 8 bytes";
    std::memcpy(&h, bytes, sizeof h);
    if (const char* wrong = check_header(h)) return wrong;
    m = {Format(h.format), Value(h.value), h.height, h.index, h.rows, h.cols, h.count, nullptr, nullptr, nullptr, nullptr};

    const bool blocks = m.format == Format::blocks;
    const uint64_t block_rows = (uint64_t(m.rows) + m.height - 1) / m.height;
    const uint64_t words = (uint64_t(m.cols) + 63) / 64;
    // Nothing here overflows: every factor is below 2^32, and no product has more than two such.
    const uint64_t starts = padded((block_rows + 1) * 4);
    const uint64_t indices = padded(blocks ? m.count * m.index : uint64_t(m.rows) * words * 8);
    const uint64_t values = padded(m.count * m.height * value_bytes(m.value)) + SLACK;
    const uint64_t scales = m.value == Value::i8 ? padded(uint64_t(m.rows) * 4) : 0;
    if (size != sizeof h + starts + indices + values + scales)
        return "the bytes are not as many as the header of the packed weight asks for";

    const char* at = static_cast<const char*>(bytes) + sizeof h;
    m.starts = reinterpret_cast<const uint32_t*>(at);
    m.indices = at + starts;
    m.values = at + starts + indices;
    m.scales = scales ? reinterpret_cast<const float*>(at + starts + indices + values) : nullptr;

    if (m.starts[0] != 0 || m.starts[block_rows] != m.count) return "row starts do not begin at 0 and end at the count";
    for (uint64_t i = 0; i < block_rows; i++)
        if (m.starts[i] > m.starts[i + 1]) return "row starts do not rise";
    const uint32_t n = uint32_t(block_rows);
    const bool fit = !blocks          ? bits_fit(m)
                     : m.index == 1   ? columns_fit<uint8_t>(m, n)
                     : m.index == 2   ? columns_fit<uint16_t>(m, n)
                                      : columns_fit<uint32_t>(m, n);
    if (fit) return nullptr;
    return blocks ? "column indices are out of range, or do not rise in a row"
                  : "the bits of a row are not as many as its values";
}

}  // namespace sct
