// NEON of 64-bit ARM: 4 lanes, part of every such processor.
#include <arm_neon.h>

#include "bitmap.h"
#include "kernel.h"
#include "nm.h"

namespace prunus {

// Found by name where nothing in the namespace below hides it: a kernel that has no form here yet
// runs its scalar one.
namespace fallback {
#define PRUNUS_KERNEL(name, layout, description) \
  [[maybe_unused]] const auto name = [](const auto& task) { kernels_scalar.name(task); };
#include "kernels.def"
#undef PRUNUS_KERNEL
}  // namespace fallback
using namespace fallback;

namespace {

constexpr int kLanes = 4;
constexpr int kSets = 4;
constexpr int kVectorRows = 4;

using Vec = float32x4_t;

inline Vec zero() { return vdupq_n_f32(0.0f); }
inline Vec broadcast(float value) { return vdupq_n_f32(value); }

// Four weights by one load; repeat<i> is the i-th in every lane.
using Quad = float32x4_t;
inline Quad load_quad(const float* from) { return vld1q_f32(from); }
template <int i>
inline Vec repeat(Quad quad) {
  return vdupq_laneq_f32(quad, i);
}

inline Vec load(const float* from) { return vld1q_f32(from); }
inline void store(float* to, Vec v) { vst1q_f32(to, v); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
inline Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
inline Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
inline Vec divide(Vec a, Vec b) { return vdivq_f32(a, b); }
// The second operand is returned where one is NaN: NaN stays NaN.
inline Vec maximum(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline Vec minimum(Vec a, Vec b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline Vec relu(Vec v) { return maximum(zero(), v); }

inline Vec exponent(Vec v) {
  const uint32x4_t power = vshlq_n_u32(vreinterpretq_u32_f32(v), 23);
  return vreinterpretq_f32_u32(vaddq_u32(power, vdupq_n_u32(127u << 23)));
}

// Lanes [low, high).
struct Mask {
  int64_t low, high;
};

inline Mask between(int64_t low, int64_t high) {
  return {low < 0 ? 0 : low, high < kLanes ? high : kLanes};
}

// There are no masked loads: lane by lane, and whole vectors where nothing is left out.
inline Vec load_where(const float* from, const Mask& mask) {
  if (mask.low == 0 && mask.high == kLanes) return load(from);
  Vec v = zero();
  if (mask.low <= 0 && mask.high > 0) v = vld1q_lane_f32(from, v, 0);
  if (mask.low <= 1 && mask.high > 1) v = vld1q_lane_f32(from + 1, v, 1);
  if (mask.low <= 2 && mask.high > 2) v = vld1q_lane_f32(from + 2, v, 2);
  if (mask.low <= 3 && mask.high > 3) v = vld1q_lane_f32(from + 3, v, 3);
  return v;
}

inline Vec load_n(const float* from, int64_t count) { return load_where(from, between(0, count)); }

// Lanes 0, 2, ... of two vectors.
inline Vec even(Vec low, Vec high) { return vuzp1q_f32(low, high); }

// Lanes 1, 3, ... of two vectors.
inline Vec load_once(const float* from) { return load(from); }
inline Vec odd(Vec low, Vec high) { return vuzp2q_f32(low, high); }

// from[0], from[2], ...: `count` of them.
inline Vec load_even(const float* from, int64_t count) {
  return even(load_n(from, 2 * count - 1), load_n(from + kLanes, 2 * count - 1 - kLanes));
}

inline void store_n(float* to, Vec v, int64_t count) {
  if (count >= kLanes) return vst1q_f32(to, v);
  if (count > 0) vst1q_lane_f32(to, v, 0);
  if (count > 1) vst1q_lane_f32(to + 1, v, 1);
  if (count > 2) vst1q_lane_f32(to + 2, v, 2);
}

inline void transpose(Vec (&b)[kLanes]) {
  const Vec low = vtrn1q_f32(b[0], b[1]), high = vtrn1q_f32(b[2], b[3]);
  const Vec odd_low = vtrn2q_f32(b[0], b[1]), odd_high = vtrn2q_f32(b[2], b[3]);
  b[0] = vcombine_f32(vget_low_f32(low), vget_low_f32(high));
  b[1] = vcombine_f32(vget_low_f32(odd_low), vget_low_f32(odd_high));
  b[2] = vcombine_f32(vget_high_f32(low), vget_high_f32(high));
  b[3] = vcombine_f32(vget_high_f32(odd_low), vget_high_f32(odd_high));
}

struct Partial {
  Vec lanes[4];
};

inline Vec load_four(const float* x, const uint16_t* columns) {
  Vec v = vld1q_dup_f32(x + columns[0]);
  v = vld1q_lane_f32(x + columns[1], v, 1);
  v = vld1q_lane_f32(x + columns[2], v, 2);
  return vld1q_lane_f32(x + columns[3], v, 3);
}

inline void dot(const float* values, const uint16_t* columns, uint32_t begin, uint32_t end,
                const float* x, Partial& partial) {
  Vec(&lanes)[4] = partial.lanes;
  uint32_t i = begin;
  for (; i + 16 <= end; i += 16) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      lanes[j] = fma(load(values + i + 4 * j), load_four(x, columns + i + 4 * j), lanes[j]);
  }
  for (; i + 4 <= end; i += 4)
    lanes[0] = fma(load(values + i), load_four(x, columns + i), lanes[0]);
  for (; i < end; ++i)
    lanes[1] = fma(load_n(values + i, 1), load_n(x + columns[i], 1), lanes[1]);
}

inline float total(const Partial& p) {
  return vaddvq_f32(add(add(p.lanes[0], p.lanes[1]), add(p.lanes[2], p.lanes[3])));
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
#include "kernels/spmv-inl.h"
#include "kernels/sddmm-inl.h"
#include "kernels/conv-grad-inl.h"
#include "kernels/attention-inl.h"
#include "kernels/norm-inl.h"
#include "kernels/table-inl.h"

Kernels neon_table() {
  static_assert(kPanel == 16, "the scalar kernels share the panels of these");
  Kernels table = kernels_scalar;
  table.isa = "neon";
  table.panel = kPanel;
  table.query_block = kQueries;
#define PRUNUS_KERNEL(name, layout, description) table.name = name;
#include "kernels.def"
#undef PRUNUS_KERNEL
  return table;
}

}  // namespace

const Kernels kernels_neon = neon_table();

}  // namespace prunus
