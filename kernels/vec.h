// Sixteen floats at a time, in the vector extension of GCC and Clang. The compiler turns each line into one AVX-512, two
// AVX2 or four SSE instructions, so all builds share one source.
#pragma once
#include <cmath>
#include <stdint.h>
#include <string.h>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>  // for conversions: GCC 12 emits five instructions instead of one
#endif

#define D2V_INLINE __attribute__((always_inline))  // a call would spill the accumulators

namespace D2V_ISA {

constexpr int64_t W = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef int32_t Mask __attribute__((vector_size(64)));
typedef uint16_t Half __attribute__((vector_size(32)));

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

inline Bits extend(Half x) {
#ifdef __AVX512F__
    return (Bits)_mm512_cvtepu16_epi32((__m256i)x);
#else
    return __builtin_convertvector(x, Bits);
#endif
}

inline Half truncate(Bits x) {
#ifdef __AVX512F__
    return (Half)_mm512_cvtepi32_epi16((__m512i)x);
#else
    return __builtin_convertvector(x, Half);
#endif
}

inline Vec as_float(Bits x) { Vec y; memcpy(&y, &x, sizeof y); return y; }
inline Bits as_bits(Vec x) { Bits y; memcpy(&y, &x, sizeof y); return y; }
inline Vec select(Mask m, Vec a, Vec b) { return as_float((as_bits(a) & (Bits)m) | (as_bits(b) & ~(Bits)m)); }
inline Bits select(Mask m, Bits a, Bits b) { return (a & (Bits)m) | (b & ~(Bits)m); }
inline Vec splat(float x) { return x - Vec{}; }
inline Bits splat_bits(uint32_t x) { return x - Bits{}; }

inline Mask first_lanes(int64_t n) {
    const Mask lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < (int32_t)n;
}

inline float sum(Vec x) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    Eight a[2];
    memcpy(a, &x, sizeof a);
    a[0] += a[1];
    Four b[2];
    memcpy(b, a, sizeof b);
    b[0] += b[1];
    return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}

// σ; NaN if the variance overflowed: dividing by infinity would give zeros, a silent error.
template <class F> inline F deviation(F variance, float eps) { return std::isinf(variance) ? NAN : std::sqrt(variance + eps); }

inline Vec widen(const float *x) { Vec y; memcpy(&y, x, sizeof y); return y; }

inline Vec widen(const bf16 *x) {
    Half h;
    memcpy(&h, x, sizeof h);
    return as_float(extend(h) << 16);
}

inline Vec widen(const fp16 *x) {
    Half h;
    memcpy(&h, x, sizeof h);
    const Bits bits = extend(h), size = (bits & 0x7fff) << 13;
    // The exponents differ by 112; a multiplication shifts them and normalises subnormals.
    const Vec scaled = as_float(size) * 0x1p112f;
    const Bits special = size | 0x7f800000;  // infinity and NaN
    return as_float(select(size >= 0x0f800000, special, as_bits(scaled)) | (bits & 0x8000) << 16);
}

inline void narrow(Vec x, float *y) { memcpy(y, &x, sizeof x); }

inline void narrow(Vec x, bf16 *y) {
    const Bits bits = as_bits(x);
    const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
    const Half h = truncate(select(x == x, rounded, bits >> 16 | 0x40));
    memcpy(y, &h, sizeof h);
}

inline void narrow(Vec x, fp16 *y) {
    const Bits bits = as_bits(x), size = bits & 0x7fffffff;
    const Bits normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    // Adding ½ leaves the rounded bits of a subnormal at the end of the fraction.
    const Bits subnormal = as_bits(as_float(size) + 0.5f) - 0x3f000000;
    const Bits special = select(size > 0x7f800000, splat_bits(0x7e00), splat_bits(0x7c00));
    const Bits finite = select(size < (113u << 23), subnormal, normal);
    const Half h = truncate(select(size >= (143u << 23), special, finite) | (bits >> 16 & 0x8000));
    memcpy(y, &h, sizeof h);
}

template <class T> inline Vec widen(const T *x, int64_t n) {  // n < W elements, zero-padded
    T part[W] = {};
    memcpy(part, x, n * sizeof(T));
    return widen(part);
}

template <class T> inline void narrow(Vec x, T *y, int64_t n) {
    if (n >= W) return narrow(x, y);
    T part[W];
    narrow(x, part);
    memcpy(y, part, n * sizeof(T));
}

// A row of a tensor, read as floats.
template <class T> struct Row {
    static constexpr int bytes = sizeof(T);
    const T *x;
    Vec operator()(int64_t i) const { return widen(x + i); }
    Vec tail(int64_t i, int64_t n) const { return widen(x + i, n); }
    Vec operator()(int64_t i, int64_t, std::true_type) const { return (*this)(i); }
    Vec operator()(int64_t i, int64_t n, std::false_type) const { return tail(i, n - i); }
    // Into the L2 cache, which allows more outstanding lines than the L1. If inlined, GCC would discard it as empty.
    D2V_INLINE void prefetch(int64_t i) const { __builtin_prefetch(x + i, 0, 2); }
};

template <class T> struct StridedRow {
    static constexpr int bytes = sizeof(T);
    const T *x;
    int64_t stride;
    Vec operator()(int64_t i) const { return tail(i, W); }
    Vec tail(int64_t i, int64_t n) const {
        T part[W] = {};
        for (int64_t j = 0; j < n; ++j) part[j] = x[(i + j) * stride];
        return widen(part);
    }
    Vec operator()(int64_t i, int64_t, std::true_type) const { return (*this)(i); }
    Vec operator()(int64_t i, int64_t n, std::false_type) const { return tail(i, n - i); }
    D2V_INLINE void prefetch(int64_t i) const { __builtin_prefetch(x + i * stride, 0, 2); }
};

// body(i, whole) for every sixteenth column; the type of `whole` tells whether all sixteen columns exist.
template <class F> D2V_INLINE inline void sixteens(int64_t n, F body) {
    int64_t i = 0;
    for (; i + W <= n; i += W) body(i, std::true_type());
    if (i < n) body(i, std::false_type());
}

// body(i, x, lanes, u): x = sixteen values from column i, lanes = which of them exist, u = 0…3 selects one of four
// accumulators, so that additions do not depend on each other.
template <class R, class F> D2V_INLINE inline void each(R row, int64_t n, F body) {
    const Mask all = first_lanes(W);
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
        body(i, row(i), all, 0);
        body(i + W, row(i + W), all, 1);
        body(i + 2 * W, row(i + 2 * W), all, 2);
        body(i + 3 * W, row(i + 3 * W), all, 3);
    }
    for (; i + W <= n; i += W) body(i, row(i), all, 0);
    if (i < n) body(i, row.tail(i, n - i), first_lanes(n - i), 0);
}

}  // namespace D2V_ISA
