// How work is cut and where it finds room: what the drivers of linear.cpp and conv.cpp share.
#pragma once
#include <cstdlib>

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

// A layer among those that read the same activations.
struct Part {
    const Matrix* matrix;
    Finish finish;
    float* y;
};

const char* linear(const Part* parts, int count, const float* x, int64_t n, int64_t stride, int threads);
const char* conv(const Matrix&, const float* x, const sct_images&, const Finish&, int threads, float* y);

}  // namespace sct
