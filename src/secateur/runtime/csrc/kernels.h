// What every instruction set provides. The drivers in engine.cpp see nothing else of them.
#pragma once
#include "matrix.h"

namespace sct {

// Where the activations of a column lie: at ``x + at(column)``, tokens next to each other.
struct Places {
    const uint32_t* table;  // by column; NULL: ``step`` floats apart
    uint32_t step;
};

// What to add to a product, and the function to apply.
struct Finish {
    const float* bias;      // by row, may be NULL
    const float* residual;  // like y, may be NULL
    int activation;

    // What belongs to the outputs from a row, and from an element of y, on.
    Finish from(int64_t row, int64_t at) const {
        return {bias ? bias + row : nullptr, residual ? residual + at : nullptr, activation};
    }
};

struct Kernels {
    const char* name;
    // tile[16][PANEL] = 16 rows of the matrix times ``tokens`` (rounded up to LANES; at most PANEL) activations.
    void (*strip)(const Matrix&, uint32_t strip, const float* x, Places, int64_t tokens, float* tile);
    // sums[rows][PANEL] += the blocks of rows first..last that lie in a tile of columns, whose activations are
    // x[columns][width].
    void (*add_tile)(const Matrix&, const Cuts&, uint32_t tile, uint32_t first, uint32_t last, const float* x,
                     int64_t width, int64_t tokens, float* sums);
    // into[columns first..last][PANEL] = their activations.
    void (*gather)(const float* x, Places, uint32_t first, uint32_t last, int64_t tokens, float* into);
    // y[rows] = the rows of some strips times one token.
    void (*decode)(const Matrix&, uint32_t first, uint32_t last, const float* x, float* y);
    // panel[cols][width] = x[tokens][cols], transposed; tokens that are not there are zero.
    void (*pack)(const float* x, int64_t stride, int64_t tokens, int64_t cols, float* panel, int64_t width);
    // y[token][row] of up to GROUP tiles that follow each other, finished: tokens ``stride`` floats apart.
    void (*finish_tokens)(const float* tile, Finish, int64_t tokens, int rows, float* y, int64_t stride);
    // y[row][token] of up to GROUP tiles that follow each other, finished: rows ``stride`` floats apart.
    void (*finish_rows)(const float* tile, Finish, int64_t tokens, int rows, float* y, int64_t stride);

    // For quantized.cpp. The largest magnitude of a token; NaN where a value is not finite.
    float (*largest)(const float* x, int64_t cols);
    // bytes[cols][width] = 128 + panel[cols][width] * inverse[width], rounded, in the order that strip_int8 reads.
    void (*quantize)(const float* panel, const float* inverse, int64_t cols, int64_t width, uint8_t* bytes);
    // tile[16][PANEL] = 16 rows of int8 blocks of 4 rows, whose sums are given, times such bytes, times both scales.
    void (*strip_int8)(const Matrix&, const int32_t* sums, uint32_t strip, const uint8_t* bytes, const float* scales,
                       int64_t width, float* tile);
};

namespace portable { extern const Kernels kernels; }
#ifdef SCT_X86
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif

}  // namespace sct
