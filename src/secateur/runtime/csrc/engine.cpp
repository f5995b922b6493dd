// The C interface, and the choice of an instruction set.
#include <cstring>
#include <new>

#include "quantized.h"
#include "work.h"

namespace sct {
namespace {

const Kernels* best() {
#ifdef SCT_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512vbmi2"))
        return &avx512::kernels;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::kernels;
#endif
    return &portable::kernels;
}

const char* wrong(const sct_finish* finish) {
    if (finish->activation < SCT_NONE || finish->activation > SCT_SILU) return "the activation is unknown";
    if (finish->threads < 1) return "at least one thread is needed";
    if (finish->quantize != 0 && finish->quantize != 1) return "quantize is neither 0 nor 1";
    return nullptr;
}

}  // namespace

const Kernels* in_use = best();

}  // namespace sct

const char* sct_open(const void* bytes, uint64_t size, sct_matrix** matrix) {
    sct_matrix* made = new (std::nothrow) sct_matrix;
    if (!made) return "no memory";
    if (const char* wrong = sct::read_matrix(bytes, size, *made)) {
        delete made;
        return wrong;
    }
    *matrix = made;
    return nullptr;
}

void sct_close(sct_matrix* matrix) { delete matrix; }

uint32_t sct_rows(const sct_matrix* matrix) { return matrix->rows; }

uint32_t sct_cols(const sct_matrix* matrix) { return matrix->cols; }

const char* sct_linear(const sct_matrix* matrix, const float* x, int64_t n, int64_t stride, const sct_finish* finish,
                       float* y) {
    return sct_linears(&matrix, 1, x, n, stride, finish, &y);
}

const char* sct_linears(const sct_matrix* const* matrices, int32_t count, const float* x, int64_t n, int64_t stride,
                        const sct_finish* finishes, float* const* ys) try {
    constexpr int MOST = 16;
    if (count < 0 || count > MOST) return "more than 16 layers at once";
    if (n < 0 || stride < 0) return "a size is negative";
    sct::Part parts[MOST];
    int some = 0, threads = 1;
    double work = 0;
    for (int i = 0; i < count; i++) {
        const sct_matrix& m = *matrices[i];
        const sct_finish& finish = finishes[i];
        if (const char* message = sct::wrong(&finish)) return message;
        if (m.cols != matrices[0]->cols) return "layers that share activations differ in their columns";
        if (n == 0 || m.rows == 0) continue;
        const sct::Finish after{finish.bias, finish.residual, finish.activation};
        const double mine = double(n) * double(m.count) * m.height;
        if (finish.quantize) {
            const int helpers = sct::worthwhile(finish.threads, mine);
            const char* message = sct::quantized_linear(m, x, n, stride, after, helpers, ys[i]);
            if (message) return message;
            continue;
        }
        parts[some++] = {&m, after, ys[i]};
        work += mine;
        threads = finish.threads;
    }
    return some ? sct::linear(parts, some, x, n, stride, sct::worthwhile(threads, work)) : nullptr;
} catch (const std::bad_alloc&) {
    return "no memory";
}

const char* sct_conv(const sct_matrix* matrix, const float* x, const sct_images* images, const sct_finish* finish,
                     float* y) try {
    if (const char* message = sct::wrong(finish)) return message;
    if (finish->quantize) return "activations are quantized only for linear layers";
    const sct::Finish after{finish->bias, finish->residual, finish->activation};
    return sct::conv(*matrix, x, *images, after, finish->threads, y);
} catch (const std::bad_alloc&) {
    return "no memory";
}

const char* sct_max_pool(const float* x, const sct_images* images, int32_t threads, float* y) try {
    if (threads < 1) return "at least one thread is needed";
    return sct::max_pool(x, *images, threads, y);
} catch (const std::bad_alloc&) {
    return "no memory";
}

const char* sct_isa(void) { return sct::in_use->name; }

const char* sct_use(const char* isa) {
    const sct::Kernels* const most = sct::best();
    const sct::Kernels* const all[] = {
        &sct::portable::kernels,
#ifdef SCT_X86
        &sct::avx2::kernels, &sct::avx512::kernels,
#endif
    };
    if (!*isa) {
        sct::in_use = most;
        return nullptr;
    }
    for (const sct::Kernels* one : all) {
        if (!std::strcmp(one->name, isa)) {
            sct::in_use = one;
            return nullptr;
        }
        if (one == most) break;  // what follows, this machine cannot do
    }
    return "this machine or build has no such instruction set; expected portable, avx2 or avx512";
}

int32_t sct_version(void) { return 2; }
