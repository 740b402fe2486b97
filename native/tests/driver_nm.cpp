// Products with n:m weights against a loop in double precision; every buffer has its exact size.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "dispatch.h"
#include "nm.h"

using namespace prunus;

int nm_cases(int* done);

namespace {

std::mt19937 rng(20261123);

float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(rng); }

// To the nearest bfloat16, as the kernels round X.
float rounded(float value, bool half) {
  if (!half) return value;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Case {
  int64_t m, k, n, slots;
  bool half, bias, residual, odd;
  int threads, isa;
};

struct Packed {
  std::vector<float> dense;  // [m, k]
  std::unique_ptr<uint64_t[]> picks;
  std::unique_ptr<unsigned char[]> values;
  NmWeight view;
};

// Value `value` of row `r` for column `pick` of a window into slot `s`.
void put(Packed& p, const Case& c, int64_t at, int64_t r, int64_t s, int64_t pick, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const auto upper = static_cast<uint16_t>(bits >> 16);
  const uint64_t number = static_cast<uint64_t>(pick);
  if (c.half) {
    const int64_t bit = 32 * (r % 2) + 16 * (s % 2) + r / 4 * 4;
    p.picks[at * c.slots + s / 2 * 2 + r % 4 / 2] |= number << bit;
    std::memcpy(&p.values[2 * (((at * c.slots + s / 2 * 2) * 16) + 2 * r + s % 2)], &upper, 2);
  } else {
    p.picks[at * c.slots + s] |= number << (32 * (r % 2) + 4 * (r / 2));
    std::memcpy(&p.values[4 * ((at * c.slots + s) * 16 + r)], &value, 4);
  }
}

Packed pack(const Case& c) {
  Packed p;
  NmWeight& w = p.view;
  w = {c.m, c.k, (c.m + 15) / 16, (c.k + 15) / 16, c.slots, c.half, nullptr, nullptr};
  const int64_t places = w.groups * w.windows * c.slots;
  p.dense.assign(c.m * c.k, 0.0f);
  p.picks.reset(new uint64_t[places]());
  p.values.reset(new unsigned char[places * 16 * (c.half ? 2 : 4)]());
  for (int64_t row = 0; row < c.m; ++row)
    for (int64_t window = 0; window < w.windows; ++window) {
      std::vector<int64_t> columns;
      for (int64_t i = 0; i < std::min<int64_t>(16, c.k - window * 16); ++i) columns.push_back(i);
      std::shuffle(columns.begin(), columns.end(), rng);
      const int64_t kept = std::min<int64_t>(rng() % (c.slots + 1), columns.size());
      std::sort(columns.begin(), columns.begin() + kept);
      for (int64_t s = 0; s < kept; ++s) {
        const float value = rounded(uniform(), c.half);
        p.dense[row * c.k + window * 16 + columns[s]] = value;
        put(p, c, row / 16 * w.windows + window, row % 16, s, columns[s], value);
      }
    }
  w.picks = p.picks.get();
  w.values = p.values.get();
  return p;
}

std::unique_ptr<float[]> noise(int64_t count) {
  std::unique_ptr<float[]> data(new float[count]);
  for (int64_t i = 0; i < count; ++i) data[i] = uniform();
  return data;
}

// A token with NaN reaches the outputs that keep a weight on it, and no others.
bool right(const Case& c, const Packed& p, const float* x, double bias, double residual, int64_t r,
           double got) {
  double exact = bias + residual, scale = std::fabs(bias) + std::fabs(residual);
  for (int64_t i = 0; i < c.k; ++i) {
    const double weight = p.dense[r * c.k + i];
    if (weight == 0.0) continue;
    const double term = weight * (std::isnan(x[i]) ? x[i] : rounded(x[i], c.half));
    exact += term;
    scale += std::fabs(term);
  }
  if (std::isnan(exact)) return std::isnan(got);
  return std::fabs(got - exact) <= static_cast<double>(c.k + 4) * 1.2e-7 * scale;
}

bool run_case(const Case& c) {
  const Packed p = pack(c);
  const auto x = noise(c.n * c.k), y = noise(c.n * c.m), bias = noise(c.m);
  const auto residual = noise(c.n * c.m);
  if (c.odd && c.n * c.k > 0) x[(c.n - 1) * c.k + c.k / 2] = NAN;
  const bool ok = run_nm({p.view, x.get(), y.get(), c.n, c.bias ? bias.get() : nullptr,
                          c.residual ? residual.get() : nullptr, 0, c.threads,
                          &kernels_at(c.isa)});
  if (!ok) return false;
  for (int64_t t = 0; t < c.n; ++t)
    for (int64_t r = 0; r < c.m; ++r) {
      const double first = c.bias ? bias[r] : 0.0, added = c.residual ? residual[t * c.m + r] : 0.0;
      if (right(c, p, x.get() + t * c.k, first, added, r, y[t * c.m + r])) continue;
      std::printf("%s n:m of %ld slots%s m=%ld k=%ld n=%ld: y[%ld, %ld] = %g\n",
                  kernels_at(c.isa).isa, static_cast<long>(c.slots), c.half ? " bf16" : "",
                  static_cast<long>(c.m), static_cast<long>(c.k), static_cast<long>(c.n),
                  static_cast<long>(t), static_cast<long>(r), y[t * c.m + r]);
      return false;
    }
  return true;
}

}  // namespace

int nm_cases(int* done) {
  const int64_t rows[] = {0, 1, 3, 15, 16, 17, 31, 33, 48, 63, 64, 65, 97, 131};
  const int64_t columns[] = {0, 1, 2, 15, 16, 17, 33, 63, 64, 65, 131, 200, 271, 530};
  const int64_t tokens[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 31, 95, 97, 131};
  const auto pick = [](auto& list) { return list[rng() % (sizeof(list) / sizeof(list[0]))]; };
  int failed = 0;
  for (int isa = 0; isa < all_count(); ++isa)
    for (int i = 0; i < 300; ++i, ++*done) {
      const bool half = i % 2 == 0;
      const int64_t slots = half ? 2 + rng() % 4 * 2 : 1 + rng() % 8;
      failed += !run_case({pick(rows), pick(columns), pick(tokens), slots, half, rng() % 2 == 0,
                           rng() % 2 == 0, rng() % 4 == 0, static_cast<int>(1 + rng() % 3), isa});
    }
  return failed;
}
