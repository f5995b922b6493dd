// Compares the kernels of every instruction set that this machine has with plain loops, over random cases.
//
//   check [cases] [seed]
#include <algorithm>
#include <cstdio>
#include <memory>

#include "fuzz.h"
#include "reference.h"

namespace {

const char* const ISAS[] = {"portable", "avx2", "avx512"};

struct Tally {
    long cases = 0, outputs = 0, wrong = 0, refused = 0;
} linears, quantized, convolutions, pools;

enum Kind { INTEGERS, NORMAL, SPECIAL };

float activation_value(Random& random, Kind kind) {
    if (kind == INTEGERS) return float(random.integer(8));
    if (kind == SPECIAL && random.chance(0.02)) {
        static const float ODD[] = {NAN, INFINITY, -INFINITY, -0.0f, 1e-40f, -1e-44f, 1e30f};
        return random.of(ODD);
    }
    return random.normal();
}

uint32_t size(Random& random, uint32_t most) {
    static const uint32_t EDGES[] = {0,  1,  2,  3,  4,  5,  15, 16, 17,  31,  32,  33,
                                     47, 48, 49, 63, 64, 65, 79, 80, 127, 128, 129, 200};
    const uint32_t some = random.chance(0.6) ? random.of(EDGES) : random.below(most + 1);
    return some < most ? some : most;
}

struct Opened {
    Exact<uint8_t> bytes;
    sct_matrix* matrix = nullptr;

    Opened(const std::vector<uint8_t>& packed, size_t offset) : bytes(packed.size(), offset) {
        std::memcpy(bytes.at, packed.data(), packed.size());
        if (const char* wrong = sct_open(bytes.at, packed.size(), &matrix)) {
            std::printf("a good weight was refused: %s\n", wrong);
            std::exit(1);
        }
    }
    ~Opened() { sct_close(matrix); }
};

void describe(const char* isa, const Weight& w, const char* what) {
    std::printf("wrong: %s, %s of %u x %u, format %d, values %d, height %u, index %u, %zu blocks\n", isa, what, w.rows,
                w.cols, w.format, w.value, w.height, w.index, w.count());
}

// What follows a product, in memory of its own.
struct After {
    Exact<float> bias, residual;
    sct_finish finish;

    After(Random& random, size_t rows, size_t outputs, Kind kind)
        : bias(random.chance(0.5) ? rows : 0, 4 * random.below(4)),
          residual(random.chance(0.4) ? outputs : 0, 4 * random.below(4)) {
        if (kind == SPECIAL) kind = NORMAL;
        for (size_t i = 0; i < bias.size; i++) bias[i] = activation_value(random, kind);
        for (size_t i = 0; i < residual.size; i++) residual[i] = activation_value(random, kind);
        const int activation = random.chance(0.5) ? SCT_NONE : 1 + int(random.below(4));
        finish = {bias.size ? bias.at : nullptr, residual.size ? residual.at : nullptr, activation,
                  1 + int(random.below(3)), 0};
    }

