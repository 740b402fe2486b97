// Groups of outputs that share their columns against a loop in double precision; every buffer has
// its exact size.
#include "vectors_driver.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "dispatch.h"
#include "run.h"

using namespace prunus;

namespace {

std::mt19937 rng(20261122);

float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(rng); }

float to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t upper(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

struct Case {
  int64_t m, k, n, height;
  double sparsity;
  int bytes;  // of a value: 4, 2 or 1
  bool permuted, tokens, bias, odd;
  int threads, isa;
};

// The weight as it is multiplied, and its sections as one would pack them, each of its own size.
struct Packed {
  std::vector<float> dense;  // [m, k]
  std::unique_ptr<uint32_t[]> offsets, order;
  std::unique_ptr<uint16_t[]> columns;
  std::unique_ptr<unsigned char[]> values;
  std::unique_ptr<float[]> scales;
  std::unique_ptr<int32_t[]> sums;
  Vectors view;
};

template <class Value, class Convert>
std::unique_ptr<unsigned char[]> stored(const Packed& p, const Case& c, Convert convert) {
  const int64_t groups = (c.m + c.height - 1) / c.height, total = p.offsets[groups];
  std::unique_ptr<unsigned char[]> bytes(new unsigned char[total * c.height * sizeof(Value)]);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = p.offsets[g], count = p.offsets[g + 1] - begin;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t r = 0; r < c.height; ++r) {
        const int64_t row = g * c.height + r, column = p.columns[begin + i];
        const bool real = row < c.m && column < c.k;
        const int64_t output = real && p.order ? p.order[row] : row;
        const Value value = convert(real ? p.dense[output * c.k + column] : 0.0f);
        const int64_t most = c.bytes == 1 ? kByteColumns : kTileColumns;
        const int64_t tile = i / most * most;
        const int64_t width = std::min<int64_t>(most, count - tile);
        const int64_t at = c.bytes < 4 ? (begin + tile) * c.height + r * width + i - tile
                                       : (begin + i) * c.height + r;
        std::memcpy(&bytes[at * sizeof(Value)], &value, sizeof value);
      }
  }
  return bytes;
}

float rounded(float value, int bytes) {
  if (bytes == 1) return static_cast<float>(static_cast<int>(value * 127.0f));
  return bytes == 2 ? to_bf16(value) : value;
}

// Scales and sums of the packed rows of int8; `dense` becomes values times scales.
void add_scales(Packed& p, const Case& c, int64_t rows) {
  p.scales.reset(new float[rows]);
  p.sums.reset(new int32_t[rows]);
  for (int64_t r = 0; r < rows; ++r) {
    p.scales[r] = 0.001f * (1.0f + std::fabs(uniform()));
    p.sums[r] = 0;
    if (r >= c.m) continue;
    float* row = p.dense.data() + (p.order ? p.order[r] : r) * c.k;
    for (int64_t k = 0; k < c.k; ++k) {
      p.sums[r] += static_cast<int32_t>(row[k]);
      row[k] *= p.scales[r];
    }
  }
}

Packed pack(const Case& c) {
  Packed p;
  const int64_t groups = (c.m + c.height - 1) / c.height;
  p.dense.assign(c.m * c.k, 0.0f);
  p.offsets.reset(new uint32_t[groups + 1]);
  if (c.permuted) {
    p.order.reset(new uint32_t[c.m]);
    for (int64_t r = 0; r < c.m; ++r) p.order[r] = static_cast<uint32_t>(r);
    std::shuffle(p.order.get(), p.order.get() + c.m, rng);
  }
  std::vector<uint16_t> columns;
  for (int64_t g = 0; g < groups; ++g) {
    p.offsets[g] = static_cast<uint32_t>(columns.size());
    for (int64_t k = 0; k < c.k; ++k) {
      if (std::fabs(uniform()) < c.sparsity) continue;
      columns.push_back(static_cast<uint16_t>(k));
      for (int64_t r = g * c.height; r < std::min((g + 1) * c.height, c.m); ++r) {
        const float value = uniform();
        p.dense[(p.order ? p.order[r] : r) * c.k + k] = rounded(value, c.bytes);
      }
    }
    while (columns.size() % (4 / c.bytes) != 0) columns.push_back(static_cast<uint16_t>(c.k));
  }
  p.offsets[groups] = static_cast<uint32_t>(columns.size());
  p.columns.reset(new uint16_t[columns.size()]);
  std::copy(columns.begin(), columns.end(), p.columns.get());
  if (c.bytes == 1) {
    p.values = stored<int8_t>(p, c, [](float value) { return static_cast<int8_t>(value); });
    add_scales(p, c, groups * c.height);
  } else {
    p.values = c.bytes == 2 ? stored<uint16_t>(p, c, upper)
                            : stored<float>(p, c, [](float value) { return value; });
  }
  p.view = {c.m,           c.k, groups, c.height, c.bytes == 2, p.offsets.get(), p.columns.get(),
            p.values.get(), p.order.get(), c.bytes == 1, p.scales.get(), p.sums.get()};
  return p;
}

