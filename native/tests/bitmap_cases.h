// Cases for the driver: bitmap-packed products on awkward shapes, every buffer of its exact size.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bitmap.h"
#include "dispatch.h"

namespace bitmap_cases {

using namespace prunus;

struct Packed {
  std::unique_ptr<uint64_t[]> words;
  std::vector<double> dense;  // what the blob stands for
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A blob of random weights; sections follow each other 64-byte aligned, 64 bytes behind the values.
inline Packed pack(std::mt19937& rng, int64_t rows, int64_t cols, double sparsity, uint16_t kind) {
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  const int64_t groups = (rows + 15) / 16, quads = (cols + 3) / 4;
  const bool bytes = kind == kBitmapI8;
  Packed p;
  p.dense.resize(rows * cols);
  std::vector<uint32_t> offsets(groups + 1);
  std::vector<float> scales(16 * groups);
  std::vector<int32_t> sums(16 * groups);
  std::vector<uint64_t> masks(groups * quads);
  std::vector<char> values;
  for (int64_t r = 0; r < rows; ++r) scales[r] = static_cast<float>(uniform(rng) + 0.1);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t q = 0; q < quads; ++q)
      for (int bit = 0; bit < 64; ++bit) {
        const int64_t r = g * 16 + (bytes ? bit / 4 : bit % 16);
        const int64_t c = q * 4 + (bytes ? bit % 4 : bit / 16);
        if (r >= rows || c >= cols || uniform(rng) < sparsity) continue;
        masks[g * quads + q] |= uint64_t{1} << bit;
        ++offsets[g + 1];
        const float exact = static_cast<float>(uniform(rng) - 0.5);
        uint32_t wide;
        std::memcpy(&wide, &exact, sizeof wide);
        const auto half = static_cast<uint16_t>(wide >> 16);
        // a stored weight is never zero: times infinity it would be a NaN
        const long rounded = std::lround(exact * 254);
        const auto byte = static_cast<int8_t>(rounded == 0 ? 1 : rounded);
        const void* from = bytes ? static_cast<const void*>(&byte) : &exact;
        if (kind == kBitmapBf16) from = &half;
        const size_t size = bytes ? 1 : kind == kBitmapBf16 ? 2 : 4;
        values.insert(values.end(), static_cast<const char*>(from),
                      static_cast<const char*>(from) + size);
        double& place = p.dense[r * cols + c];
        place = bytes                  ? static_cast<double>(byte) * scales[r]
                : kind == kBitmapBf16 ? from_bits(static_cast<uint32_t>(half) << 16)
                                      : exact;
        if (bytes) sums[r] += byte;
      }
    offsets[g + 1] += offsets[g];
  }
  BlobHeader h{{'P', 'R', 'B', 'K'}, kBlobVersion, kind, 0, 0, 0, 16, 0, 64, 0, 0};
  h.rows = rows;
  h.cols = cols;
  h.nnz = offsets[groups];
  h.blocks = static_cast<uint32_t>(groups);
  const auto align = [](uint64_t at) { return (at + 63) / 64 * 64; };
  const uint64_t scales_at = align(64 + 4 * (groups + 1));
  h.columns_at = bytes ? align(scales_at + 8 * scales.size()) : scales_at;
  h.values_at = align(h.columns_at + 8 * masks.size());
  const uint64_t end = align(h.values_at + values.size() + 64);
  p.words.reset(new uint64_t[end / 8]());
  char* base = reinterpret_cast<char*>(p.words.get());
  const auto place = [&](uint64_t at, const void* from, size_t size) {
    if (size != 0) std::memcpy(base + at, from, size);
  };
  place(0, &h, sizeof h);
  place(64, offsets.data(), 4 * offsets.size());
  if (bytes) {
    place(scales_at, scales.data(), 4 * scales.size());
    place(scales_at + 4 * scales.size(), sums.data(), 4 * sums.size());
  }
  place(h.columns_at, masks.data(), 8 * masks.size());
  place(h.values_at, values.data(), values.size());
  return p;
}

// What the kernels of some instruction sets make of X: bfloat16 beside bfloat16, where its column
// holds nothing that bfloat16 cannot.
inline float seen(float x, double peak, uint16_t kind, int64_t n, int isa) {
  const std::string name = kernels_at(isa).isa;
  if (kind != kBitmapBf16 || n < 2 || (name != "avx512_bf16" && name != "amx")) return x;
  if (!std::isfinite(peak)) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return from_bits((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u);
}

inline bool run_one(std::mt19937& rng, int64_t m, int64_t k, int64_t n, double sparsity,
                    uint16_t kind, int isa) {
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  const Packed p = pack(rng, m, k, sparsity, kind);
  std::unique_ptr<float[]> x(new float[n * k]), y(new float[n * m]), bias(new float[m]);
  for (int64_t i = 0; i < n * k; ++i) x[i] = uniform(rng);
  for (int64_t i = 0; i < m; ++i) bias[i] = uniform(rng);
  const bool odd = rng() % 8 == 0 && n * k > 0;
  if (odd) x[rng() % (n * k)] = INFINITY;
  const BitmapCall call{open_bitmap(p.words.get()), x.get(), y.get(), n, bias.get(), nullptr, 0,
                        static_cast<int>(1 + rng() % 3), &kernels_at(isa)};
  if (!run_bitmap(call)) return false;
  for (int64_t j = 0; j < n; ++j) {
    double peak = 0;
    for (int64_t c = 0; c < k; ++c) peak = std::fmax(peak, std::fabs(x[j * k + c]));
    for (int64_t r = 0; r < m; ++r) {
      double exact = bias[r], scale = std::fabs(exact), sum = 0;
      int64_t count = 3;
      for (int64_t c = 0; c < k; ++c) {
        const double w = p.dense[r * k + c];
        if (w == 0) continue;
        const double v = seen(x[j * k + c], peak, kind, n, isa);
        exact += w * v;
        scale += std::fabs(w * v);
        sum += std::fabs(w);
        ++count;
      }
      double bound = count * 1.2e-7 * scale;
      if (kind == kBitmapI8) bound += peak / 65534 * 1.00001 * sum;
      const double got = y[j * m + r];
      if (std::fabs(got - exact) <= bound || got == exact || !std::isfinite(exact)) continue;
      std::printf("%s bitmap kind=%d m=%ld k=%ld n=%ld: y[%ld, %ld] = %g, not %g\n",
                  kernels_at(isa).isa, kind, static_cast<long>(m), static_cast<long>(k),
                  static_cast<long>(n), static_cast<long>(j), static_cast<long>(r), got, exact);
      return false;
    }
  }
  return true;
}

// Failures among `count` random cases of an instruction set.
inline int run_all(int isa, int count) {
  std::mt19937 rng(20261122);
  const int64_t sizes[] = {0, 1, 2, 3, 4, 5, 7, 15, 16, 17, 31, 33, 64, 65, 97};
  const int64_t columns[] = {1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 25, 31};
  const double sparsities[] = {0.0, 0.5, 0.9, 1.0};
  int failed = 0;
  for (int i = 0; i < count; ++i)
    failed += !run_one(rng, sizes[rng() % 15], sizes[rng() % 15], columns[rng() % 12],
                       sparsities[rng() % 4], static_cast<uint16_t>(kBitmapF32 + i % 3), isa);
  return failed;
}

}  // namespace bitmap_cases
