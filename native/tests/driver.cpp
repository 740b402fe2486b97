// Runs every kernel of every instruction set this machine has on awkward shapes, against a loop
// in double precision. Meant for AddressSanitizer and UBSan: every buffer has its exact size.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "blob.h"
#include "dispatch.h"
#include "run.h"
#include "sddmm.h"
#include "tests/bitmap_cases.h"
#include "tests/blobs.h"
#include "vectors_driver.h"

using namespace prunus;
using namespace driver;

namespace {

// The same weight in tiles, its blocks kept.
Blob tiled(Blob& from) {
  const Weight w = open_blob(from.bytes());
  const int64_t tile = tile_rows(w.rows), tiles = (w.rows + tile - 1) / tile;
  BlobHeader h = *reinterpret_cast<const BlobHeader*>(from.bytes());
  h.kind = kTiledF32;
  h.columns_at = (64 + 4 * (h.blocks * h.rows + tiles + 1) + 7) / 8 * 8;
  h.values_at = (h.columns_at + 2 * h.nnz + 7) / 8 * 8;
  Blob blob;
  blob.words.resize((h.values_at + 4 * h.nnz + 7) / 8);
  std::memcpy(blob.bytes(), &h, sizeof h);
  auto* entries = reinterpret_cast<uint32_t*>(blob.bytes() + h.offsets_at);
  auto* starts = entries + w.rows * w.blocks;
  auto* columns = reinterpret_cast<uint16_t*>(blob.bytes() + h.columns_at);
  auto* values = reinterpret_cast<float*>(blob.bytes() + h.values_at);
  uint32_t at = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    *starts++ = at;
    const int64_t end = std::min((t + 1) * tile, w.rows);
    for (int64_t b = 0; b < w.blocks; ++b) {
      const uint32_t* offsets = w.offsets + b * w.rows;
      const auto count = [&](int64_t row) { return offsets[row + 1] - offsets[row]; };
      std::vector<int64_t> order;
      for (int64_t row = t * tile; row < end; ++row) order.push_back(row);
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t p, int64_t q) { return count(p) > count(q); });
      for (int64_t row : order) {
        *entries++ = static_cast<uint32_t>(row - t * tile) | count(row) << 16;
        std::copy(w.columns + offsets[row], w.columns + offsets[row + 1], columns + at);
        std::copy(w.values + offsets[row], w.values + offsets[row + 1], values + at);
        at += count(row);
      }
    }
  }
  *starts = at;
  return blob;
}

struct Case {
  int64_t m, k, n;
  double sparsity;
  uint32_t block;
  bool in_tiles, tokens, bias, relu;
  int threads, isa;
};

bool check(const Case& c, const std::vector<float>& dense, const float* x, const float* bias,
           const float* y, int64_t ldx, int64_t ldy) {
  for (int64_t r = 0; r < c.m; ++r)
    for (int64_t j = 0; j < c.n; ++j) {
      double exact = bias ? bias[r] : 0.0, scale = std::fabs(exact);
      int count = 2;
      for (int64_t i = 0; i < c.k; ++i) {
        const double w = dense[r * c.k + i];
        if (w == 0.0) continue;
        const double term = w * (c.tokens ? x[j * ldx + i] : x[i * ldx + j]);
        exact += term;
        scale += std::fabs(term);
        ++count;
      }
      if (c.relu && exact < 0) exact = 0;
      const double got = c.tokens ? y[j * ldy + r] : y[r * ldy + j];
      if (!(std::fabs(got - exact) <= count * 1.2e-7 * scale)) {
        std::printf("%s %s m=%ld k=%ld n=%ld block=%u threads=%d: y[%ld, %ld] = %g, not %g\n",
                    kernels_at(c.isa).isa, c.tokens ? "tokens" : "planes", static_cast<long>(c.m),
                    static_cast<long>(c.k), static_cast<long>(c.n), c.block, c.threads,
                    static_cast<long>(r), static_cast<long>(j), got, exact);
        return false;
      }
    }
  return true;
}

