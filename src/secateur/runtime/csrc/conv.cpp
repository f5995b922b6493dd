// Convolutions as products of a sparse matrix with the image itself, without unfolding it.
//
// A channel becomes one plane of zero-padded rows; with a stride, one plane for each remainder of a position by it.
// Every tap of the kernel then reads the plane at a fixed distance from the output's position, for all positions at
// once: outputs are tokens, rows of the plane end with a few that are computed and thrown away.
#include <algorithm>
#include <cstring>

#include "work.h"

namespace sct {
namespace {

constexpr int64_t MOST_ROOM = int64_t(1) << 23;  // floats of planes that are made at once, if more than one image

struct Geometry {
    int64_t out[2];     // height and width of the output
    int64_t phases[2];  // planes of a channel: remainders that a tap of the kernel has
    int64_t plane[2];   // height and width of a plane
    int64_t size;       // floats from one plane to the next
    int64_t tokens;     // positions from the first output to the last, thrown away ones included
    bool direct;        // outputs lie like inputs, so that the image is its own planes

    explicit Geometry(const sct_images& g) {
        for (int d = 0; d < 2; d++) {
            const int64_t reach = (g.kernel[d] - 1) * g.dilation[d], size = d ? g.width : g.height;
            out[d] = (size + 2 * g.padding[d] - reach - 1) / g.stride[d] + 1;
            phases[d] = g.kernel[d] == 1 ? 1 : g.stride[d];
            plane[d] = out[d] + reach / g.stride[d];
        }
        tokens = (out[0] - 1) * plane[1] + out[1];
        size = (plane[0] * plane[1] + 15) / 16 * 16;
        direct = g.kernel[0] * g.kernel[1] == 1 && g.stride[0] == 1 && g.stride[1] == 1 && g.padding[0] == 0 &&
                 g.padding[1] == 0;
    }

