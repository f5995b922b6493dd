// Bits that say where values are, times a panel of tokens, and times one token.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace sct {
namespace SCT_ISA {

void bitmask_strip(const Matrix&, uint32_t strip, const float* x, Places, int64_t tokens, float* tile);
void bitmask_decode(const Matrix&, uint32_t first, uint32_t last, const float* x, float* y);

}  // namespace SCT_ISA
}  // namespace sct