// What half a step of the bytes of a token is at most, and a little: the error of each product.
double byte_error(const Case& c, const Call& call, int64_t j) {
  if (c.bytes > 1) return 0.0;
  double low = 0.0, high = 0.0;
  for (int64_t i = 0; i < c.k; ++i) {
    const double x = c.tokens ? call.x[j * call.ldx + i] : call.x[i * call.ldx + j];
    low = std::min(low, x);
    high = std::max(high, x);
  }
  return (high - low) / 255.0 * 1.01;
}

bool check(const Case& c, const Packed& p, const Call& call) {
  for (int64_t r = 0; r < c.m; ++r)
    for (int64_t j = 0; j < c.n; ++j) {
      if (c.odd && j == c.n - 1) continue;  // NaN
      double exact = call.bias ? call.bias[r] : 0.0, scale = std::fabs(exact), weights = 0.0;
      for (int64_t i = 0; i < c.k; ++i) {
        const float x = c.tokens ? call.x[j * call.ldx + i] : call.x[i * call.ldx + j];
        const double term = static_cast<double>(p.dense[r * c.k + i]) * (c.bytes == 2 ? to_bf16(x) : x);
        exact += term;
        scale += std::fabs(term);
        weights += std::fabs(p.dense[r * c.k + i]);
      }
      const double got = c.tokens ? call.y[j * call.ldy + r] : call.y[r * call.ldy + j];
      const double allowed = (c.k + 4) * 1.2e-7 * scale + weights * byte_error(c, call, j);
      if (std::fabs(got - exact) <= allowed) continue;
      std::printf("%s groups of %ld, %d bytes%s %s m=%ld k=%ld n=%ld: y[%ld, %ld] = %g, not %g\n",
                  call.kernels->isa, static_cast<long>(c.height), c.bytes,
                  c.permuted ? " permuted" : "", c.tokens ? "tokens" : "planes",
                  static_cast<long>(c.m), static_cast<long>(c.k), static_cast<long>(c.n),
                  static_cast<long>(r), static_cast<long>(j), got, exact);
      return false;
    }
  return true;
}

std::unique_ptr<float[]> noise(int64_t count) {
  std::unique_ptr<float[]> data(new float[count]);
  for (int64_t i = 0; i < count; ++i) data[i] = uniform();
  return data;
}

bool run_case(const Case& c) {
  const Packed p = pack(c);
  const int64_t pad = c.tokens ? 0 : 3;
  Call call{};
  call.vectors = p.view;
  call.layout = c.tokens ? Layout::tokens : Layout::planes;
  call.ldx = c.tokens ? c.k : c.n + pad;
  call.ldy = c.tokens ? c.m : c.n + pad;
  const auto x = noise(c.tokens ? c.n * c.k : (c.k ? (c.k - 1) * call.ldx + c.n : 0));
  const auto y = noise(c.tokens ? c.n * c.m : (c.m ? (c.m - 1) * call.ldy + c.n : 0));
  const auto bias = noise(c.m);
  if (c.odd && c.n * c.k > 0) x[c.tokens ? (c.n - 1) * c.k : c.n - 1] = NAN;
  call.x = x.get();
  call.y = y.get();
  call.n = c.n;
  call.bias = c.bias ? bias.get() : nullptr;
  call.threads = c.threads;
  call.kernels = &kernels_at(c.isa);
  return run_vectors(call) && check(c, p, call);
}

}  // namespace

int vector_cases(int* done) {
  const int64_t rows[] = {0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 53, 64, 65, 97, 131};
  const int64_t columns[] = {0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 131, 200};
  const int64_t wide[] = {1, 2, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 97, 131};
  const int64_t heights[] = {4, 8, 16, 32};
  const double sparsities[] = {0.0, 0.5, 0.9, 1.0};
  const auto pick = [](auto& list) { return list[rng() % (sizeof(list) / sizeof(list[0]))]; };
  int failed = 0;
  for (int isa = 0; isa < all_count(); ++isa)
    for (int i = 0; i < 600; ++i, ++*done)
      failed += !run_case({pick(rows), pick(columns), pick(wide), pick(heights), pick(sparsities),
                           4 >> i % 3, rng() % 2 == 0, rng() % 2 == 0, rng() % 2 == 0,
                           rng() % 4 == 0,
                           static_cast<int>(1 + rng() % 3), isa});
  return failed;
}
