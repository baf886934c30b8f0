#include "norm_gelu.h"
#include "vec.h"

#include <algorithm>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

namespace D2V_ISA {

constexpr int64_t PER_THREAD = 1 << 15;  // minimum values per thread; below it, waking a thread takes longer than the work

// e^x for x <= 0 to 1e-7: 2^n · e^r with |r| <= ln 2 / 2 and a Taylor polynomial for e^r; 0 below -87.
D2V_INLINE inline Vec exp_negative(Vec x) {
    const Vec low = splat(-87.0f), clamped = select(x > low, x, low);
    const Vec shifted = clamped * 1.44269504f + 0x1.8p23f;  // adding 1.5 · 2²³ rounds to a whole number
    const Vec n = shifted - 0x1.8p23f;
    const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec e = splat(1.0f / 5040);
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) e = e * r + c;
    const Bits power = (as_bits(shifted) << 23) + (127u << 23);
    return select(x > low, e * as_float(power), Vec{});
}

// Φ, the distribution of the standard normal, and its density. 1 - Φ(|x|) = ½ · polynomial(t) · e^(-x²/2) with
// t = 1 / (1 + p·|x|/√2), to 7.5e-8 (Abramowitz & Stegun 7.1.26).
struct Normal { Vec distribution, density; };
D2V_INLINE inline Normal normal(Vec x) {
    const Vec size = as_float(as_bits(x) & 0x7fffffff);
    const Vec e = exp_negative(x * x * -0.5f), t = 1.0f / (1.0f + size * (0.3275911f * 0.70710678f));
    Vec tail = splat(1.061405429f);
    for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.0f}) tail = tail * t + c;
    tail = tail * e * 0.5f;
    return {select(x < Vec{}, tail, 1.0f - tail), e * 0.39894228f};
}

constexpr int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

// Zero-padded parameters, so that whole vectors can be read.
static std::vector<float> padded_copy(const float *x, int64_t n) {
    std::vector<float> y(padded(n));
    std::copy_n(x, n, y.begin());
    return y;
}

static int threads_for(int threads, int64_t values) {
    return (int)std::max<int64_t>(1, std::min<int64_t>(threads, values / PER_THREAD));
}

template <class T>
void forward(const T *x, const float *weight, const float *bias, T *y, float *stats, int64_t rows, int64_t columns, float eps,
             int threads) {
    const std::vector<float> w = padded_copy(weight, columns), b = padded_copy(bias, columns);
#pragma omp parallel for schedule(static) num_threads(threads_for(threads, rows * columns))
    for (int64_t r = 0; r < rows; ++r) {
        const Row<T> in{x + r * columns};
        T *out = y + r * columns;
        Vec total[4] = {}, squares[4] = {};
        each(in, columns, [&](int64_t, Vec v, Mask, int u) D2V_INLINE { total[u] += v; });
        const float mean = sum((total[0] + total[1]) + (total[2] + total[3])) / columns;
        each(in, columns, [&](int64_t, Vec v, Mask lanes, int u) D2V_INLINE {
            const Vec d = select(lanes, v - mean, Vec{});
            squares[u] += d * d;
        });
        const float scale = 1 / deviation(sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / columns, eps);
        if (stats) stats[2 * r] = mean, stats[2 * r + 1] = scale;
        each(in, columns, [&](int64_t i, Vec v, Mask, int) D2V_INLINE {
            const Vec u = (v - mean) * scale * widen(&w[i]) + widen(&b[i]);
            narrow(u * normal(u).distribution, out + i, columns - i);
        });
    }
}

template <class T>
void backward(const T *x, const T *grad, const float *weight, const float *bias, const float *stats, T *grad_x,
              float *grad_weight, float *grad_bias, int64_t rows, int64_t columns, int threads) {
    const int64_t ld = padded(columns);
    const std::vector<float> w = padded_copy(weight, columns), b = padded_copy(bias, columns);
    threads = threads_for(threads, rows * columns);
    // Per thread: accumulated gradients of weight and bias, the gradient of a row's normalised values, and those values.
    std::vector<float> workspace(threads * 4 * ld);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; ++r) {
        float *gw = workspace.data() + omp_get_thread_num() * 4 * ld, *gb = gw + ld, *gn = gb + ld, *normalised = gn + ld;
        const float mean = stats[2 * r], scale = stats[2 * r + 1];
        const Row<T> g{grad + r * columns};
        T *out = grad_x + r * columns;
        Vec total[4] = {}, product[4] = {};
        each(Row<T>{x + r * columns}, columns, [&](int64_t i, Vec v, Mask lanes, int u) D2V_INLINE {
            const Vec n = select(lanes, (v - mean) * scale, Vec{}), z = n * widen(&w[i]) + widen(&b[i]);
            const Normal at = normal(z);
            const Vec gz = (columns - i < W ? g.tail(i, columns - i) : g(i)) * (at.distribution + z * at.density);
            narrow(widen(gw + i) + gz * n, gw + i);
            narrow(widen(gb + i) + gz, gb + i);
            const Vec gv = gz * widen(&w[i]);
            narrow(gv, gn + i);
            narrow(n, normalised + i);
            total[u] += gv;
            product[u] += gv * n;
        });
        const float a = sum((total[0] + total[1]) + (total[2] + total[3])) / columns;
        const float c = sum((product[0] + product[1]) + (product[2] + product[3])) / columns;
        for (int64_t i = 0; i < columns; i += W)
            narrow((widen(gn + i) - a - widen(normalised + i) * c) * scale, out + i, columns - i);
    }
    std::fill_n(grad_weight, columns, 0.0f);
    std::fill_n(grad_bias, columns, 0.0f);
    for (int t = 0; t < threads; ++t)
        for (int64_t i = 0; i < columns; ++i) {
            grad_weight[i] += workspace[t * 4 * ld + i];
            grad_bias[i] += workspace[t * 4 * ld + ld + i];
        }
}

template <class F> void with_dtype(int dtype, F call) {
    if (dtype == D2V_FP32) call(0.0f);
    else if (dtype == D2V_BF16) call(bf16{});
    else call(fp16{});
}

void norm_gelu(const void *x, const float *weight, const float *bias, void *y, float *stats, int64_t rows, int64_t columns,
               int dtype, float eps, int threads) {
    with_dtype(dtype, [&](auto zero) {
        typedef decltype(zero) T;
        forward((const T *)x, weight, bias, (T *)y, stats, rows, columns, eps, threads);
    });
}

void norm_gelu_backward(const void *x, const void *grad, const float *weight, const float *bias, const float *stats,
                        void *grad_x, float *grad_weight, float *grad_bias, int64_t rows, int64_t columns, int dtype,
                        int threads) {
    with_dtype(dtype, [&](auto zero) {
        typedef decltype(zero) T;
        backward((const T *)x, (const T *)grad, weight, bias, stats, (T *)grad_x, grad_weight, grad_bias, rows, columns, threads);
    });
}

}  // namespace D2V_ISA
