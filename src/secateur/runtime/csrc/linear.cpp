// Linear layers: a few tokens one by one, or panels of tokens that are transposed first.
#include <algorithm>
#include <cstring>

#include "work.h"

namespace sct {
namespace {

// The outputs of one token from ``row`` to ``end``. A row of tokens and a token of rows look the same.
void finish_token(const Finish& finish, int64_t row, int64_t end, float* y) {
    if (!finish.bias && !finish.residual && finish.activation == SCT_NONE) return;
    float sums[PANEL];
    for (int64_t r = row; r < end; r += PANEL) {
        const int64_t some = end - r < PANEL ? end - r : PANEL;
        std::memset(sums, 0, sizeof sums);
        std::memcpy(sums, y + r, size_t(some) * 4);
        if (finish.bias)
            for (int64_t j = 0; j < some; j++) sums[j] += finish.bias[r + j];
        const Finish rest{nullptr, finish.residual ? finish.residual + r : nullptr, finish.activation};
        in_use->finish_rows(sums, rest, some, 1, y + r, 0);
    }
}

// As many tokens as are faster one by one than in a panel, which costs the same for 1 to 16.
int64_t few(const Matrix& m) {
    if (m.format == Format::blocks) return m.height == 16 ? 4 : m.height == 4 ? 2 : 1;
    if (in_use == &portable::kernels) return 1;
    const double density = double(m.count) / (double(m.rows) * double(m.cols) + 1);
    return std::max(int64_t(density * (m.value == Value::f32 ? 12 : 24) + 0.5), int64_t(1));
}

// Tokens one by one, for a few strips each, so that all but the first find the weights in the cache.
void few_tokens(const Matrix& m, const float* x, int64_t n, int64_t stride, const Finish& finish, int threads,
                float* y) {
    const Pieces pieces(m, threads > 1 ? threads * PIECES : 1);
    parallel(pieces.count, threads, [&](int64_t i) {
        const uint32_t end = pieces.bounds[i + 1], step = n == 1 ? end : GROUP;
        for (uint32_t first = pieces.bounds[i]; first < end; first += std::min(step, end - first)) {
            const uint32_t last = first + std::min(step, end - first);
            for (int64_t t = 0; t < n; t++) {
                in_use->decode(m, first, last, x + t * stride, y + t * m.rows);
                const int64_t rows = std::min(int64_t(last) * STRIP, int64_t(m.rows));
                finish_token(finish.from(0, t * m.rows), int64_t(first) * STRIP, rows, y + t * m.rows);
            }
        }
    });
}

int64_t width_of(int64_t panel, int64_t n) {
    const int64_t left = n - panel * PANEL;
    return left >= PANEL ? PANEL : (left + 15) / 16 * 16;
}

// Activations in panels of PANEL tokens, transposed: [panel][column][token].
const float* packed(const float* x, int64_t n, int64_t stride, int64_t cols, int threads) {
    const int64_t panels = (n + PANEL - 1) / PANEL;
    float* const into = room.of(size_t(cols * ((panels - 1) * PANEL + width_of(panels - 1, n))));
    if (!into) return nullptr;
    constexpr int64_t PART = 128;  // columns that are packed as one piece of work
    const int64_t parts = (cols + PART - 1) / PART;
    parallel(panels * parts, threads, [&](int64_t i) {
        const int64_t panel = i / parts, k = i % parts * PART, some = cols - k < PART ? cols - k : PART;
        const int64_t first = panel * PANEL, left = n - first < PANEL ? n - first : PANEL, width = width_of(panel, n);
        in_use->pack(x + first * stride + k, stride, left, some, into + first * cols + k * width, width);
    });
    return into;
}

void tokens(const sct_matrix& m, const float* panels_of_x, int64_t n, const Finish& finish, int threads, float* y) {
    const int64_t cols = m.cols, panels = (n + PANEL - 1) / PANEL;
    static const Cuts none;
    const Cuts& cuts = n > PANEL / 2 ? m.cuts() : none;
    const Pieces pieces(m, (threads * PIECES + panels - 1) / panels);
    parallel(panels * pieces.count, threads, [&](int64_t i) {
        const int64_t panel = i / pieces.count, piece = i % pieces.count, first = panel * PANEL;
        const int64_t left = n - first < PANEL ? n - first : PANEL, width = width_of(panel, n);
        const Panel here{panels_of_x + first * cols, Places{nullptr, uint32_t(width)}, left, true};
        const auto write = [&](uint32_t strip, uint32_t some, const float* sums) {
            const int64_t row = int64_t(strip) * STRIP, at = first * m.rows + row;
            in_use->finish_tokens(sums, finish.from(row, at), left, rows_of(m, strip, some), y + at, m.rows);
        };
        multiply(m, cuts, pieces.bounds[piece], pieces.bounds[piece + 1], here, write);
    });
}

}  // namespace

const char* linear(const Part* parts, int count, const float* x, int64_t n, int64_t stride, int threads) {
    const float* panels = nullptr;
    for (int i = 0; i < count; i++) {
        const sct_matrix& m = *parts[i].matrix;
        if (n <= few(m)) {
            few_tokens(m, x, n, stride, parts[i].finish, threads, parts[i].y);
            continue;
        }
        if (!panels) panels = packed(x, n, stride, m.cols, threads);
        if (!panels) return "no memory for the activations";
        tokens(m, panels, n, parts[i].finish, threads, parts[i].y);
    }
    return nullptr;
}

}  // namespace sct
