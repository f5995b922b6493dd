// Linear layers in integers; quantized.cpp says what is computed.
#pragma once
#include "kernels.h"

namespace sct {

const char* quantized_linear(const sct_matrix&, const float* x, int64_t n, int64_t stride, const Finish&, int threads,
                             float* y);

}  // namespace sct
