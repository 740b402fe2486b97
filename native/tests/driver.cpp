// Runs every kernel of every instruction set this machine has on awkward shapes, against a loop
// in double precision. Meant for AddressSanitizer and UBSan: every buffer has its exact size.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "blob.h"
#include "dispatch.h"
#include "run.h"

using namespace prunus;

namespace {

std::mt19937 rng(20240607);

double uniform() { return std::uniform_real_distribution<double>(-1.0, 1.0)(rng); }

std::unique_ptr<float[]> noise(size_t count) {
  std::unique_ptr<float[]> data(new float[count]);
  for (size_t i = 0; i < count; ++i) data[i] = static_cast<float>(uniform());
  return data;
}

struct Blob {
  std::vector<uint64_t> words;  // 8-byte aligned bytes
  char* bytes() { return reinterpret_cast<char*>(words.data()); }
};

// An empty blob of this shape; sections follow each other, 8-byte aligned.
Blob new_blob(int64_t rows, int64_t cols, int64_t nnz, uint32_t block) {
  BlobHeader h{{'P', 'R', 'B', 'K'}, kBlobVersion, kCsrF32, 0, 0, 0, block, 1, 64, 0, 0};
  h.rows = rows;
  h.cols = cols;
  h.nnz = nnz;
  if (cols > block) h.blocks = static_cast<uint32_t>((cols + block - 1) / block);
  h.columns_at = (64 + 4 * (h.blocks * rows + 1) + 7) / 8 * 8;
  h.values_at = (h.columns_at + 2 * nnz + 7) / 8 * 8;
  Blob blob;
  blob.words.resize((h.values_at + 4 * nnz + 7) / 8);
  std::memcpy(blob.bytes(), &h, sizeof h);
  return blob;
}

Blob pack(const std::vector<float>& dense, int64_t rows, int64_t cols, uint32_t block) {
  int64_t nnz = 0;
  for (float value : dense) nnz += value != 0.0f;
  Blob blob = new_blob(rows, cols, nnz, block);
  const Weight w = open_blob(blob.bytes());
  auto* offsets = const_cast<uint32_t*>(w.offsets);
  auto* columns = const_cast<uint16_t*>(w.columns);
  auto* values = const_cast<float*>(w.values);
  uint32_t at = 0;
  for (int64_t b = 0; b < w.blocks; ++b)
    for (int64_t r = 0; r < rows; ++r) {
      offsets[b * rows + r] = at;
      for (int64_t c = b * block; c < cols && c < (b + 1) * block; ++c)
        if (dense[r * cols + c] != 0.0f) {
          columns[at] = static_cast<uint16_t>(c - b * block);
          values[at++] = dense[r * cols + c];
        }
    }
  offsets[w.blocks * rows] = at;
  return blob;
}

struct Case {
  int64_t m, k, n;
  double sparsity;
  uint32_t block;
  bool tokens, bias, relu;
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
      failed += !run_case({pick(sizes), pick(sizes), n, pick(sparsities), pick(blocks), i % 2 == 0,
                           rng() % 2 == 0, rng() % 2 == 0, static_cast<int>(1 + rng() % 3), isa});
    }
  for (int i = 0; i < 200; ++i, ++done)
    failed += !transpose_case(pick(sizes), pick(sizes), pick(blocks), pick(blocks));
  std::printf("%d cases on %d instruction sets, %d failed\n", done, available_count(), failed);
  return failed != 0;
}
