// How work is cut and where it finds room: what the drivers of linear.cpp and conv.cpp share.
#pragma once
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace sct {

extern const Kernels* in_use;

constexpr int PIECES = 4;  // of work for each thread, so that none waits long for another

// Room that a thread keeps between calls, so that a call need not ask the system for memory.
struct Room {
    float* at = nullptr;
    size_t size = 0;
    ~Room() { std::free(at); }
    float* of(size_t floats) {
        if (floats > size || !at) {
            std::free(at);
            size = (floats / 1024 + 1) * 1024;
            at = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
            if (!at) size = 0;
        }
        return at;
    }
};

inline thread_local Room room;

// Cuts the strips of a matrix into pieces of about equal bytes: bounds[0..pieces].
struct Pieces {
    static constexpr int MOST = 256;
    uint32_t bounds[MOST + 1];
    int count;

    Pieces(const Matrix& m, int64_t wanted) {
        const uint32_t strips = m.strips();
        count = int(wanted < 1 ? 1 : wanted > MOST ? MOST : wanted);
        if (uint32_t(count) > strips) count = int(strips > 0 ? strips : 1);
        const uint64_t all = m.bytes_before(strips);
        uint32_t at = 0;
        bounds[0] = 0;
        for (int i = 1; i < count; i++) {
            while (at < strips && m.bytes_before(at) < all / count * i) at++;
            bounds[i] = at;
        }
        bounds[count] = strips;
    }
};

// As many threads as the work is worth: waking one costs microseconds. work: multiply-adds.
inline int worthwhile(int threads, double work) {
    constexpr double LEAST = 200000;  // for each thread
    const double most = work / LEAST;
    return most < 1 ? 1 : most < threads ? int(most) : threads;
}

// Rows of some strips: the last one may have fewer than STRIP.
inline int rows_of(const Matrix& m, uint32_t strip, uint32_t some = 1) {
    const uint32_t left = m.rows - strip * STRIP;
    return int(left < some * STRIP ? left : some * STRIP);
}

// Up to PANEL tokens: where they are, and whether a column's are next to the last one's.
struct Panel {
    const float* x;
    Places places;
    int64_t tokens;
    bool dense;
};

// The rows of some strips times a panel, by tiles of columns where there are any. write(strip, how many of them from
// there on, at most GROUP, sums[rows][PANEL]).
template <class Write>
void multiply(const Matrix& m, const Cuts& cuts, uint32_t first, uint32_t last, const Panel& panel, Write&& write) {
    constexpr uint32_t TOGETHER = 32;  // strips, whose sums are kept while the tiles pass
    constexpr size_t SUMS = TOGETHER * STRIP * PANEL, TILE = Cuts::TILE * PANEL;
    if (!cuts.tiles) {
        alignas(64) float tiles[GROUP * STRIP * PANEL];
        for (uint32_t strip = first; strip < last; strip += GROUP) {
            const uint32_t some = last - strip < GROUP ? last - strip : GROUP;
            for (uint32_t i = 0; i < some; i++)
                in_use->strip(m, strip + i, panel.x, panel.places, panel.tokens, tiles + i * STRIP * PANEL);
            write(strip, some, tiles);
        }
        return;
    }
    alignas(64) float sums[SUMS + TILE];
    for (uint32_t begin = first; begin < last; begin += TOGETHER) {
        const uint32_t end = last - begin < TOGETHER ? last : begin + TOGETHER;
        std::memset(sums, 0, size_t(end - begin) * STRIP * PANEL * sizeof(float));
        const uint32_t row = begin * STRIP, past = end * STRIP < m.rows ? end * STRIP : m.rows;
        for (uint32_t tile = 0; tile < cuts.tiles; tile++) {
            const uint32_t column = tile * Cuts::TILE, left = m.cols - column;
            const uint32_t beyond = column + (left < Cuts::TILE ? left : Cuts::TILE);
            if (!panel.dense) in_use->gather(panel.x, panel.places, column, beyond, panel.tokens, sums + SUMS);
            const float* const x = panel.dense ? panel.x + size_t(column) * panel.places.step : sums + SUMS;
            const int64_t width = panel.dense ? panel.places.step : PANEL;
            in_use->add_tile(m, cuts, tile, row, past, x, width, panel.tokens, sums);
        }
        for (uint32_t strip = begin; strip < end; strip += GROUP)
            write(strip, end - strip < GROUP ? end - strip : GROUP, sums + size_t(strip - begin) * STRIP * PANEL);
    }
}

// A layer among those that read the same activations.
struct Part {
    const sct_matrix* matrix;
    Finish finish;
    float* y;
};

const char* linear(const Part* parts, int count, const float* x, int64_t n, int64_t stride, int threads);
const char* conv(const sct_matrix&, const float* x, const sct_images&, const Finish&, int threads, float* y);
const char* max_pool(const float* x, const sct_images&, int threads, float* y);

}  // namespace sct
