// The C interface: picks, once, the build that fits this processor.
#include "loss.h"

#include <new>
#include <stdexcept>

#define D2V_DECLARE(isa) namespace isa { void loss(const D2VLoss &); }
D2V_DECLARE(baseline)
#ifdef D2V_X86
D2V_DECLARE(avx2)
D2V_DECLARE(avx512)
#endif

namespace {

struct Build {
    const char *isa;
    void (*loss)(const D2VLoss &);
};

Build choose() {
#ifdef D2V_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return {"avx512", avx512::loss};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"avx2", avx2::loss};
#endif
    return {"baseline", baseline::loss};
}

const Build build = choose();

}  // namespace

extern "C" {

int d2v_abi(void) { return D2V_ABI; }

const char *d2v_isa(void) { return build.isa; }

int d2v_loss(const D2VLoss *args) {
    try {
        build.loss(*args);
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    } catch (const std::invalid_argument &) {
        return 2;
    }
}
}
