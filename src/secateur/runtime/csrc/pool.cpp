// Max pooling: the largest of some rows first, then the largest of some columns of that.
#include <algorithm>
#include <cmath>
#include <vector>

#include "work.h"

namespace sct {
namespace {

// As torch has it: NaN is larger than everything.
inline float larger(float a, float b) { return b > a || std::isnan(b) ? b : a; }

// ``columns`` is a row of the padded image; what is padded is smaller than everything, and stays so.
void pool_image(const float* image, const sct_images& g, const int64_t* out, float* columns, float* y) {
    float* const middle = columns + g.padding[1];
    for (int64_t row = 0; row < out[0]; row++, y += out[1]) {
        const int64_t from = row * g.stride[0] - g.padding[0];
        const int64_t first = std::max(from, int64_t(0)), end = std::min(from + g.kernel[0], g.height);
        std::copy_n(image + first * g.width, g.width, middle);
        for (int64_t line = first + 1; line < end; line++)
            for (int64_t x = 0; x < g.width; x++) middle[x] = larger(middle[x], image[line * g.width + x]);
        for (int64_t kx = 0; kx < g.kernel[1]; kx++) {
            const float* const at = columns + kx;
            const int64_t step = g.stride[1];
            if (kx == 0)
                for (int64_t x = 0; x < out[1]; x++) y[x] = at[x * step];
            else if (step == 2)  // which the compiler can make shuffles of
                for (int64_t x = 0; x < out[1]; x++) y[x] = larger(y[x], at[x * 2]);
            else
                for (int64_t x = 0; x < out[1]; x++) y[x] = larger(y[x], at[x * step]);
        }
    }
}

const char* check(const sct_images& g) {
    constexpr int64_t MOST = int64_t(1) << 31;
    for (int64_t size : {g.batch, g.channels, g.height, g.width})
        if (size < 0 || size >= MOST) return "a size of the images is negative or too large";
    for (int d = 0; d < 2; d++) {
        if (g.kernel[d] < 1 || g.kernel[d] >= 65536 || g.stride[d] < 1 || g.stride[d] >= 65536)
            return "kernel and stride are from 1 to 65535";
        if (g.dilation[d] != 1) return "pooling has no dilation";
        if (g.padding[d] < 0 || g.padding[d] > g.kernel[d] / 2) return "padding is more than half of the kernel";
        const int64_t size = d ? g.width : g.height;
        if (size < 1 || size + 2 * g.padding[d] < g.kernel[d]) return "the kernel is larger than the padded image";
    }
    return nullptr;
}

}  // namespace

const char* max_pool(const float* x, const sct_images& g, int most, float* y) {
    if (const char* wrong = check(g)) return wrong;
    const int64_t out[] = {(g.height + 2 * g.padding[0] - g.kernel[0]) / g.stride[0] + 1,
                           (g.width + 2 * g.padding[1] - g.kernel[1]) / g.stride[1] + 1};
    const int64_t images = g.batch * g.channels, pieces = std::min(images, int64_t(most) * PIECES);
    const double work = double(images) * double(g.height * g.width);
    parallel(pieces, worthwhile(most, work), [&](int64_t piece) {
        std::vector<float> columns(size_t(g.width + 2 * g.padding[1]), -INFINITY);
        for (int64_t i = images * piece / pieces; i < images * (piece + 1) / pieces; i++)
            pool_image(x + i * g.height * g.width, g, out, columns.data(), y + i * out[0] * out[1]);
    });
    return nullptr;
}

}  // namespace sct
