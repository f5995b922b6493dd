// What surrounds a product: activations into panels, and tiles into outputs with bias, residual and activation.
#include "bitmask.h"
#include "blocks.h"
#include "int8.h"
#include "kernels.h"
#include "tiles.h"
#include "vec.h"

namespace sct {
namespace SCT_ISA {
namespace {

typedef int32_t Lanes __attribute__((vector_size(SCT_LANES * 4)));

inline Vec pick(Lanes yes, Vec a, Vec b) { return yes ? a : b; }

inline Vec magnitude(Vec v) { return Vec(Lanes(v) & 0x7fffffff); }

// e^x to 2 units in the last place: 2^n by the exponent bits, the rest by a polynomial (Cephes). NaN stays NaN.
inline Vec exponential(Vec x) {
    x = pick(x > all(88.0f), all(88.0f), x);
    x = pick(x < all(-87.0f), all(-87.0f), x);
    const Vec shifted = x * all(1.44269504f) + all(12582912.0f);  // 1.5 * 2^23: rounds to an integer
    const Lanes n = Lanes(shifted) - Lanes(all(12582912.0f));
    const Vec whole = shifted - all(12582912.0f);
    const Vec r = x - whole * all(0.693359375f) + whole * all(2.12194440e-4f);
    Vec p = all(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = p * r + all(c);
    p = p * r * r + r + all(1.0f);
    return p * Vec((n + 127) << 23);
}

inline Vec sigmoid(Vec x) { return all(1.0f) / (all(1.0f) + exponential(-x)); }

// Abramowitz and Stegun 7.1.26, to 1.5e-7.
inline Vec error_function(Vec x) {
    const Vec positive = magnitude(x);
    const Vec t = all(1.0f) / (all(1.0f) + all(0.3275911f) * positive);
    Vec p = all(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = p * t + all(c);
    const Vec value = all(1.0f) - p * t * exponential(-positive * positive);
    return pick(x < all(0.0f), -value, value);
}

inline Vec activate(Vec v, int activation) {
    switch (activation) {
        case SCT_RELU: return pick(v < all(0.0f), all(0.0f), v);
        case SCT_GELU: return all(0.5f) * v * (all(1.0f) + error_function(v * all(0.70710678f)));
        case SCT_GELU_TANH:
            return v * sigmoid(all(1.59576912f) * (v + all(0.044715f) * v * v * v));
        case SCT_SILU: return v * sigmoid(v);
        default: return v;
    }
}

void strip(const Matrix& m, uint32_t s, const float* x, Places places, int64_t tokens, float* tile) {
    const bool mask = m.format == Format::bitmask;
    (mask ? bitmask_strip : blocks_strip)(m, s, x, places, tokens, tile);
    if (m.value != Value::i8) return;
    for (uint32_t r = 0; r < STRIP && s * STRIP + r < m.rows; r++)
        for (int64_t t = 0; t < tokens; t += LANES)
            store(tile + r * PANEL + t, load(tile + r * PANEL + t) * all(m.scales[s * STRIP + r]));
}

void decode(const Matrix& m, uint32_t first, uint32_t last, const float* x, float* y) {
    const bool mask = m.format == Format::bitmask;
    (mask ? bitmask_decode : blocks_decode)(m, first, last, x, y);
    if (m.value != Value::i8) return;
    const size_t end = size_t(last) * STRIP < m.rows ? size_t(last) * STRIP : m.rows;
    for (size_t row = size_t(first) * STRIP; row < end; row++) y[row] *= m.scales[row];
}

void pack(const float* x, int64_t stride, int64_t tokens, int64_t cols, float* panel, int64_t width) {
    for (int64_t t = 0; t < width; t += LANES) {
        for (int64_t k = 0; k < cols; k += LANES) {
            const int some = cols - k < LANES ? int(cols - k) : LANES;
            Vec rows[LANES] = {};
            for (int i = 0; i < LANES && t + i < tokens; i++) rows[i] = load_first(x + (t + i) * stride + k, some);
            transpose(rows);
            for (int i = 0; i < some; i++) store(panel + (k + i) * width + t, rows[i]);
        }
    }
}

// Whole lines of one token follow each other in y: lines of many tokens, which often lie multiples of 4096 bytes apart,
// would push each other out of the cache, and did take twice as long.
void finish_tokens(const float* tile, Finish f, int64_t tokens, int rows, float* y, int64_t stride) {
    alignas(64) float lines[LANES][GROUP * STRIP];
    for (int64_t t = 0; t < tokens; t += LANES) {
        const int there = tokens - t < LANES ? int(tokens - t) : LANES;
        for (int r = 0; r < rows; r += LANES) {
            const int some = rows - r < LANES ? rows - r : LANES;
            const Vec bias = f.bias ? load_first(f.bias + r, some) : Vec{};
            Vec block[LANES];
            for (int i = 0; i < LANES; i++) block[i] = load(tile + (r + i) * PANEL + t);
            transpose(block);
            for (int i = 0; i < there; i++) {
                Vec v = block[i] + bias;
                if (f.residual) v += load_first(f.residual + (t + i) * stride + r, some);
                store(lines[i] + r, activate(v, f.activation));
            }
        }
        for (int i = 0; i < there; i++) {
            float* const line = y + (t + i) * stride;
            int r = 0;
            for (; r + LANES <= rows; r += LANES) store(line + r, load(lines[i] + r));
            if (r < rows) store_first(line + r, load(lines[i] + r), rows - r);
        }
    }
}

void finish_rows(const float* tile, Finish f, int64_t tokens, int rows, float* y, int64_t stride) {
    for (int r = 0; r < rows; r++, tile += PANEL, y += stride) {
        const Vec bias = all(f.bias ? f.bias[r] : 0.0f);
        const float* const residual = f.residual ? f.residual + r * stride : nullptr;
        for (int64_t t = 0; t < tokens; t += LANES) {
            const int some = tokens - t < LANES ? int(tokens - t) : LANES;
            Vec v = load_first(tile + t, some) + bias;
            if (residual) v += load_first(residual + t, some);
            store_first(y + t, activate(v, f.activation), some);
        }
    }
}

}  // namespace

#define SCT_TEXT(name) #name
#define SCT_NAME(name) SCT_TEXT(name)
const Kernels kernels = {SCT_NAME(SCT_ISA), strip, add_tile, gather, decode, pack, finish_tokens, finish_rows, largest, quantize, strip_int8};

}  // namespace SCT_ISA
}  // namespace sct
