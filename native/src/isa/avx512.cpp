// AVX-512 (F, BW, VL, DQ): 16 lanes. Other files here compile it again with more instructions.
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operands inside its own intrinsics for mistakes (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "bitmap.h"
#include "kernel.h"
#include "nm.h"

#ifndef PRUNUS_TABLE
#define PRUNUS_TABLE kernels_avx512
#define PRUNUS_ISA_NAME "avx512"
#endif

namespace prunus {
namespace {

constexpr int kLanes = 16;
constexpr int kVectorRows = 8;
constexpr int kSets = 4;

using Vec = __m512;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float value) { return _mm512_set1_ps(value); }
inline Vec load(const float* from) { return _mm512_loadu_ps(from); }

// Four weights by one load; repeat<i> is the i-th in every lane.
using Quad = __m512;
inline Quad load_quad(const float* from) { return _mm512_broadcast_f32x4(_mm_loadu_ps(from)); }
template <int i>
inline Vec repeat(Quad quad) {
  return _mm512_permute_ps(quad, i * 0x55);
}

inline void store(float* to, Vec v) { _mm512_storeu_ps(to, v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec divide(Vec a, Vec b) { return _mm512_div_ps(a, b); }
// The second operand is returned where one is NaN: NaN stays NaN.
inline Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec minimum(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec relu(Vec v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }

inline Vec exponent(Vec v) {
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(v), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(power, _mm512_set1_epi32(127 << 23)));
}

inline __mmask16 first(int64_t count) {
  return count >= kLanes ? 0xFFFF : static_cast<__mmask16>(count <= 0 ? 0 : (1u << count) - 1u);
}

inline Vec load_n(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(first(count), from);
}

using Mask = __mmask16;

inline Mask between(int64_t low, int64_t high) {
  return static_cast<__mmask16>(first(high) & ~first(low));
}
inline Vec load_where(const float* from, Mask mask) { return _mm512_maskz_loadu_ps(mask, from); }

// Lanes 0, 2, ... of two vectors.
inline Vec even(Vec low, Vec high) {
  const __m512i lane = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_permutex2var_ps(low, lane, high);
}

// GCC loads from memory again for every use of a loaded vector, unless it cannot know its value.
inline Vec load_once(const float* from) {
  Vec v = load(from);
  __asm__("" : "+v"(v));
  return v;
}

// Lanes 1, 3, ... of two vectors.
inline Vec odd(Vec low, Vec high) {
  const __m512i lane = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return _mm512_permutex2var_ps(low, lane, high);
}

// from[0], from[2], ...: `count` of them.
inline Vec load_even(const float* from, int64_t count) {
  return even(load_n(from, 2 * count - 1), load_n(from + kLanes, 2 * count - 1 - kLanes));
}

inline void store_n(float* to, Vec v, int64_t count) {
  _mm512_mask_storeu_ps(to, first(count), v);
}

inline void transpose(Vec (&b)[kLanes]) {
  Vec pair[kLanes], quad[kLanes], half[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 2) {
    pair[i] = _mm512_unpacklo_ps(b[i], b[i + 1]);
    pair[i + 1] = _mm512_unpackhi_ps(b[i], b[i + 1]);
  }
  // quad[4g + c]: in each 128-bit lane q, element 4q + c of rows 4g to 4g + 3.
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 4) {
    quad[i] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0xEE);
    quad[i + 2] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE);
  }
  // half[c]: lanes 0 and 2 of rows 0 to 7, half[4 + c]: lanes 1 and 3; then rows 8 to 15.
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    half[c] = _mm512_shuffle_f32x4(quad[c], quad[4 + c], 0x88);
    half[4 + c] = _mm512_shuffle_f32x4(quad[c], quad[4 + c], 0xDD);
    half[8 + c] = _mm512_shuffle_f32x4(quad[8 + c], quad[12 + c], 0x88);
    half[12 + c] = _mm512_shuffle_f32x4(quad[8 + c], quad[12 + c], 0xDD);
  }
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    b[c] = _mm512_shuffle_f32x4(half[c], half[8 + c], 0x88);
    b[8 + c] = _mm512_shuffle_f32x4(half[c], half[8 + c], 0xDD);
    b[4 + c] = _mm512_shuffle_f32x4(half[4 + c], half[12 + c], 0x88);
    b[12 + c] = _mm512_shuffle_f32x4(half[4 + c], half[12 + c], 0xDD);
  }
}

// Element 4q + k of the result is the sum of b[4q + k]: half the shuffles of a transpose.
#define PRUNUS_SUM_LANES
inline Vec sum_lanes(Vec (&b)[kLanes]) {
  Vec quad[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const Vec low = add(_mm512_shuffle_f32x4(b[k], b[4 + k], 0x44),
                        _mm512_shuffle_f32x4(b[k], b[4 + k], 0xEE));
    const Vec high = add(_mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0x44),
                         _mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0xEE));
    quad[k] = add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
  }
  const Vec even = add(_mm512_unpacklo_ps(quad[0], quad[1]), _mm512_unpackhi_ps(quad[0], quad[1]));
  const Vec odd = add(_mm512_unpacklo_ps(quad[2], quad[3]), _mm512_unpackhi_ps(quad[2], quad[3]));
  return add(_mm512_shuffle_ps(even, odd, 0x44), _mm512_shuffle_ps(even, odd, 0xEE));
}

#include "kernels/epilogue-inl.h"
#include "kernels/spmm-inl.h"
#include "kernels/tiled-inl.h"
#include "kernels/vectors-inl.h"
#include "kernels/bytes-inl.h"
#include "kernels/nm-inl.h"
#ifdef PRUNUS_PAIRS
#include "kernels/pairs-inl.h"
#endif
#ifdef __AVX512VNNI__
#include "kernels/bytes-vnni-inl.h"
#endif
#ifdef PRUNUS_TILES
#include "kernels/tiles-inl.h"
#include "kernels/tiles-bytes-inl.h"
#endif
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

const Kernels PRUNUS_TABLE = {
    PRUNUS_ISA_NAME,
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
