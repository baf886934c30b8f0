// The fused data2vec loss for CPUs, as a plain C interface: no libtorch, so one binary serves every torch version.
#pragma once
#include <stdint.h>

#define D2V_ABI 5  // increment when a declaration in these headers changes; d2v_fast/ops/native.py checks it

#define D2V_PUBLIC __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum D2VDtype { D2V_FP32, D2V_BF16, D2V_FP16 };

typedef struct {
    int64_t batch, views, length, channels, n_layers, n_rows;
    const void *const *layers;   // K pointers to (B, T, C)
    const int64_t *strides;      // (K, 3) in elements
    const void *predictions;     // (N, C), a row for each masked position, or (B, T, C) if dense; contiguous
    void *grad;                  // like predictions
    const uint8_t *mask;         // (B, M, T)
    const uint8_t *padding;      // (B, T) or NULL
    const char *norm, *target_norm;  // names, as in d2v_fast/choices.py
    int32_t layer_dtype, prediction_dtype, dense, mean, threads;
    float beta;
    double scale;
    float *loss, *factor, *count;  // scalars; the gradient is grad · factor
    float *moments;                // (4, C): target mean, target M2, prediction mean, prediction M2; or NULL
    float *target_mean;            // (B, C): mean of the targets over T; or NULL
} D2VLoss;

D2V_PUBLIC int d2v_abi(void);
// The active build: "avx512", "avx2" or "baseline". The environment variable D2V_ISA selects one; NULL if there is no such
// build or this processor cannot run it.
D2V_PUBLIC const char *d2v_isa(void);
// 0; 1 if memory ran out; 2 if n_rows are not the masked positions; 3 if no build runs; 4 if a norm is unknown.
D2V_PUBLIC int d2v_loss(const D2VLoss *args);

#ifdef __cplusplus
}
#endif
