// Dropout for CPUs. The mask is a function of (seed, position), so it is never stored.
#pragma once
#include "loss.h"

#ifdef __cplusplus
extern "C" {
#endif

// y[i] = x[i] · scale where hash(seed, i) >= threshold, else 0, for n contiguous values of a D2VDtype; y may be x.
// The result does not depend on the number of threads or the build. 0; 3 if no build runs.
D2V_PUBLIC int d2v_dropout(const void *x, void *y, int64_t n, int32_t dtype, uint32_t threshold, float scale, uint64_t seed,
                           int32_t threads);

#ifdef __cplusplus
}
#endif
