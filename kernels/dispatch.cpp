// The C interface: picks, once, the build that fits this processor.
#include "dropout.h"
#include "loss.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#define D2V_DECLARE(isa)                                                               \
    namespace isa {                                                                    \
    void loss(const D2VLoss &);                                                        \
    void dropout(const void *, void *, int64_t, int, uint32_t, float, uint64_t, int);  \
    }
D2V_DECLARE(baseline)
#ifdef D2V_X86
D2V_DECLARE(avx2)
D2V_DECLARE(avx512)
#endif

namespace {

struct Build {
    const char *isa;
    void (*loss)(const D2VLoss &);
    void (*dropout)(const void *, void *, int64_t, int, uint32_t, float, uint64_t, int);
};

Build choose() {
    const char *wanted = std::getenv("D2V_ISA");
    const auto fits = [&](const char *isa) { return !wanted || !*wanted || !std::strcmp(wanted, isa); };
#ifdef D2V_X86
    __builtin_cpu_init();
    if (fits("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return {"avx512", avx512::loss, avx512::dropout};
    if (fits("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return {"avx2", avx2::loss, avx2::dropout};
#endif
    if (fits("baseline")) return {"baseline", baseline::loss, baseline::dropout};
    return {nullptr, nullptr, nullptr};
}

const Build build = choose();

}  // namespace

extern "C" {

int d2v_abi(void) { return D2V_ABI; }

const char *d2v_isa(void) { return build.isa; }

int d2v_loss(const D2VLoss *args) {
    if (!build.loss) return 3;
    try {
        build.loss(*args);
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    } catch (const std::invalid_argument &) {
        return 2;
    }
}

int d2v_dropout(const void *x, void *y, int64_t n, int32_t dtype, uint32_t threshold, float scale, uint64_t seed,
                int32_t threads) {
    if (!build.dropout) return 3;
    build.dropout(x, y, n, dtype, threshold, scale, seed, threads);
    return 0;
}
}
