// The C interface of the sparse engine. It knows nothing of torch: pointers and sizes in, numbers out.
//
// Functions that can fail return a message that lives as long as the library, NULL where all went well.
#pragma once
#include <stdint.h>

#define SECATEUR_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// A packed weight, checked and ready to multiply. It borrows the bytes: keep them alive and unchanged until close.
typedef struct sct_matrix sct_matrix;

typedef enum { SCT_NONE = 0, SCT_RELU = 1, SCT_GELU = 2, SCT_GELU_TANH = 3, SCT_SILU = 4 } sct_activation;

// What follows the product: y = activation(product + bias + residual). bias has one value a row, residual the shape of
// y; both may be NULL. threads: how many may work, at least 1. quantize: 1 rounds the activations of sct_linear to 8 bits
// and adds up integers, for int8 blocks of 4 rows only (quantized.cpp says how); 0 keeps them float32.
typedef struct {
    const float* bias;
    const float* residual;
    int32_t activation;
    int32_t threads;
    int32_t quantize;
} sct_finish;

// Images are (batch, channels, height, width), contiguous. The columns of the matrix are (channel, ky, kx), row-major,
// over all channels, whatever the groups.
typedef struct {
    int64_t batch, channels, height, width;
    int64_t kernel[2], stride[2], padding[2], dilation[2];
} sct_images;

// Reads a packed weight (docs/format.md) and checks every index in it, so that no bytes, however made, lead a product
// out of its bounds.
SECATEUR_API const char* sct_open(const void* bytes, uint64_t size, sct_matrix** matrix);
SECATEUR_API void sct_close(sct_matrix* matrix);
SECATEUR_API uint32_t sct_rows(const sct_matrix* matrix);
SECATEUR_API uint32_t sct_cols(const sct_matrix* matrix);

// x (n, cols) -> y (n, rows), rows of x ``stride`` values apart.
SECATEUR_API const char* sct_linear(const sct_matrix* matrix, const float* x, int64_t n, int64_t stride,
                                    const sct_finish* finish, float* y);
// The same for layers that read the same x, such as queries, keys and values: it is brought into order once.
SECATEUR_API const char* sct_linears(const sct_matrix* const* matrices, int32_t count, const float* x, int64_t n,
                                     int64_t stride, const sct_finish* finishes, float* const* ys);
// x -> y (batch, rows, height', width').
SECATEUR_API const char* sct_conv(const sct_matrix* matrix, const float* x, const sct_images* images,
                                  const sct_finish* finish, float* y);

// x -> y (batch, channels, height', width'), the largest value under the kernel, NaN if there is one. dilation is 1,
// padding at most half of the kernel.
SECATEUR_API const char* sct_max_pool(const float* x, const sct_images* images, int32_t threads, float* y);

// The instruction set in use: "avx512", "avx2" or "portable". sct_use changes it; "" chooses the best of this machine.
SECATEUR_API const char* sct_isa(void);
SECATEUR_API const char* sct_use(const char* isa);

// Makes loops run on the threads of an OpenMP runtime that is already there, given its GOMP_parallel; NULL: own threads.
// Two pools of threads that wait by spinning would take the cores from each other.
SECATEUR_API void sct_share_threads(void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned));

// Changes with every change of this interface or of the packed format.
SECATEUR_API int32_t sct_version(void);

#ifdef __cplusplus
}
#endif
