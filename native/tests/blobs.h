// Random numbers and packed weights for the cases of driver.cpp; every buffer has its exact size.
#pragma once
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "blob.h"
#include "kernel.h"

namespace driver {

using namespace prunus;

inline std::mt19937 rng(20240607);

inline double uniform() { return std::uniform_real_distribution<double>(-1.0, 1.0)(rng); }

inline std::unique_ptr<float[]> noise(size_t count) {
  std::unique_ptr<float[]> data(new float[count]);
  for (size_t i = 0; i < count; ++i) data[i] = static_cast<float>(uniform());
  return data;
}

struct Blob {
  std::vector<uint64_t> words;  // 8-byte aligned bytes
  char* bytes() { return reinterpret_cast<char*>(words.data()); }
};

// An empty blob of this shape; sections follow each other, 8-byte aligned.
inline Blob new_blob(int64_t rows, int64_t cols, int64_t nnz, uint32_t block) {
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

inline Blob pack(const std::vector<float>& dense, int64_t rows, int64_t cols, uint32_t block) {
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

}  // namespace driver