    int64_t of_channel() const { return phases[0] * phases[1] * size; }
};

// The planes of one channel of one image.
void make_planes(const float* image, const sct_images& g, const Geometry& s, float* planes) {
    for (int64_t py = 0; py < s.phases[0]; py++)
        for (int64_t px = 0; px < s.phases[1]; px++, planes += s.size) {
            for (int64_t y = 0; y < s.plane[0]; y++) {
                float* row = planes + y * s.plane[1];
                const int64_t from = y * g.stride[0] + py - g.padding[0];
                if (from < 0 || from >= g.height) {
                    std::memset(row, 0, size_t(s.plane[1]) * 4);
                    continue;
                }
                const float* line = image + from * g.width;
                const int64_t shift = px - g.padding[1], step = g.stride[1];
                if (step == 1 && g.stride[0] == 1 && shift == 0 && s.plane[1] == g.width) {
                    const int64_t lines = std::min(g.height - from, s.plane[0] - y);  // they follow each other
                    std::memcpy(row, line, size_t(lines * g.width) * 4);
                    y += lines - 1;
                    continue;
                }
                int64_t first = shift < 0 ? (-shift + step - 1) / step : 0;
                int64_t end = shift < g.width ? (g.width - 1 - shift) / step + 1 : 0;
                if (end > s.plane[1]) end = s.plane[1];
                if (first > end) first = end;
                for (int64_t x = 0; x < first; x++) row[x] = 0;
                if (step == 1)
                    std::memcpy(row + first, line + first + shift, size_t(end - first) * 4);
                else if (step == 2)  // as the compiler can make it shuffles
                    for (int64_t x = first; x < end; x++) row[x] = line[x * 2 + shift];
                else
                    for (int64_t x = first; x < end; x++) row[x] = line[x * step + shift];
                for (int64_t x = end; x < s.plane[1]; x++) row[x] = 0;
            }
            std::memset(planes + s.plane[0] * s.plane[1], 0, size_t(s.size - s.plane[0] * s.plane[1]) * 4);
        }
}

// Where the taps of the kernel read, relative to the output's position.
void fill_table(const sct_images& g, const Geometry& s, uint32_t* table) {
    for (int64_t c = 0; c < g.channels; c++)
        for (int64_t ky = 0; ky < g.kernel[0]; ky++)
            for (int64_t kx = 0; kx < g.kernel[1]; kx++) {
                const int64_t y = ky * g.dilation[0], x = kx * g.dilation[1];
                const int64_t phase = y % g.stride[0] * s.phases[1] + x % g.stride[1];
                *table++ = uint32_t(c * s.of_channel() + phase * s.size + y / g.stride[0] * s.plane[1] + x / g.stride[1]);
            }
}

// Rows of tiles: the positions from ``first`` on, but for those between the rows of the image.
void write_rows(const float* tiles, int rows, const Geometry& s, int64_t first, int64_t tokens, const Finish& finish,
                float* y) {
    const int64_t stride = s.out[0] * s.out[1];
    int64_t line = first / s.plane[1], x = first % s.plane[1];
    for (int64_t t = 0; t < tokens; line++, x = 0) {
        // Where nothing is thrown away, the rows of the image follow each other.
        const int64_t end = s.plane[1] == s.out[1] ? tokens : s.out[1] - x, left = tokens - t;
        const int64_t some = end < left ? end : left, at = line * s.out[1] + x;
        if (some > 0) in_use->finish_rows(tiles + t, finish.from(0, at), some, rows, y + at, stride);
        t += s.plane[1] == s.out[1] ? tokens : s.plane[1] - x;
    }
}

const char* check(const Matrix& m, const sct_images& g) {
    constexpr int64_t MOST = int64_t(1) << 31;
    const int64_t sizes[] = {g.batch, g.channels, g.height, g.width, g.padding[0], g.padding[1]};
    for (int64_t size : sizes)
        if (size < 0 || size >= MOST) return "a size of the images is negative or too large";
    for (int d = 0; d < 2; d++) {
        for (int64_t size : {g.kernel[d], g.stride[d], g.dilation[d]})
            if (size < 1 || size >= 65536) return "kernel, stride and dilation are from 1 to 65535";
        const int64_t size = d ? g.width : g.height;
        if (size + 2 * g.padding[d] < (g.kernel[d] - 1) * g.dilation[d] + 1)
            return "the kernel is larger than the padded image";
    }
    if (double(g.channels) * double(g.kernel[0]) * double(g.kernel[1]) != double(m.cols))
        return "the columns of the weight are not channels times kernel";
    const Geometry s(g);
    if (double(g.channels + 1) * double(s.phases[0]) * double(s.phases[1]) * double(s.size) >= 4294967296.0)
        return "an image has more than 4294967295 values";
    return nullptr;
}

}  // namespace

const char* conv(const sct_matrix& m, const float* x, const sct_images& g, const Finish& finish, int most, float* y) {
    if (const char* wrong = check(m, g)) return wrong;
    if (g.batch == 0 || m.rows == 0) return nullptr;
    static const Cuts none;
    Geometry s(g);
    const Cuts& cuts = s.tokens > PANEL / 2 ? m.cuts() : none;
    // All but tiles of columns, which are copied anyway, are read beyond the last position, up to a full register.
    s.direct = s.direct && (s.tokens % 16 == 0 || cuts.tiles);
    const double copied = s.direct ? 0.0 : double(g.channels) * double(s.of_channel());
    const double work = double(g.batch) * (double(s.tokens) * double(m.count) * m.height + copied);
    const int threads = worthwhile(most, work);
    const int64_t image = g.channels * g.height * g.width, outputs = s.out[0] * s.out[1];
    const int64_t planes = g.channels * s.of_channel();
    const bool table = g.kernel[0] * g.kernel[1] > 1;

    int64_t together = s.direct ? g.batch : MOST_ROOM / (planes + 1);
    together = together < 1 ? 1 : together > g.batch ? g.batch : together;
    const size_t offsets = table ? (m.cols + 15) / 16 * 16 : 0;
    // PANEL: what the last panel reads beyond the last plane.
    float* const space = room.of(offsets + (s.direct ? 0 : size_t(together * planes + PANEL)));
    if (!space) return "no memory for the images";
    uint32_t* const at = reinterpret_cast<uint32_t*>(space);
    if (table) fill_table(g, s, at);
    if (!s.direct) std::memset(space + offsets + together * planes, 0, PANEL * 4);

    const int64_t panels = (s.tokens + PANEL - 1) / PANEL;
    const Places places{table ? at : nullptr, uint32_t(s.direct ? g.height * g.width : s.of_channel())};
    for (int64_t done = 0; done < g.batch; done += together) {
        const int64_t now = g.batch - done < together ? g.batch - done : together;
        const float* source = x + done * image;
        if (!s.direct) {
            float* const into = space + offsets;
            const int64_t all = now * g.channels, part = all / (threads * PIECES) + 1;
            parallel((all + part - 1) / part, threads, [&](int64_t k) {
                for (int64_t i = k * part; i < std::min(all, (k + 1) * part); i++)
                    make_planes(source + i * g.height * g.width, g, s, into + i * s.of_channel());
            });
            source = into;
        }
        const int64_t stride = s.direct ? image : planes;
        const Pieces pieces(m, (threads * PIECES + now * panels - 1) / (now * panels));
        parallel(now * panels * pieces.count, threads, [&](int64_t i) {
            const int64_t piece = i % pieces.count, panel = i / pieces.count % panels, one = i / pieces.count / panels;
            const int64_t first = panel * PANEL, tokens = s.tokens - first < PANEL ? s.tokens - first : PANEL;
            const Panel here{source + one * stride + first, places, tokens, false};
            const auto write = [&](uint32_t strip, uint32_t some, const float* sums) {
                const int64_t row = int64_t(strip) * STRIP, out = ((done + one) * m.rows + row) * outputs;
                write_rows(sums, rows_of(m, strip, some), s, first, tokens, finish.from(row, out), y + out);
            };
            multiply(m, cuts, pieces.bounds[piece], pieces.bounds[piece + 1], here, write);
        });
    }
    return nullptr;
}

}  // namespace sct
