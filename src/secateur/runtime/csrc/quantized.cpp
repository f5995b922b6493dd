// Linear layers in integers: activations of 8 bits with a scale for each token, int8 weights with one for each row.
//
//   scale[n] = max |x[n]| / 127, or 1 where that maximum is below 2^-100
//   q[n, k] = x[n, k] * (127 / max |x[n]|), rounded to the nearest integer, to the even one at a tie
//   y[n, r] = sum over k of q[n, k] * weight[r, k], exactly, * scale[n] * scale of row r
//
// in float32 but for the sum. A token with a value that is not finite has no scale: its outputs are NaN.
#include "quantized.h"

#include <algorithm>
#include <cmath>

#include "work.h"

namespace sct {
namespace {

constexpr uint32_t MOST_COLS = 1u << 17;  // 2^17 products of up to 2^14 may not pass 32 bits

struct Cut {
    int64_t n, cols;
    int64_t panels() const { return (n + PANEL - 1) / PANEL; }
    int64_t tokens(int64_t panel) const { return n - panel * PANEL < PANEL ? n - panel * PANEL : PANEL; }
    int64_t width(int64_t panel) const { return tokens(panel) > PANEL / 2 ? PANEL : (tokens(panel) + 15) / 16 * 16; }
};

void measure(const float* x, int64_t n, int64_t stride, int64_t cols, int threads, float* scales, float* inverse) {
    constexpr int64_t PART = 8;
    parallel((n + PART - 1) / PART, threads, [&](int64_t i) {
        for (int64_t t = i * PART; t < n && t < (i + 1) * PART; t++) {
            const float most = in_use->largest(x + t * stride, cols);
            const bool nothing = most < 0x1p-100f;
            scales[t] = nothing ? 1 : most / 127;
            inverse[t] = nothing || !std::isfinite(most) ? 0 : 127 / most;
        }
    });
}

}  // namespace

std::vector<int32_t> row_sums(const Matrix& m) {
    std::vector<int32_t> sums(size_t(m.rows) + 3);
    const int8_t* values = static_cast<const int8_t*>(m.values);
    for (uint32_t row = 0; row < m.rows; row += 4)
        for (uint32_t i = m.starts[row / 4]; i < m.starts[row / 4 + 1]; i++)
            for (uint32_t r = 0; r < 4; r++) sums[row + r] += values[size_t(i) * 4 + r];
    return sums;
}

const char* quantized_linear(const sct_matrix& m, const float* x, int64_t n, int64_t stride, const Finish& finish,
                             int threads, float* y) {
    if (m.value != Value::i8 || m.format != Format::blocks || m.height != 4)
        return "activations are quantized only for int8 blocks of 4 rows";
    if (m.cols > MOST_COLS) return "activations are quantized only for up to 131072 columns";
    const int32_t* const sums = m.sums().data();
    const Cut cut{n, int64_t(m.cols)};
    const int64_t cols = cut.cols, panels = cut.panels();
    float* const scales = room.of(size_t(panels * PANEL * 2 + (panels * PANEL * cols + 3) / 4));
    if (!scales) return "no memory for the activations";
    float* const inverse = scales + panels * PANEL;
    uint8_t* const bytes = reinterpret_cast<uint8_t*>(inverse + panels * PANEL);
    for (int64_t t = n; t < panels * PANEL; t++) scales[t] = inverse[t] = 0;
    measure(x, n, stride, cols, threads, scales, inverse);

    constexpr int64_t PART = 64;  // columns that are packed as one piece of work
    const int64_t parts = (cols + PART - 1) / PART;
    parallel(panels * parts, threads, [&](int64_t i) {
        const int64_t panel = i / parts, k = i % parts * PART, some = cols - k < PART ? cols - k : PART;
        const int64_t first = panel * PANEL, width = cut.width(panel);
        alignas(64) float part[PART * PANEL];
        in_use->pack(x + first * stride + k, stride, cut.tokens(panel), some, part, width);
        in_use->quantize(part, inverse + first, some, width, bytes + first * cols + k * width);
    });

    const Pieces pieces(m, (threads * PIECES + panels - 1) / panels);
    parallel(panels * pieces.count, threads, [&](int64_t i) {
        const int64_t panel = i / pieces.count, piece = i % pieces.count, first = panel * PANEL;
        alignas(64) float tiles[GROUP * STRIP * PANEL];
        for (uint32_t s = pieces.bounds[piece]; s < pieces.bounds[piece + 1]; s += GROUP) {
            const uint32_t some = std::min(pieces.bounds[piece + 1] - s, GROUP);
            for (uint32_t i = 0; i < some; i++)
                in_use->strip_int8(m, sums, s + i, bytes + first * cols, scales + first, cut.width(panel),
                                   tiles + i * STRIP * PANEL);
            const int64_t row = int64_t(s) * STRIP, at = first * m.rows + row;
            in_use->finish_tokens(tiles, finish.from(row, at), cut.tokens(panel), rows_of(m, s, some), y + at, m.rows);
        }
    });
    return nullptr;
}

}  // namespace sct
