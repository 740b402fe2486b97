// Plain C++: runs everywhere, and is the body that a new compiler or CPU starts from.
#include <string.h>

#include "bitmap.h"
#include "kernel.h"
#include "nm.h"

#ifndef PRUNUS_TABLE
#define PRUNUS_TABLE kernels_scalar
#define PRUNUS_ISA_NAME "scalar"
#endif

namespace prunus {
namespace {

constexpr int kLanes = 4;
constexpr int kVectorRows = 4;
constexpr int kSets = 2;

struct Vec {
  float lane[kLanes];
};

inline Vec broadcast(float value) { return {{value, value, value, value}}; }

// Four weights; repeat<i> is the i-th in every lane.
using Quad = const float*;
inline Quad load_quad(const float* from) { return from; }
template <int i>
inline Vec repeat(Quad quad) {
  return broadcast(quad[i]);
}

inline Vec zero() { return broadcast(0.0f); }
inline Vec load(const float* from) { return {{from[0], from[1], from[2], from[3]}}; }

inline void store(float* to, const Vec& v) {
  for (int i = 0; i < kLanes; ++i) to[i] = v.lane[i];
}

inline Vec load_n(const float* from, int64_t count) {
  Vec v = zero();
  for (int i = 0; i < count && i < kLanes; ++i) v.lane[i] = from[i];
  return v;
}

inline Vec load_even(const float* from, int64_t count) {
  Vec v = zero();
  for (int i = 0; i < count && i < kLanes; ++i) v.lane[i] = from[2 * i];
  return v;
}

struct Mask {
  int64_t low, high;
};

inline Mask between(int64_t low, int64_t high) {
  return {low < 0 ? 0 : low, high < kLanes ? high : kLanes};
}

inline Vec load_where(const float* from, const Mask& mask) {
  Vec v = zero();
  for (int64_t i = mask.low; i < mask.high; ++i) v.lane[i] = from[i];
  return v;
}

inline Vec even(const Vec& low, const Vec& high) {
  return {{low.lane[0], low.lane[2], high.lane[0], high.lane[2]}};
}

inline Vec load_once(const float* from) { return load(from); }
inline Vec odd(const Vec& low, const Vec& high) {
  return {{low.lane[1], low.lane[3], high.lane[1], high.lane[3]}};
}

inline void store_n(float* to, const Vec& v, int64_t count) {
  for (int i = 0; i < count && i < kLanes; ++i) to[i] = v.lane[i];
}

template <class Operation>
inline Vec each(const Vec& a, const Vec& b, Operation operation) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = operation(a.lane[i], b.lane[i]);
  return v;
}

inline Vec add(const Vec& a, const Vec& b) {
  return each(a, b, [](float p, float q) { return p + q; });
}
inline Vec sub(const Vec& a, const Vec& b) {
  return each(a, b, [](float p, float q) { return p - q; });
}
inline Vec mul(const Vec& a, const Vec& b) {
  return each(a, b, [](float p, float q) { return p * q; });
}
inline Vec divide(const Vec& a, const Vec& b) {
  return each(a, b, [](float p, float q) { return p / q; });
}
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) { return add(mul(a, b), c); }

// NaN in the second operand stays NaN: the comparison is false for it.
inline Vec maximum(const Vec& a, const Vec& b) {
  return each(a, b, [](float p, float q) { return p > q ? p : q; });
}
inline Vec minimum(const Vec& a, const Vec& b) {
  return each(a, b, [](float p, float q) { return p < q ? p : q; });
}
inline Vec relu(const Vec& a) { return maximum(zero(), a); }

inline Vec exponent(const Vec& a) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) {
    uint32_t bits;
    memcpy(&bits, &a.lane[i], sizeof bits);
    bits = (bits << 23) + (127u << 23);
    memcpy(&v.lane[i], &bits, sizeof bits);
  }
  return v;
}

inline void transpose(Vec (&block)[kLanes]) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const float swapped = block[i].lane[j];
      block[i].lane[j] = block[j].lane[i];
      block[j].lane[i] = swapped;
    }
}

struct Partial {
  float lane[kLanes];
};

inline void dot(const float* values, const uint16_t* columns, uint32_t begin, uint32_t end,
                const float* x, Partial& partial) {
  uint32_t i = begin;
  for (; i + kLanes <= end; i += kLanes)
    for (int j = 0; j < kLanes; ++j) partial.lane[j] += values[i + j] * x[columns[i + j]];
  for (; i < end; ++i) partial.lane[0] += values[i] * x[columns[i]];
}

inline float total(const Partial& p) { return (p.lane[0] + p.lane[1]) + (p.lane[2] + p.lane[3]); }

#include "kernels/epilogue-inl.h"
#include "kernels/spmm-inl.h"
#include "kernels/tiled-inl.h"
#include "kernels/vectors-inl.h"
#include "kernels/bytes-inl.h"
#include "kernels/nm-inl.h"
#ifdef PRUNUS_TILES
#include "kernels/tiles-emulated-inl.h"
#include "kernels/tiles-inl.h"
#include "kernels/tiles-bytes-inl.h"
#endif
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
