// Layer norm and GELU in one pass, as after each convolution of the speech feature encoder.
#pragma once
#include "loss.h"

#ifdef __cplusplus
extern "C" {
#endif

// y = GELU(norm(x) · weight + bias), each row of `columns` values normalised separately; contiguous, x and y of a D2VDtype.
// stats (rows, 2) receives mean and 1/σ of each row; NULL if no backward follows. 0; 3 if no build runs.
D2V_PUBLIC int d2v_norm_gelu(const void *x, const float *weight, const float *bias, void *y, float *stats, int64_t rows,
                             int64_t columns, int32_t dtype, float eps, int32_t threads);
// Gradients of x (like x), weight and bias from grad, that of y. 0; 1 if memory ran out; 3 if no build runs.
D2V_PUBLIC int d2v_norm_gelu_backward(const void *x, const void *grad, const float *weight, const float *bias,
                                      const float *stats, void *grad_x, float *grad_weight, float *grad_bias, int64_t rows,
                                      int64_t columns, int32_t dtype, int32_t threads);

#ifdef __cplusplus
}
#endif
