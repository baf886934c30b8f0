// Norm of the top-K layers, their average, masked smooth-L1 and its gradient in one pass over memory (data2vec section 3.3;
// formulas as in d2v_fast/ops/reference.py). Built once per instruction set, with D2V_ISA as its name.
//
// The work is split into tiles: some positions × some columns. A tile sums the normalised layers in a block that stays in the
// cache, then scores it against all views. The statistics needed to normalise a position determine the split:
//   layer norm:    one row, so a tile is a scored position × all columns, and only scored rows are read;
//   instance norm: a column of one sample, so a tile is a sample × as many columns as fit in the cache;
//   a mix of both: a sample × all columns.
#include "loss.h"
#include "vec.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

namespace D2V_ISA {

constexpr float EPS = 1e-5f;
constexpr int64_t ROWS = 16;      // scored positions per thread and turn under layer norm
constexpr int TOGETHER = 8;       // rows summed in one pass over the block
constexpr int64_t AHEAD = 16;     // rows to prefetch ahead; a single one cannot hide the memory latency
constexpr int64_t AHEAD_SCORED = 4;  // likewise for predictions and gradients, whose rows within a view are contiguous
// Bytes of a thread's block. Splitting rows to shrink it costs more than leaving the L2 cache: memory is fast in long runs.
constexpr int64_t BLOCK = 1280 << 10;
constexpr int64_t BLOCK_OF_VIEWS = 1 << 20;  // with several views most positions are scored, so blocks are full
constexpr int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

enum class Norm { none, layer, instance, batch, group };

Norm named(const char *name) {
    constexpr std::pair<const char *, Norm> norms[] = {
        {"none", Norm::none}, {"layer", Norm::layer}, {"instance", Norm::instance}, {"batch", Norm::batch}, {"group", Norm::group}};
    for (const auto &[known, norm] : norms)
        if (!std::strcmp(name, known)) return norm;
    throw std::domain_error(name);
}

typedef std::unique_ptr<float[]> Floats;

// y = ((x - shift) - delta) · weight. The mean is shift + delta, with shift close to it, so that neither the variance nor the
// difference cancels if |mean| ≫ σ.
struct Affine { float shift, delta, weight; };
struct ColumnAffine { float *shift, *delta, *weight; };

template <int N> D2V_INLINE inline float total(const Vec (&s)[N]) {
    if constexpr (N == 2) return sum(s[0] + s[1]);
    else return sum((s[0] + s[1]) + (s[2] + s[3]));
}

// P rows at once, to hide the latency of each other's sums. The shift is the mean of the first W values; because they are part
// of the row, cancellation is bounded by n / W. `next` is prefetched at the same time; m2 is Σ(x - mean)², if requested.
template <int P, class R> void row_stats(const R *rows, const R *next, int64_t n, Affine *f, float *m2 = nullptr) {
    constexpr int SUMS = 4 / P;
    const int64_t first = std::min(n, W);
    for (int j = 0; j < P; ++j) f[j].shift = sum(n < W ? rows[j].tail(0, n) : rows[j](0)) / first;
    Vec d1[P][SUMS] = {}, d2[P][SUMS] = {};
    each(rows[0], n, [&](int64_t i, Vec x, Mask lanes, int u) D2V_INLINE {
        for (int j = 0; j < P; ++j) {
            if (u * W * R::bytes % 64 == 0) next[j].prefetch(i);  // once for each 64 bytes
            if (j) x = i + W <= n ? rows[j](i) : rows[j].tail(i, n - i);
            const Vec d = select(lanes, x - f[j].shift, Vec{});
            d1[j][u % SUMS] += d;
            d2[j][u % SUMS] += d * d;
        }
    });
    for (int j = 0; j < P; ++j) {
        f[j].delta = total(d1[j]) / n;
        const float squares = std::max(total(d2[j]) - n * f[j].delta * f[j].delta, 0.0f);
        if (m2) m2[j] = squares;
        f[j].weight = 1 / deviation(squares / n, EPS);
    }
}

// Unrolled over `count` rows at compile time.
template <int M = TOGETHER, class F> D2V_INLINE inline void with_count(int64_t count, F f) {
    if (count == M) f(std::integral_constant<int, M>());
    else if constexpr (M > 1) with_count<M - 1>(count, f);
}

// Sums at most TOGETHER normalised rows; overwrites the block or adds to it.
template <class R> void add_rows(const R *rows, const Affine *f, int64_t count, int64_t n, float *block, bool begin) {
    with_count(count, [&](auto m) D2V_INLINE {
        float rest = 0;
        for (int j = 0; j < m; ++j) rest -= f[j].delta * f[j].weight;
        vectors(n, [&](int64_t i, auto whole) D2V_INLINE {
            Vec y = begin ? splat(rest) : widen(block + i) + rest;
            for (int j = 0; j < m; ++j) y += (rows[j](i, n, whole) - f[j].shift) * f[j].weight;
            narrow(y, block + i);
        });
    });
}

// Adds each of the rows, normalised by column, to its row of the block.
template <class R> void add_rows(const R *rows, ColumnAffine f, int64_t count, int64_t n, float *block, int64_t ld) {
    with_count(count, [&](auto m) D2V_INLINE {
        vectors(n, [&](int64_t i, auto whole) D2V_INLINE {
            const Vec shift = widen(f.shift + i), delta = widen(f.delta + i), weight = widen(f.weight + i);
            for (int j = 0; j < m; ++j) {
                float *y = block + j * ld + i;
                narrow(widen(y) + ((rows[j](i, n, whole) - shift) - delta) * weight, y);
            }
        });
    });
}

// Statistics of n columns over rows at(0) … at(rows - 1): f.shift and f.delta as above, f.weight = Σ(x - mean)².
// The shift is the mean of the first rows; because they are part of the population, cancellation is bounded by rows / 16.
template <class At> void column_squares(At at, int64_t rows, int64_t n, ColumnAffine f) {
    const int64_t first = std::min<int64_t>(rows, 16);
    decltype(at(0)) some[TOGETHER], next[TOGETHER];
    const auto take = [&](int64_t r, int64_t end) {
        const int64_t count = std::min<int64_t>(end - r, TOGETHER);
        for (int64_t j = 0; j < count; ++j) {
            some[j] = at(r + j);
            next[j] = at(std::min(r + j + AHEAD, rows - 1));
        }
        return count;
    };
    Affine mean[TOGETHER];
    std::fill_n(mean, TOGETHER, Affine{0, 0, 1.0f / first});
    if (!rows) std::fill_n(f.shift, padded(n), 0.0f);
    for (int64_t r = 0; r < first; r += TOGETHER) add_rows(some, mean, take(r, first), n, f.shift, r == 0);
    std::fill_n(f.delta, padded(n), 0.0f);
    std::fill_n(f.weight, padded(n), 0.0f);
    for (int64_t r = 0; r < rows; r += TOGETHER)
        with_count(take(r, rows), [&](auto m) D2V_INLINE {
            vectors(n, [&](int64_t i, auto whole) D2V_INLINE {
                const Vec shift = widen(f.shift + i);
                Vec delta = widen(f.delta + i), squares = widen(f.weight + i);
                for (int j = 0; j < m; ++j) {
                    next[j].prefetch(i);
                    const Vec d = some[j](i, n, whole) - shift;
                    delta += d;
                    squares += d * d;
                }
                narrow(delta, f.delta + i);
                narrow(squares, f.weight + i);
            });
        });
    for (int64_t i = 0; i < n; ++i) {
        f.delta[i] /= std::max<int64_t>(rows, 1);
        f.weight[i] = std::max(f.weight[i] - rows * f.delta[i] * f.delta[i], 0.0f);
    }
}

void squares_to_weights(float *squares, int64_t n, int64_t rows, int64_t n_layers) {
    for (int64_t i = 0; i < n; ++i) squares[i] = 1 / (deviation(squares[i] / std::max<int64_t>(rows, 1), EPS) * n_layers);
}

// Mean and M2 of the targets and of the predictions seen so far, per column (Welford 1962).
struct Moments {
    std::vector<float> counts[2];  // per column, because threads process columns of different samples
    Floats values;                 // (4, C)
    int64_t channels;