bool run_case(const Case& c) {
  std::vector<float> dense(c.m * c.k);
  for (float& value : dense)
    value = std::fabs(uniform()) < c.sparsity ? 0.0f : static_cast<float>(uniform());
  Blob blob = pack(dense, c.m, c.k, c.block);
  if (c.in_tiles) blob = tiled(blob);
  const int64_t pad = c.tokens ? 0 : 3;
  const int64_t ldx = c.tokens ? c.k : c.n + pad, ldy = c.tokens ? c.m : c.n + pad;
  const auto x = noise(c.tokens ? c.n * c.k : (c.k ? (c.k - 1) * ldx + c.n : 0));
  const auto y = noise(c.tokens ? c.n * c.m : (c.m ? (c.m - 1) * ldy + c.n : 0));
  const auto bias = noise(c.m);
  Call call{};
  call.w = open_blob(blob.bytes());
  call.layout = c.tokens ? Layout::tokens : Layout::planes;
  call.x = x.get();
  call.ldx = ldx;
  call.y = y.get();
  call.ldy = ldy;
  call.n = c.n;
  call.bias = c.bias ? bias.get() : nullptr;
  call.flags = c.relu ? kRelu : 0;
  call.threads = c.threads;
  call.kernels = &kernels_at(c.isa);
  return run(call) && check(c, dense, x.get(), call.bias, y.get(), ldx, ldy);
}

// Two or three layers in tiles against the same layers one by one.
bool chain_case(int64_t n, int isa) {
  const int64_t widths[] = {1 + static_cast<int64_t>(rng() % 90), rng() % 4 ? 100 : 1100,
                            1 + static_cast<int64_t>(rng() % 90), 40};
  const int count = 2 + rng() % 2;
  std::vector<Blob> blobs;
  std::vector<ChainLayer> layers;
  const auto bias = noise(1100);
  for (int i = 0; i < count; ++i) {
    std::vector<float> dense(widths[i] * widths[i + 1]);
    for (float& value : dense) value = uniform() < 0.6 ? 0.0f : static_cast<float>(uniform());
    Blob rows = pack(dense, widths[i + 1], widths[i], rng() % 2 ? 65535 : 40);
    blobs.push_back(tiled(rows));
    layers.push_back({open_blob(blobs[i].bytes()), rng() % 2 ? bias.get() : nullptr, kRelu});
  }
  const int64_t rows = widths[count];
  const auto x = noise(n * widths[0]), y = noise(n * rows), residual = noise(n * rows);
  const Kernels* kernels = &kernels_at(isa);
  const int threads = static_cast<int>(1 + rng() % 3);
  if (!run_chain({layers.data(), count, x.get(), y.get(), n, residual.get(), threads, kernels}))
    return false;
  std::vector<float> last(x.get(), x.get() + n * widths[0]);
  for (int i = 0; i < count; ++i) {
    std::vector<float> next(n * widths[i + 1]);
    Call call{};
    call.w = layers[i].w;
    call.layout = Layout::tokens;
    call.x = last.data();
    call.ldx = widths[i];
    call.y = next.data();
    call.ldy = widths[i + 1];
    call.n = n;
    call.bias = layers[i].bias;
    call.residual = i + 1 == count ? residual.get() : nullptr;
    call.flags = kRelu;
    call.threads = 1;
    call.kernels = kernels;
    if (!run(call)) return false;
    last = next;
  }
  if (std::equal(last.begin(), last.end(), y.get())) return true;
  std::printf("%s chain of %d, n=%ld differs\n", kernels->isa, count, static_cast<long>(n));
  return false;
}

// One axis that the kernel fits into.
Axis random_axis() {
  Axis a{};
  for (;;) {
    a.in = 1 + rng() % 30;
    a.kernel = 1 + rng() % 5;
    a.stride = 1 + rng() % 3;
    a.dilation = 1 + rng() % 4;
    a.before = rng() % 5;
    const int64_t rest = a.in + a.before + rng() % 5 - a.dilation * (a.kernel - 1) - 1;
    a.out = rest / a.stride + 1;
    if (rest >= 0) return a;
  }
}