    Sum with(Sum sum, size_t row, size_t at) const {
        if (bias.size) sum.add(1, bias.at[row]);
        if (residual.size) sum.add(1, residual.at[at]);
        return sum;
    }
};

// Runs one call with every instruction set, and hands every output to ``right(y, i)``.
template <class Call, class Right>
void compare(Tally& tally, const Weight& w, const char* what, size_t outputs, size_t offset, Call&& call,
             Right&& right) {
    for (const char* isa : ISAS) {
        if (sct_use(isa)) continue;
        Exact<float> y(outputs, offset);
        for (size_t i = 0; i < outputs; i++) y[i] = NAN;
        if (const char* message = call(y.at)) {
            describe(isa, w, message);
            tally.wrong++;
            continue;
        }
        long wrong = 0;
        for (size_t i = 0; i < outputs; i++) wrong += !right(y[i], i);
        if (wrong) describe(isa, w, what);
        tally.wrong += wrong;
        tally.cases++;
        tally.outputs += long(outputs);
    }
}

void check_linear(Random& random) {
    const Kind kind = Kind(random.below(3));
    uint32_t rows = size(random, 130), cols = size(random, 600), n = size(random, 200);
    if (random.chance(0.02)) cols = 2000 + random.below(200);
    if (random.chance(0.005)) rows = random.below(20), cols = 65530 + random.below(5000), n = random.below(4);
    if (random.chance(0.3)) n = random.below(4);
    const Weight w = random_weight(random, rows, cols, kind == INTEGERS);
    const std::vector<size_t> starts = starts_of(w);
    const Opened opened(pack(w), 8 * random.below(3));
    const size_t stride = cols + random.below(3) * random.below(20);
    Exact<float> x(n ? (n - 1) * stride + cols : 0, 4 * random.below(16));
    for (size_t i = 0; i < x.size; i++) x[i] = activation_value(random, kind);
    if (kind == NORMAL)  // some tokens of hardly anything
        for (size_t t = 0; t < n; t++)
            if (const float small = random.chance(0.1) ? std::ldexp(1.0f, -random.integer(40) - 80) : 0)
                for (uint32_t k = 0; k < cols; k++) x[t * stride + k] *= small;
    const After after(random, rows, size_t(n) * rows, kind);

    std::vector<Sum> expected(size_t(n) * rows);
    for (size_t i = 0; i < expected.size(); i++) {
        const float* token = x.at + i / rows * stride;
        const auto at = [&](uint32_t column) { return token[column]; };
        expected[i] = after.with(product(w, starts, uint32_t(i % rows), at), i % rows, i);
    }
    const auto call = [&](float* y) { return sct_linear(opened.matrix, x.at, n, int64_t(stride), &after.finish, y); };
    compare(linears, w, "linear", expected.size(), 4 * random.below(16), call, [&](float found, size_t i) {
        return agrees(found, expected[i], after.finish.activation, kind == INTEGERS);
    });

    sct_finish finish{nullptr, nullptr, SCT_NONE, after.finish.threads, 1};
    const auto integers = [&](float* y) { return sct_linear(opened.matrix, x.at, n, int64_t(stride), &finish, y); };
    if (w.format != BLOCKS || w.height != 4 || w.value != I8) {
        float none = 0;
        if (n && rows) quantized.refused++, quantized.wrong += integers(&none) == nullptr;
        return;
    }
    std::vector<Quantized> tokens;
    for (uint32_t t = 0; t < n; t++) tokens.emplace_back(x.at + t * stride, cols);
    compare(quantized, w, "quantized", expected.size(), 4 * random.below(16), integers, [&](float found, size_t i) {
        const float exact = tokens[i / rows].times(w, starts, uint32_t(i % rows));
        return std::isnan(exact) ? std::isnan(found) : found == exact;
    });
}

struct Shape {
    sct_images images;
    int64_t out[2];

    explicit Shape(Random& random) {
        images.batch = random.below(3), images.channels = random.below(7);
        for (int d = 0; d < 2; d++) {
            int64_t& size = d ? images.width : images.height;
            images.kernel[d] = 1 + random.below(4), images.stride[d] = 1 + random.below(3);
            images.padding[d] = random.below(4), images.dilation[d] = 1 + random.below(3);
            if (random.chance(0.3)) images.kernel[d] = images.stride[d] = 1, images.padding[d] = 0;
            const int64_t reach = (images.kernel[d] - 1) * images.dilation[d] + 1;
            size = 1 + random.below(random.chance(0.2) ? 40 : 12);
            if (random.chance(0.2)) size = (size + 3) / 4 * 4;
            if (size + 2 * images.padding[d] < reach) size = reach;
            out[d] = (size + 2 * images.padding[d] - reach) / images.stride[d] + 1;
        }
        if (random.chance(0.1)) images.channels = 130 + random.below(40);  // tiles of columns, whatever the kernel
    }
    uint32_t cols() const { return uint32_t(images.channels * images.kernel[0] * images.kernel[1]); }

