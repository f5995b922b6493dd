// int8 blocks of 4 rows times activations of 8 bits, added up in integers.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace sct {
namespace SCT_ISA {

float largest(const float* x, int64_t cols);
void quantize(const float* panel, const float* inverse, int64_t cols, int64_t width, uint8_t* bytes);
void strip_int8(const Matrix&, const int32_t* sums, uint32_t strip, const uint8_t* bytes, const float* scales,
                int64_t width, float* tile);

}  // namespace SCT_ISA
}  // namespace sct