double conv_exact(const Conv& c, int64_t rows, const std::vector<float>& dense, const float* x,
                  int64_t image, int64_t row, int64_t at_down, int64_t at_across) {
  const Axis &down = c.down, &across = c.across;
  const int64_t channels = c.channels / c.groups;
  const float* w = &dense[row * channels * down.kernel * across.kernel];
  double exact = 0;
  for (int64_t channel = 0; channel < channels; ++channel)
    for (int64_t i = 0; i < down.kernel; ++i)
      for (int64_t j = 0; j < across.kernel; ++j, ++w) {
        const int64_t v = at_down * down.stride + i * down.dilation - down.before;
        const int64_t h = at_across * across.stride + j * across.dilation - across.before;
        if (*w == 0.0f || v < 0 || v >= down.in || h < 0 || h >= across.in) continue;
        const int64_t plane = image * c.channels + row / (rows / c.groups) * channels + channel;
        exact += static_cast<double>(*w) * x[(plane * down.in + v) * across.in + h];
      }
  return exact;
}

bool conv_case(int isa) {
  Conv c{};
  c.batch = 1 + rng() % 4;
  c.groups = 1 + rng() % 3;
  c.channels = c.groups * (1 + rng() % 4);
  c.down = random_axis();
  c.across = random_axis();
  const int64_t rows = c.groups * (1 + rng() % 40);
  const int64_t cols = c.channels / c.groups * c.down.kernel * c.across.kernel;
  std::vector<float> dense(rows * cols);
  for (float& value : dense) value = uniform() < 0.2 ? 0.0f : static_cast<float>(uniform());
  Blob blob = pack(dense, rows, cols, rng() % 2 == 0 ? 65536 : 18);
  const auto x = noise(c.batch * c.channels * c.down.in * c.across.in);
  const auto residual = noise(c.batch * rows * conv_pixels(c));
  const auto y = noise(c.batch * rows * conv_pixels(c));
  Call call{};
  call.w = open_blob(blob.bytes());
  call.layout = Layout::conv;
  call.kernels = &kernels_at(isa);
  if (!plan_conv(c, call.kernels->panel)) return false;
  call.conv = c;
  call.x = x.get();
  call.ldx = c.down.in * c.across.in;
  call.y = y.get();
  call.ldy = conv_pixels(c);
  call.n = c.positions;
  call.residual = residual.get();
  call.threads = static_cast<int>(1 + rng() % 3);
  if (!run(call)) return false;
  int64_t at = 0;
  for (int64_t image = 0; image < c.batch; ++image)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < c.down.out; ++i)
        for (int64_t j = 0; j < c.across.out; ++j, ++at) {
          const double exact = residual[at] + conv_exact(c, rows, dense, x.get(), image, row, i, j);
          if (std::fabs(y[at] - exact) <= 1e-5 * (1 + cols)) continue;
          std::printf("%s conv: y[%ld] = %g, not %g\n", kernels_at(isa).isa,
                      static_cast<long>(at), y[at], exact);
          return false;
        }
  return true;
}

// The gradient to the values of a matrix, of tokens or planes.
bool sampled_case(int64_t m, int64_t k, int64_t n, uint32_t block, int kind, int isa) {
  const bool tokens = kind == 0;
  std::vector<float> dense(m * k);
  for (float& value : dense) value = uniform() < 0.4 ? 0.0f : static_cast<float>(uniform());
  Blob blob = pack(dense, m, k, block);
  const Weight w = open_blob(blob.bytes());
  const auto x = noise(n * k), g = noise(n * m), out = noise(w.nnz);
  std::vector<float> before(out.get(), out.get() + w.nnz);
  SampledCall call{w, tokens, x.get(), tokens ? k : n, g.get(), tokens ? m : n, n, nullptr,
                   out.get(), rng() % 2 == 0, static_cast<int>(1 + rng() % 3), &kernels_at(isa)};
  if (!run_sampled(call)) return false;
  for (uint32_t b = 0; b < w.blocks; ++b)
    for (int64_t r = 0; r < m; ++r)
      for (uint32_t i = w.offsets[b * m + r]; i < w.offsets[b * m + r + 1]; ++i) {
        const int64_t c = static_cast<int64_t>(b) * w.block + w.columns[i];
        double exact = call.accumulate ? before[i] : 0.0, scale = std::fabs(exact);
        for (int64_t t = 0; t < n; ++t) {
          const double left = tokens ? g[t * m + r] : g[r * n + t];
          const double right = tokens ? x[t * k + c] : x[c * n + t];
          exact += left * right;
          scale += std::fabs(left * right);
        }
        if (std::fabs(out[i] - exact) <= (n + 3) * 1.2e-7 * scale) continue;
        std::printf("%s sampled kind=%d m=%ld k=%ld n=%ld: out[%u] = %g, not %g\n",
                    kernels_at(isa).isa, kind, static_cast<long>(m), static_cast<long>(k),
                    static_cast<long>(n), i, out[i], exact);
        return false;
      }
  return true;
}

