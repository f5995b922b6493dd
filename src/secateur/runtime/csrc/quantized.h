// Linear layers in integers; quantized.cpp says what is computed.
#pragma once
#include <vector>

#include "kernels.h"

namespace sct {

// The sum of every row of int8 blocks of 4 rows, rows that fill the last block included; of others nothing.
std::vector<int32_t> row_sums(const Matrix&);

const char* quantized_linear(const Matrix&, const int32_t* sums, const float* x, int64_t n, int64_t stride,
                             const Finish&, int threads, float* y);

}  // namespace sct