    explicit Moments(int64_t c) : counts{std::vector<float>(c), std::vector<float>(c)}, values(new float[4 * padded(c)]()), channels(c) {}
    float *field(int64_t i) { return values.get() + i * padded(channels); }

    // Adds a row of targets (which = 0) or predictions (1) `weight` times.
    void add(int which, Row<float> row, float weight, int64_t c0, int64_t n) {
        std::vector<float> &count = counts[which];
        const float next = count[c0] += weight;  // columns of one tile have the same count
        for (int64_t i = 1; i < n; ++i) count[c0 + i] = next;
        const float share = weight / next;
        float *mean = field(2 * which) + c0, *m2 = field(2 * which + 1) + c0;
        each(row, n, [&](int64_t i, Vec x, Mask lanes, int) D2V_INLINE {
            const Vec old = widen(mean + i), d = x - old, now = old + d * share;
            narrow(select(lanes, now, old), mean + i);
            narrow(select(lanes, widen(m2 + i) + d * (x - now) * weight, widen(m2 + i)), m2 + i);
        });
    }

    // Chan et al. 1979.
    void merge(Moments &other) {
        for (int which = 0; which < 2; ++which)
            for (int64_t c = 0; c < channels; ++c) {
                const double a = counts[which][c], b = other.counts[which][c];
                if (b == 0) continue;
                float &mean = field(2 * which)[c], &m2 = field(2 * which + 1)[c];
                const double d = (double)other.field(2 * which)[c] - mean;
                m2 = m2 + other.field(2 * which + 1)[c] + d * d * a * b / (a + b);
                mean = mean + d * b / (a + b);
                counts[which][c] = a + b;
            }
    }
};

template <class T, bool STRIDED> class Loss {
    const D2VLoss &a;
    const int64_t M, T_, C, K;
    const Norm norm, target_norm;
    std::vector<int32_t> row_of;   // (B, M, T): prediction row of each position of each view, -1 = not scored
    std::vector<int32_t> kept;     // positions that are not padding
    std::vector<int32_t> scored;   // positions that are scored in some view
    std::vector<int64_t> kept_from, scored_from;  // where each sample begins
    int64_t n_scored = 0;          // in all views together
    Floats batch;                  // (3, K, C): shift, delta, weight of batch norm
    float grad_scale;

    using R = std::conditional_t<STRIDED, StridedRow<T>, Row<T>>;

    R row(int64_t k, int64_t position, int64_t c0) const {
        const int64_t *s = a.strides + 3 * k, b = position / T_, t = position % T_;
        const T *x = (const T *)a.layers[k] + b * s[0] + t * s[1] + c0 * s[2];
        if constexpr (STRIDED) return {x, s[2]};
        else return {x};
    }

    struct Workspace {
        Floats block, affine, prediction;
        Moments moments;
        double loss = 0;
    };

    ColumnAffine batch_affine(int64_t k, int64_t c0) const {
        float *x = batch.get() + k * padded(C) + c0;
        return {x, x + K * padded(C), x + 2 * K * padded(C)};
    }

    static ColumnAffine affine(Workspace &w, int64_t n) {
        float *x = w.affine.get();
        return {x, x + padded(n), x + 2 * padded(n)};
    }

    // The mean of the normalised layers at a position; prefetches the next of the `left` remaining positions.
    void average_row(const int32_t *position, int64_t left, int64_t c0, int64_t n, float *block) const {
        R rows[TOGETHER], next[TOGETHER];
        Affine f[TOGETHER];
        for (int64_t k = 0; k < K; k += TOGETHER) {
            const int64_t count = std::min<int64_t>(TOGETHER, K - k);
            for (int64_t j = 0; j < count; ++j) {
                const int64_t ahead = std::min(k + j + AHEAD, left * K - 1);
                rows[j] = row(k + j, *position, c0);
                next[j] = row(ahead % K, position[ahead / K], c0);
                f[j] = {0, 0, 1};
            }
            if (norm == Norm::layer) {
                constexpr int P = R::bytes == 4 ? 2 : 1;  // two rows at once are slower in half precision
                int64_t j = 0;
                for (; j + P <= count; j += P) row_stats<P>(rows + j, next + j, n, f + j);
                if (j < count) row_stats<1>(rows + j, next + j, n, f + j);
            }
            for (int64_t j = 0; j < count; ++j) f[j].weight /= K;
            add_rows(rows, f, count, n, block, k == 0);
        }
    }

    // The mean of the normalised layers at some positions, into w.block.
    void average(Workspace &w, const int32_t *positions, int64_t count, int64_t left, int64_t b, int64_t c0, int64_t n) const {
        const int64_t ld = padded(n);
        float *block = w.block.get();
        if (norm == Norm::layer || norm == Norm::none) {
            for (int64_t r = 0; r < count; ++r) average_row(positions + r, left - r, c0, n, block + r * ld);
            return;
        }
        std::fill_n(block, count * ld, 0.0f);
        R rows[TOGETHER];
        for (int64_t k = 0; k < K; ++k) {
            ColumnAffine columns = {};
            Affine whole = {};
            if (norm == Norm::instance) {
                columns = affine(w, n);
                const int32_t *all = kept.data() + kept_from[b];
                const int64_t length = kept_from[b + 1] - kept_from[b];
                column_squares([&](int64_t r) { return row(k, all[r], c0); }, length, n, columns);
                squares_to_weights(columns.weight, n, length, K);
            } else if (norm == Norm::batch) {
                columns = batch_affine(k, c0);
            } else {
                whole = group_stats(k, b);
            }
            for (int64_t r = 0; r < count; r += TOGETHER) {
                const int64_t some = std::min<int64_t>(TOGETHER, count - r);
                for (int64_t j = 0; j < some; ++j) rows[j] = row(k, positions[r + j], c0);
                if (columns.shift) add_rows(rows, columns, some, n, block + r * ld, ld);
                else for (int64_t j = 0; j < some; ++j) add_rows(rows + j, &whole, 1, n, block + (r + j) * ld, k == 0);
            }
        }
    }

    Affine group_stats(int64_t k, int64_t b) const {
        double mean = 0, m2 = 0, count = 0;
        for (int64_t i = kept_from[b]; i < kept_from[b + 1]; ++i) {
            float squares;
            const R x = row(k, kept[i], 0);
            Affine f;
            row_stats<1>(&x, &x, C, &f, &squares);
            const double d = (double)f.shift + f.delta - mean;
            m2 += squares + d * d * count * C / (count + C);
            mean += d * C / (count + C);
            count += C;
        }
        const float shift = mean;
        return {shift, (float)(mean - shift), (float)(1 / (deviation(m2 / std::max(count, 1.0), EPS) * K))};
    }

    void normalize_block(Workspace &w, int64_t count, int64_t n) const {
        const int64_t ld = padded(n);
        float *block = w.block.get();
        auto replace = [&](int64_t r, auto f) {
            float *x = block + r * ld;
            each(Row<float>{x}, n, [&](int64_t i, Vec v, Mask lanes, int) D2V_INLINE {
                narrow(select(lanes, f(i, v), Vec{}), x + i);
            });
        };
        if (target_norm == Norm::layer) {
            for (int64_t r = 0; r < count; ++r) {
                const Row<float> x = {block + r * ld};
                Affine f;
                row_stats<1>(&x, &x, n, &f);
                replace(r, [&](int64_t, Vec x) { return ((x - f.shift) - f.delta) * f.weight; });
            }
        } else if (target_norm == Norm::instance) {
            const ColumnAffine f = affine(w, n);
            column_squares([&](int64_t r) { return Row<float>{block + r * ld}; }, count, n, f);
            squares_to_weights(f.weight, n, count, 1);
            for (int64_t r = 0; r < count; ++r)
                replace(r, [&](int64_t i, Vec x) {
                    return ((x - widen(f.shift + i)) - widen(f.delta + i)) * widen(f.weight + i);
                });
        }
    }

    // Error and gradient of one row against its target.
    template <class P> void score(Workspace &w, const float *target, int64_t row, int64_t c0, int64_t n) const {
        const Row<P> prediction = {(const P *)a.predictions + row * C + c0};
        P *grad = (P *)a.grad + row * C + c0;
        const float beta = a.beta, inverse = beta ? 1 / beta : 0, slope = (beta ? 1 : 2) * grad_scale;
        float *copy = a.moments ? w.prediction.get() : nullptr;
        Vec values[4] = {};
        each(prediction, n, [&](int64_t i, Vec x, Mask lanes, int u) D2V_INLINE {
            if (u * W * sizeof(P) % 64 == 0) {  // once for each 64 bytes
                __builtin_prefetch(prediction.x + i + AHEAD_SCORED * C, 0, 2);
                __builtin_prefetch(grad + i + AHEAD_SCORED * C, 1, 2);
            }
            const Vec e = select(lanes, x - widen(target + i), Vec{});
            Vec g = e;
            if (beta == 0) {
                values[u] += e * e;
            } else {
                const Vec size = select(e < 0, -e, e);
                values[u] += select(size < beta, e * e * (0.5f * inverse), size - select(lanes, splat(0.5f * beta), Vec{}));
                g = select(size < beta, e * inverse, select(e < 0, splat(-1), splat(1)) + (e - e));  // NaN if e is not finite
            }
            narrow(g * slope, grad + i, n - i);
            if (copy) narrow(x, copy + i);
        });
        w.loss += total(values);
        if (copy) w.moments.add(1, Row<float>{copy}, 1, c0, n);
    }

    void mean_of_block(Workspace &w, int64_t count, int64_t n, float *mean) const {
        float *sum = affine(w, n).shift;
        std::fill_n(sum, padded(n), 0.0f);
        Row<float> rows[TOGETHER];
        Affine share[TOGETHER];
        std::fill_n(share, TOGETHER, Affine{0, 0, 1.0f / std::max<int64_t>(count, 1)});
        for (int64_t r = 0; r < count; r += TOGETHER) {
            const int64_t some = std::min<int64_t>(TOGETHER, count - r);
            for (int64_t j = 0; j < some; ++j) rows[j] = {w.block.get() + (r + j) * padded(n)};
            add_rows(rows, share, some, n, sum, false);
        }
        std::copy_n(sum, n, mean);
    }

    void tile(Workspace &w, const int32_t *positions, int64_t count, int64_t left, int64_t b, int64_t c0, int64_t n) const {
        average(w, positions, count, left, b, c0, n);
        normalize_block(w, count, n);
        if (a.target_mean) mean_of_block(w, count, n, a.target_mean + b * C + c0);
        const auto target = [&](int64_t r) { return w.block.get() + r * padded(n); };
        const auto row_in = [&](int64_t m, int64_t r) {
            const int64_t p = positions[r], sample = p / T_;
            return row_of[p + (sample * (M - 1) + m) * T_];
        };
        for (int64_t m = 0; m < M; ++m)  // the rows of a view are contiguous
            for (int64_t r = 0; r < count; ++r) {
                const int32_t to = row_in(m, r);
                if (to < 0) continue;
                if (a.prediction_dtype == D2V_FP32) score<float>(w, target(r), to, c0, n);
                else if (a.prediction_dtype == D2V_BF16) score<bf16>(w, target(r), to, c0, n);
                else score<fp16>(w, target(r), to, c0, n);
            }
        if (a.moments)
            for (int64_t r = 0; r < count; ++r) {
                int64_t views = 0;
                for (int64_t m = 0; m < M; ++m) views += row_in(m, r) >= 0;
                if (views) w.moments.add(0, Row<float>{target(r)}, views, c0, n);
            }
    }

    // Every position is written, but the end advances only if it counts: branches on a random mask are often mispredicted.
    void list_positions() {
        row_of.resize(a.batch * M * T_);
        kept.resize(a.batch * T_);
        scored.resize(a.batch * T_);
        kept_from.push_back(0);
        scored_from.push_back(0);
        std::vector<uint8_t> any(T_);
        int32_t masked = 0;
        int64_t n_kept = 0, n_used = 0;
        for (int64_t b = 0; b < a.batch; ++b) {
            const uint8_t *padding = a.padding ? a.padding + b * T_ : nullptr;
            std::fill(any.begin(), any.end(), 0);
            for (int64_t m = 0; m < M; ++m)
                for (int64_t t = 0; t < T_; ++t) {
                    const int64_t i = (b * M + m) * T_ + t;
                    const bool score = a.mask[i] & !(padding && padding[t]);
                    row_of[i] = score ? (a.dense ? i : masked) : -1;
                    any[t] |= score;
                    n_scored += score;
                    masked += a.mask[i];
                }
            for (int64_t t = 0; t < T_; ++t) {
                kept[n_kept] = scored[n_used] = b * T_ + t;
                n_kept += !(padding && padding[t]);
                n_used += any[t];
            }
            kept_from.push_back(n_kept);
            scored_from.push_back(n_used);
        }
        kept.resize(n_kept);
        scored.resize(n_used);
        if (!a.dense && masked != a.n_rows) throw std::invalid_argument("n_rows");
    }

    // Zero gradients for rows that no tile writes.
    void zero_the_rest() const {
        if (!a.dense && !a.padding) return;
        const int64_t bytes = C * (a.prediction_dtype == D2V_FP32 ? 4 : 2);
        int64_t masked = 0;
        for (int64_t i = 0; i < a.batch * M * T_; ++i) {
            const int64_t to = a.dense ? i : masked;
            masked += a.mask[i];
            if (row_of[i] < 0 && (a.dense || a.mask[i])) memset((char *)a.grad + to * bytes, 0, bytes);
        }
    }

    void batch_stats(std::vector<Workspace> &workspaces, int64_t columns) {
        batch.reset(new float[3 * K * padded(C)]());
        const int64_t blocks = (C + columns - 1) / columns;
#pragma omp parallel for schedule(static) num_threads(a.threads)
        for (int64_t i = 0; i < K * blocks; ++i) {
            const int64_t k = i / blocks, c0 = i % blocks * columns, n = std::min(columns, C - c0);
            const ColumnAffine f = affine(workspaces[omp_get_thread_num()], n), result = batch_affine(k, c0);
            std::vector<double> mean(n), m2(n);
            double count = 0;
            for (int64_t b = 0; b < a.batch; ++b) {
                const int32_t *all = kept.data() + kept_from[b];
                const double rows = kept_from[b + 1] - kept_from[b];
                if (rows == 0) continue;
                column_squares([&](int64_t r) { return row(k, all[r], c0); }, rows, n, f);
                for (int64_t c = 0; c < n; ++c) {
                    const double d = (double)f.shift[c] + f.delta[c] - mean[c];
                    m2[c] += f.weight[c] + d * d * count * rows / (count + rows);
                    mean[c] += d * rows / (count + rows);
                }
                count += rows;
            }
            for (int64_t c = 0; c < n; ++c) {
                result.shift[c] = mean[c];
                result.delta[c] = mean[c] - result.shift[c];
                result.weight[c] = 1 / (deviation(m2[c] / std::max(count, 1.0), EPS) * K);
            }
        }
    }

public:
    explicit Loss(const D2VLoss &args)
        : a(args), M(args.views), T_(args.length), C(args.channels), K(args.n_layers), norm(named(args.norm)),
          target_norm(named(args.target_norm)) {}

    void run() {
        list_positions();
        const double count = n_scored, divided = a.scale / (a.mean ? std::max(count, 1.0) : 1.0);
        // In fp16 the scaled gradient would underflow the normal range, and twice the error would overflow.
        grad_scale = a.prediction_dtype == D2V_FP16 ? 0.25 : divided;
        *a.factor = a.prediction_dtype == D2V_FP16 ? divided * 4 : 1;
        *a.count = count;

        const bool by_row = (norm == Norm::layer || norm == Norm::none) && target_norm != Norm::instance && !a.target_mean;
        const bool by_column = norm != Norm::layer && norm != Norm::group && target_norm != Norm::layer;
        // Positions in a tile: the scored ones, or all if the target's norm or mean needs them.
        const bool all = target_norm == Norm::instance || a.target_mean;
        const std::vector<int32_t> &used = all ? kept : scored;
        const std::vector<int64_t> &from = all ? kept_from : scored_from;
        int64_t rows = M == 1 ? 1 : ROWS, columns = std::max<int64_t>(C, 1);
        if (!by_row) {
            rows = 0;
            for (int64_t b = 0; b < a.batch; ++b) rows = std::max(rows, from[b + 1] - from[b]);
            const int64_t block = M == 1 ? BLOCK : BLOCK_OF_VIEWS;
            const int64_t fit = std::max<int64_t>(block / (std::max<int64_t>(rows, 1) * sizeof(float)) / 64 * 64, 64);
            if (by_column && columns > fit) columns = (columns / ((columns + fit - 1) / fit) + 63) / 64 * 64;
        }

        std::vector<Workspace> workspaces;
        for (int i = 0; i < a.threads; ++i)
            workspaces.push_back({Floats(new float[rows * padded(columns)]), Floats(new float[3 * padded(columns)]),
                                  Floats(new float[padded(columns)]), Moments(a.moments ? C : 0)});
        if (norm == Norm::batch) batch_stats(workspaces, columns);

        const int64_t blocks = (C + columns - 1) / columns, chunks = ((int64_t)scored.size() + ROWS - 1) / ROWS;
        const int64_t tiles = by_row && C ? chunks : a.batch * blocks;
#pragma omp parallel for schedule(static) num_threads(a.threads)
        for (int64_t i = 0; i < tiles; ++i) {
            Workspace &w = workspaces[omp_get_thread_num()];
            if (by_row) {
                const int64_t count = used.size(), end = std::min((i + 1) * ROWS, count);
                for (int64_t r = i * ROWS; r < end; r += rows)
                    tile(w, used.data() + r, std::min(rows, end - r), count - r, 0, 0, C);
            } else {
                const int64_t b = i / blocks, c0 = i % blocks * columns;
                const int64_t count = from[b + 1] - from[b];
                tile(w, used.data() + from[b], count, count, b, c0, std::min(columns, C - c0));
            }
        }
        zero_the_rest();

        double loss = 0;
        for (Workspace &w : workspaces) {
            loss += w.loss;
            if (a.moments && &w != &workspaces[0]) workspaces[0].moments.merge(w.moments);
        }
        *a.loss = loss * divided;
        if (a.moments)
            for (int64_t i = 0; i < 4; ++i) std::copy_n(workspaces[0].moments.field(i), C, a.moments + i * C);
    }
};

template <class T> void run(const D2VLoss &args) {
    bool strided = false;
    for (int64_t k = 0; k < args.n_layers; ++k) strided |= args.strides[3 * k + 2] != 1;
    if (strided) Loss<T, true>(args).run();
    else Loss<T, false>(args).run();
}

void loss(const D2VLoss &args) {
    if (args.layer_dtype == D2V_FP32) run<float>(args);
    else if (args.layer_dtype == D2V_BF16) run<bf16>(args);
    else run<fp16>(args);
}

}  // namespace D2V_ISA
