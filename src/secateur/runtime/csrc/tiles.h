// Tiles of columns, for every instruction set; cuts.h says why.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace sct {
namespace SCT_ISA {

void gather(const float* x, Places, uint32_t first, uint32_t last, int64_t tokens, float* into);
void add_tile(const Matrix&, const Cuts&, uint32_t tile, uint32_t first, uint32_t last, const float* x, int64_t width,
              int64_t tokens, float* sums);

}  // namespace SCT_ISA
}  // namespace sct
