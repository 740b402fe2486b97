// GFLOP/s of one core in fp32 multiply-adds on registers, and in bfloat16 products of pairs (0: the
// CPU has none): the limits that benchmarks compare with. Built and run by peak.py.
#include <immintrin.h>
#include <stdio.h>
#include <time.h>

static double seconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

constexpr int kSums = 12, kRounds = 50000, kRepetitions = 40;

#if defined(__AVX512F__)
using Vec = __m512;
static Vec filled(float value) { return _mm512_set1_ps(value); }
static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
#else
using Vec = __m256;
static Vec filled(float value) { return _mm256_set1_ps(value); }
static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
#endif

template <class Step>
static double best(double operations, Step step) {
  double least = 1e9;
  for (int repetition = 0; repetition < kRepetitions; ++repetition) {
    Vec sums[kSums];
    for (Vec& sum : sums) {
      sum = filled(1.0f);
      asm volatile("" : "+v"(sum));  // else equal sums are computed once
    }
    const double begin = seconds();
    for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
      for (int i = 0; i < kSums; ++i) sums[i] = step(sums[i]);
      asm volatile("" ::: "memory");
    }
    const double took = seconds() - begin;
    if (took < least) least = took;
    for (Vec& sum : sums) asm volatile("" ::"v"(sum));
  }
  return operations * kSums * kRounds / least * 1e-9;
}

int main() {
  const Vec factor = filled(0.999f);
  const double fp32 = best(2.0 * sizeof(Vec) / sizeof(float),
                           [&](Vec sum) { return fma(sum, factor, factor); });
  double bf16 = 0;
#if defined(__AVX512BF16__)
  const __m512bh pairs = (__m512bh)_mm512_set1_epi32(0x3f003f00);
  bf16 = best(64, [&](Vec sum) { return _mm512_dpbf16_ps(sum, pairs, pairs); });
#endif
  printf("%f %f\n", fp32, bf16);
}