    // The activation under a column of the weight, at one output.
    double at(const float* image, uint32_t column, int64_t y, int64_t x) const {
        const int64_t kx = column % images.kernel[1], ky = column / images.kernel[1] % images.kernel[0];
        const int64_t channel = column / images.kernel[1] / images.kernel[0];
        const int64_t row = y * images.stride[0] - images.padding[0] + ky * images.dilation[0];
        const int64_t place = x * images.stride[1] - images.padding[1] + kx * images.dilation[1];
        if (row < 0 || row >= images.height || place < 0 || place >= images.width) return 0;
        return image[(channel * images.height + row) * images.width + place];
    }
};

// Groups are blocks of columns that only some rows have.
void keep_group(Weight& w, const Shape& shape, uint32_t groups) {
    const uint32_t rows = (w.rows + groups - 1) / groups, cols = shape.cols() / groups;
    for (uint32_t b = 0, block = 0; b < w.columns.size(); b++)
        for (uint32_t column : w.columns[b]) {
            for (uint32_t r = 0; r < w.height; r++)
                if ((b * w.height + r) / rows != column / (cols ? cols : 1)) w.values[size_t(block) * w.height + r] = 0;
            block++;
        }
}

void check_conv(Random& random) {
    const Kind kind = Kind(random.below(2));
    const Shape shape(random);
    const sct_images& images = shape.images;
    const uint32_t rows = size(random, 40);
    Weight w = random_weight(random, rows, shape.cols(), kind == INTEGERS);
    if (images.channels > 1 && random.chance(0.3)) keep_group(w, shape, uint32_t(images.channels));
    const std::vector<size_t> starts = starts_of(w);
    const Opened opened(pack(w), 0);
    const size_t image = size_t(images.channels * images.height * images.width);
    Exact<float> x(image * size_t(images.batch), 4 * random.below(16));
    for (size_t i = 0; i < x.size; i++) x[i] = activation_value(random, kind);
    const size_t plane = size_t(shape.out[0] * shape.out[1]);
    const After after(random, rows, size_t(images.batch) * rows * plane, kind);

    std::vector<Sum> expected(size_t(images.batch) * rows * plane);
    for (size_t i = 0; i < expected.size(); i++) {
        const uint32_t row = uint32_t(i / plane % rows);
        const float* here = x.at + i / plane / rows * image;
        const int64_t y = int64_t(i % plane) / shape.out[1], place = int64_t(i % plane) % shape.out[1];
        const auto at = [&](uint32_t column) { return shape.at(here, column, y, place); };
        expected[i] = after.with(product(w, starts, row, at), row, i);
    }
    const auto call = [&](float* y) { return sct_conv(opened.matrix, x.at, &images, &after.finish, y); };
    compare(convolutions, w, "conv", expected.size(), 4 * random.below(16), call, [&](float found, size_t i) {
        return agrees(found, expected[i], after.finish.activation, kind == INTEGERS);
    });
}

// The largest value under the kernel, to the bit: NaN is larger than everything, padding is nothing.
void check_pool(Random& random) {
    Shape shape(random);
    sct_images& images = shape.images;
    for (int d = 0; d < 2; d++) {
        const int64_t size = d ? images.width : images.height;
        images.dilation[d] = 1;
        images.kernel[d] = images.kernel[d] < size ? images.kernel[d] : size;
        images.padding[d] = random.below(uint32_t(images.kernel[d] / 2 + 1));
        shape.out[d] = (size + 2 * images.padding[d] - images.kernel[d]) / images.stride[d] + 1;
    }
    const size_t image = size_t(images.height * images.width), plane = size_t(shape.out[0] * shape.out[1]);
    const size_t count = size_t(images.batch * images.channels);
    Exact<float> x(image * count, 4 * random.below(16));
    for (size_t i = 0; i < x.size; i++) x[i] = activation_value(random, SPECIAL);
    const int threads = 1 + int(random.below(3));
    const auto call = [&](float* y) { return sct_max_pool(x.at, &images, threads, y); };
    const Weight none{};
    compare(pools, none, "pool", plane * count, 4 * random.below(16), call, [&](float found, size_t i) {
        const int64_t top = int64_t(i % plane) / shape.out[1] * images.stride[0] - images.padding[0];
        const int64_t left = int64_t(i % plane) % shape.out[1] * images.stride[1] - images.padding[1];
        float most = -INFINITY;
        for (int64_t y = std::max(top, int64_t(0)); y < std::min(top + images.kernel[0], images.height); y++)
            for (int64_t k = std::max(left, int64_t(0)); k < std::min(left + images.kernel[1], images.width); k++) {
                const float value = x.at[i / plane * image + size_t(y * images.width + k)];
                most = std::isnan(value) || value > most ? value : most;
                if (std::isnan(most)) return std::isnan(found);
            }
        return found == most;
    });
}

void print(const char* name, const Tally& tally) {
    std::printf("%-10s %8ld cases, %10ld outputs, %ld wrong", name, tally.cases, tally.outputs, tally.wrong);
    std::printf(tally.refused ? ", %ld refused as they should be\n" : "\n", tally.refused);
}

}  // namespace

int main(int count, char** arguments) {
    const long cases = count > 1 ? std::atol(arguments[1]) : 10000;
    Random random{count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0};
    for (const char* isa : ISAS) std::printf("%s: %s\n", isa, sct_use(isa) ? "not here" : "checked");
    for (long i = 0; i < cases; i++) random.chance(0.3) ? check_conv(random) : check_linear(random);
    for (long i = 0; i < cases / 10; i++) check_pool(random);
    print("linear", linears), print("quantized", quantized), print("conv", convolutions), print("pool", pools);
    const long broken = fuzz(random, cases * 2);
    return linears.wrong || quantized.wrong || convolutions.wrong || pools.wrong || broken ? 1 : 0;
}