bool transpose_case(int64_t m, int64_t k, uint32_t block, uint32_t block_of_transpose) {
  std::vector<float> dense(m * k), turned(m * k);
  for (float& value : dense) value = uniform() < 0.6 ? 0.0f : static_cast<float>(uniform());
  for (int64_t r = 0; r < m; ++r)
    for (int64_t c = 0; c < k; ++c) turned[c * m + r] = dense[r * k + c];
  Blob from = pack(dense, m, k, block);
  Blob wanted = pack(turned, k, m, block_of_transpose);
  Blob to = new_blob(k, m, open_blob(from.bytes()).nnz, block_of_transpose);
  transpose_blob(from.bytes(), to.bytes());
  return to.words == wanted.words;
}

}  // namespace

int group_cases(int* done);  // driver_groups.cpp

int attention_cases(int* done);  // driver_attention.cpp
int token_cases(int* done);      // driver_token.cpp

int net_cases(int* done);  // driver_net.cpp

int nm_cases(int* done);  // driver_nm.cpp

int main() {
  set_grain(1);
  const int64_t sizes[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 53, 63, 64, 65, 97, 131};
  const int64_t wide[] = {1, 2, 15, 16, 17, 33, 47, 63, 64, 65, 100, 131, 200};
  const double sparsities[] = {0.0, 0.5, 0.9, 0.99, 1.0};
  const uint32_t blocks[] = {1, 16, 40, 65536};
  const auto pick = [](auto& list) { return list[rng() % (sizeof(list) / sizeof(list[0]))]; };
  int failed = 0, done = 0;
  for (int isa = 0; isa < available_count(); ++isa)
    for (int i = 0; i < 600; ++i, ++done) {
      const int64_t n = i % 5 == 0 ? pick(sizes) : pick(wide);
      const bool in_tiles = i % 3 == 0;
      const int64_t m = i % 30 == 0 ? 1100 : pick(sizes);
      failed += !run_case({m, pick(sizes), n, pick(sparsities), pick(blocks), in_tiles, i % 2 == 0,
                           rng() % 2 == 0, rng() % 2 == 0, static_cast<int>(1 + rng() % 3), isa});
    }
  for (int isa = 0; isa < available_count(); ++isa)
    for (int i = 0; i < 60; ++i, ++done) failed += !chain_case(pick(sizes), isa);
  for (int isa = 0; isa < available_count(); ++isa)
    for (int i = 0; i < 150; ++i, ++done) failed += !conv_case(isa);
  for (int isa = 0; isa < available_count(); ++isa)
    for (int i = 0; i < 300; ++i, ++done)
      failed += !sampled_case(pick(sizes), i % 50 == 0 ? 1100 : pick(sizes), pick(wide),
                              pick(blocks), i % 3, isa);
  for (int isa = 0; isa < available_count(); ++isa, done += 300)
    failed += bitmap_cases::run_all(isa, 300);
  for (int i = 0; i < 200; ++i, ++done)
    failed += !transpose_case(pick(sizes), pick(sizes), pick(blocks), pick(blocks));
  failed += group_cases(&done);
  failed += vector_cases(&done);
  failed += attention_cases(&done);
  failed += token_cases(&done);
  failed += net_cases(&done);
  failed += nm_cases(&done);
  std::printf("%d cases on %d instruction sets, %d failed\n", done, available_count(), failed);
  return failed != 0;
}
