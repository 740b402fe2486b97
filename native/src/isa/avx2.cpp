// AVX2 and FMA: 8 lanes.
#include <immintrin.h>

#include "bitmap.h"
#include "kernel.h"
#include "nm.h"

namespace prunus {
namespace {

constexpr int kLanes = 8;
constexpr int kVectorRows = 4;
constexpr int kSets = 2;

using Vec = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float value) { return _mm256_set1_ps(value); }

// Four weights by one load; repeat<i> is the i-th in every lane.
using Quad = __m256;
inline Quad load_quad(const float* from) {
  const __m128 four = _mm_loadu_ps(from);
  return _mm256_insertf128_ps(_mm256_castps128_ps256(four), four, 1);
}
template <int i>
inline Vec repeat(Quad quad) {
  return _mm256_permute_ps(quad, i * 0x55);
}

inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vec v) { _mm256_storeu_ps(to, v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec divide(Vec a, Vec b) { return _mm256_div_ps(a, b); }
// The second operand is returned where one is NaN: NaN stays NaN.
inline Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec minimum(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec relu(Vec v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }

inline Vec exponent(Vec v) {
  const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(v), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(power, _mm256_set1_epi32(127 << 23)));
}

inline __m256i first(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}

inline Vec load_n(const float* from, int64_t count) {
  return _mm256_maskload_ps(from, first(count));
}

using Mask = __m256i;

inline Mask between(int64_t low, int64_t high) {
  return _mm256_andnot_si256(first(low), first(high));
}
inline Vec load_where(const float* from, Mask mask) { return _mm256_maskload_ps(from, mask); }

// Lanes 0, 2, ... of two vectors.
inline Vec even(Vec low, Vec high) {
  const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88));
  return _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xD8));
}

// GCC loads from memory again for every use of a loaded vector, unless it cannot know its value.
inline Vec load_once(const float* from) {
  Vec v = load(from);
  __asm__("" : "+x"(v));
  return v;
}

// Lanes 1, 3, ... of two vectors.
inline Vec odd(Vec low, Vec high) {
  const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0xDD));
  return _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xD8));
}

// from[0], from[2], ...: `count` of them.
inline Vec load_even(const float* from, int64_t count) {
  return even(load_n(from, 2 * count - 1), load_n(from + kLanes, 2 * count - 1 - kLanes));
}

inline void store_n(float* to, Vec v, int64_t count) {
  if (count >= kLanes) {
    _mm256_storeu_ps(to, v);
  } else {
    _mm256_maskstore_ps(to, first(count), v);
  }
}

inline void transpose(Vec (&b)[kLanes]) {
  Vec pair[kLanes], quad[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    pair[i] = _mm256_unpacklo_ps(b[i], b[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(b[i], b[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xEE);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
    b[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
  }
}

#include "kernels/epilogue-inl.h"
#include "kernels/spmm-inl.h"
#include "kernels/tiled-inl.h"
#include "kernels/vectors-inl.h"
#include "kernels/bytes-inl.h"
#include "kernels/nm-inl.h"
#include "kernels/conv-inl.h"
#include "kernels/depthwise-inl.h"
#include "kernels/depthwise3-inl.h"
#include "kernels/pointwise-inl.h"
#include "kernels/groups-inl.h"
#include "kernels/dot-x86-inl.h"
#include "kernels/spmv-inl.h"
#include "kernels/sddmm-inl.h"
#include "kernels/conv-grad-inl.h"
#include "kernels/attention-inl.h"
#include "kernels/norm-inl.h"
#include "kernels/table-inl.h"

}  // namespace

const Kernels kernels_avx2 = {
    "avx2",
    kPanel,
    kVectorPanel,
    kPairPanel,
    kBytePanel,
    kQueries,
#define PRUNUS_KERNEL(name, layout, description) name,
#include "kernels.def"
#undef PRUNUS_KERNEL
};

}  // namespace prunus
