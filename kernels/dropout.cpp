// The hash is triple32 (Wellons 2018, "Prospecting for hash functions"), a bijection of 32 bits whose every output bit flips
// with probability ½ ± 2e-5 when an input bit does, so neighbours are uncorrelated. Each block of positions has two keys, from
// 64 bits of SplitMix64 (Steele, Lea, Flood 2014) over seed and block, added before the first and the second round. With only
// the first key, all masks would be windows of one sequence of 2³² values and would soon overlap.
#include "dropout.h"
#include "vec.h"

#include <algorithm>

namespace D2V_ISA {

constexpr int64_t BLOCK = 4096;    // positions per key; part of the definition of the mask
constexpr int64_t PER_THREAD = 8;  // minimum blocks per thread; below it, waking a thread takes longer than the work

static uint64_t splitmix(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

D2V_INLINE inline Bits hash(Bits x, uint32_t first, uint32_t second) {
    x += first;
    x = (x ^ x >> 17) * 0xed5ad4bb + second;
    x = (x ^ x >> 11) * 0xac4c1b51;
    x = (x ^ x >> 15) * 0x31848bab;
    return x ^ x >> 14;
}

template <class T> void drop(const T *x, T *y, int64_t n, uint32_t threshold, float scale, uint64_t seed, int threads) {
    const Bits lane = lane_numbers();
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    threads = (int)std::max<int64_t>(1, std::min<int64_t>(threads, blocks / PER_THREAD));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < blocks; ++b) {
        const uint64_t keys = splitmix(splitmix(seed) + (uint64_t)(b + 1) * 0x9e3779b97f4a7c15);
        const uint32_t first = (uint32_t)keys, second = (uint32_t)(keys >> 32);
        const T *in = x + b * BLOCK;
        T *out = y + b * BLOCK;
        const int64_t size = std::min(BLOCK, n - b * BLOCK);
        for (int64_t i = 0; i < size; i += W) {
            const Vec value = i + W <= size ? widen(in + i) : widen(in + i, size - i);
            const Mask kept = hash(lane + (uint32_t)i, first, second) >= threshold;
            narrow(select(kept, value * scale, Vec{}), out + i, size - i);
        }
    }
}

void dropout(const void *x, void *y, int64_t n, int dtype, uint32_t threshold, float scale, uint64_t seed, int threads) {
    if (dtype == D2V_FP32) drop((const float *)x, (float *)y, n, threshold, scale, seed, threads);
    else if (dtype == D2V_BF16) drop((const bf16 *)x, (bf16 *)y, n, threshold, scale, seed, threads);
    else drop((const fp16 *)x, (fp16 *)y, n, threshold, scale, seed, threads);
}

}  // namespace D2V_ISA
