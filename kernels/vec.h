// As many floats at a time as one register holds, in the vector extension of GCC and Clang, so all builds share one source.
// Longer vectors would work too, but GCC keeps them in memory instead of registers.
#pragma once
#include <cmath>
#include <stdint.h>
#include <string.h>
#include <type_traits>
#ifdef __AVX2__
#include <immintrin.h>  // for conversions: GCC 12 emits five instructions instead of one
#endif

#define D2V_INLINE __attribute__((always_inline))  // a call would spill the accumulators

namespace D2V_ISA {

#if defined __AVX512F__
constexpr int64_t W = 16;
#elif defined __AVX2__
constexpr int64_t W = 8;
#else
constexpr int64_t W = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef int32_t Mask __attribute__((vector_size(4 * W)));
typedef uint16_t Half __attribute__((vector_size(2 * W)));

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

inline Bits extend(Half x) {
#if defined __AVX512F__
    return (Bits)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined __AVX2__
    return (Bits)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, Bits);
#endif
}

inline Half truncate(Bits x) {
#if defined __AVX512F__
    return (Half)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined __AVX2__
    const __m256i low = (__m256i)(x & 0xffff);
    return (Half)_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
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

inline Bits lane_numbers() {
    Bits lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    return lane;
}

inline Mask first_lanes(int64_t n) { return (Mask)lane_numbers() < (int32_t)n; }

template <int N = W, class V> inline float sum(V x) {
    if constexpr (N == 4) {
        return (x[0] + x[2]) + (x[1] + x[3]);
    } else {
        typedef float Part __attribute__((vector_size(2 * N)));
        Part half[2];
        memcpy(half, &x, sizeof half);
        return sum<N / 2>(half[0] + half[1]);
    }
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

// body(i, whole) for every W-th column; the type of `whole` tells whether all W columns exist.
template <class F> D2V_INLINE inline void vectors(int64_t n, F body) {
    int64_t i = 0;
    for (; i + W <= n; i += W) body(i, std::true_type());
    if (i < n) body(i, std::false_type());
}

// body(i, x, lanes, u): x = W values from column i, lanes = which of them exist, u = 0…3 selects one of four
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
