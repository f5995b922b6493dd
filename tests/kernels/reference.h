// Plain loops in double precision, and what may differ from them.
#pragma once
#include <cmath>

#include "packed.h"
#include "secateur.h"

// One output before what follows it: the sum, the sum of magnitudes, and how many terms there were.
struct Sum {
    double value = 0, size = 0;
    size_t terms = 0;

    void add(double weight, double x) {
        value += weight * x;
        size += std::fabs(weight * x);
        terms++;
    }
};

// Only what is stored is multiplied; the zeros inside blocks are stored.
template <class At>
Sum product(const Weight& w, const std::vector<size_t>& starts, uint32_t row, At&& x) {
    Sum sum;
    const uint32_t block_row = row / w.height;
    for (size_t i = 0; i < w.columns[block_row].size(); i++) {
        const double value = w.values[(starts[block_row] + i) * w.height + row % w.height];
        sum.add(value * w.scales[row], x(w.columns[block_row][i]));
    }
    return sum;
}

inline std::vector<size_t> starts_of(const Weight& w) {
    std::vector<size_t> starts{0};
    for (const auto& row : w.columns) starts.push_back(starts.back() + row.size());
    return starts;
}

inline double activated(double v, int activation) {
    switch (activation) {
        case SCT_RELU: return v < 0 ? 0 : v;
        case SCT_GELU: return 0.5 * v * (1 + std::erf(v * std::sqrt(0.5)));
        case SCT_GELU_TANH: return 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
        case SCT_SILU: return v / (1 + std::exp(-v));
        default: return v;
    }
}

// Whether an output is the reference's: rounding of every term and sum may differ, and of the activation's polynomial.
inline bool agrees(float found, Sum sum, int activation, bool exact) {
    if (!std::isfinite(sum.value) && activation > SCT_RELU) return true;  // undefined: infinity times zero
    const double expected = activated(sum.value, activation);
    if (std::isnan(expected)) return std::isnan(found);
    if (std::isinf(expected) || (exact && activation <= SCT_RELU)) return double(found) == expected;
    const double sums = 1.2e-7 * (double(sum.terms) * 0.5 + 4) * sum.size;
    const double polynomial = activation > SCT_RELU ? 1e-6 * (1 + std::fabs(sum.value)) : 0;
    return std::fabs(double(found) - expected) <= 1.2 * sums + polynomial + 1e-37;
}

// What quantized.cpp promises, to the last bit.
struct Quantized {
    float scale = 1;
    bool finite = true;
    std::vector<int> q;

    Quantized(const float* x, uint32_t cols) : q(cols) {
        float most = 0;
        for (uint32_t k = 0; k < cols; k++) {
            finite = finite && std::isfinite(x[k]);
            most = std::fmax(most, std::fabs(x[k]));
        }
        if (!finite || most < 0x1p-100f) return;
        scale = most / 127;
        const float inverse = 127 / most;
        for (uint32_t k = 0; k < cols; k++) q[k] = int(std::nearbyint(x[k] * inverse));
    }

    float times(const Weight& w, const std::vector<size_t>& starts, uint32_t row) const {
        if (!finite) return NAN;
        int64_t sum = 0;
        for (size_t i = 0; i < w.columns[row / 4].size(); i++)
            sum += int64_t(w.values[(starts[row / 4] + i) * 4 + row % 4]) * q[w.columns[row / 4][i]];
        return float(int32_t(sum)) * scale * w.scales[row];
    }
};
