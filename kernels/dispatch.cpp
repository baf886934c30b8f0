// The C interface: selects the build for this processor once.
#include "dropout.h"
#include "loss.h"
#include "norm_gelu.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#ifdef __linux__
#include <sys/mman.h>
#endif

#define D2V_DECLARE(isa)                                                                                               \
    namespace isa {                                                                                                    \
    void loss(const D2VLoss &);                                                                                        \
    void dropout(const void *, void *, int64_t, int, uint32_t, float, uint64_t, int);                                  \
    void norm_gelu(const void *, const float *, const float *, void *, float *, int64_t, int64_t, int, float, int);    \
    void norm_gelu_backward(const void *, const void *, const float *, const float *, const float *, void *, float *,  \
                            float *, int64_t, int64_t, int, int);                                                      \
    }
D2V_DECLARE(baseline)
#ifdef D2V_X86
D2V_DECLARE(avx2)
D2V_DECLARE(avx512)
#endif

#define D2V_BUILD(isa) {#isa, isa::loss, isa::dropout, isa::norm_gelu, isa::norm_gelu_backward}

namespace {

struct Build {
    const char *isa;
    decltype(&baseline::loss) loss;
    decltype(&baseline::dropout) dropout;
    decltype(&baseline::norm_gelu) norm_gelu;
    decltype(&baseline::norm_gelu_backward) norm_gelu_backward;
};

Build choose() {
    const char *wanted = std::getenv("D2V_ISA");
    const auto fits = [&](const char *isa) { return !wanted || !*wanted || !std::strcmp(wanted, isa); };
#ifdef D2V_X86
    __builtin_cpu_init();
    if (fits("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return D2V_BUILD(avx512);
    if (fits("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return D2V_BUILD(avx2);
#endif
    if (fits("baseline")) return D2V_BUILD(baseline);
    return {};
}

const Build build = choose();

// glibc maps larger allocations anew each time, and the first write to each page can cost more than the loss. Pages of 2 MB
// need far fewer faults.
constexpr uintptr_t MAPPED = 32 << 20, LARGE_PAGE = 2 << 20;

void ask_for_large_pages(void *x, uintptr_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t begin = ((uintptr_t)x + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    const uintptr_t end = ((uintptr_t)x + bytes) / LARGE_PAGE * LARGE_PAGE;
    if (bytes >= MAPPED) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

extern "C" {

int d2v_abi(void) { return D2V_ABI; }

const char *d2v_isa(void) { return build.isa; }

int d2v_loss(const D2VLoss *args) {
    if (!build.loss) return 3;
    const int64_t rows = args->dense ? args->batch * args->length : args->n_rows;
    ask_for_large_pages(args->grad, rows * args->channels * (args->prediction_dtype == D2V_FP32 ? 4 : 2));
    try {
        build.loss(*args);
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    } catch (const std::invalid_argument &) {
        return 2;
    } catch (const std::domain_error &) {
        return 4;
    }
}

int d2v_dropout(const void *x, void *y, int64_t n, int32_t dtype, uint32_t threshold, float scale, uint64_t seed,
                int32_t threads) {
    if (!build.dropout) return 3;
    build.dropout(x, y, n, dtype, threshold, scale, seed, threads);
    return 0;
}

int d2v_norm_gelu(const void *x, const float *weight, const float *bias, void *y, float *stats, int64_t rows, int64_t columns,
                  int32_t dtype, float eps, int32_t threads) {
    if (!build.norm_gelu) return 3;
    build.norm_gelu(x, weight, bias, y, stats, rows, columns, dtype, eps, threads);
    return 0;
}

int d2v_norm_gelu_backward(const void *x, const void *grad, const float *weight, const float *bias, const float *stats,
                           void *grad_x, float *grad_weight, float *grad_bias, int64_t rows, int64_t columns, int32_t dtype,
                           int32_t threads) {
    if (!build.norm_gelu_backward) return 3;
    try {
        build.norm_gelu_backward(x, grad, weight, bias, stats, grad_x, grad_weight, grad_bias, rows, columns, dtype, threads);
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}
}
