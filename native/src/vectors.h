// Weights whose outputs share their columns in groups: header and layout, as
// src/prunus/kernels/vectors.py writes them (little-endian), and the product's driver.
#pragma once
#include <stdint.h>

namespace prunus {

struct VectorHeader {
  char magic[4];
  uint16_t version, kind;
  uint64_t rows, cols, nnz;
  uint16_t height, permuted;
  uint32_t count;
  uint64_t offsets_at, columns_at, values_at;
};
static_assert(sizeof(VectorHeader) == 64, "the header is 64 bytes");

constexpr uint16_t kVectorsF32 = 32;
constexpr uint16_t kVectorsBf16 = 33;
constexpr uint16_t kVectorsI8 = 34;

// Columns of a tile of bfloat16 values; the last tile of a group is as wide as it must be, even.
constexpr int64_t kTileColumns = 32;
constexpr int64_t kByteColumns = 64;  // of a tile of int8 values; the last one a multiple of four
constexpr int64_t kMostHeight = 32;

// `height` consecutive packed rows are a group; group g has the columns from offsets[g] to
// offsets[g + 1]. Values: float32 as [column][height]; bfloat16 as tiles [height][up to 32
// columns], and groups of an odd number of columns end in column `cols`, whose values are zero; int8
// the same in tiles of up to 64 columns and multiples of four.
struct Vectors {
  int64_t rows, cols, groups, height;
  bool pairs;               // bfloat16
  const uint32_t* offsets;  // [groups + 1]
  const uint16_t* columns;
  const void* values;
  const uint32_t* order;  // [rows]: the output that a packed row is; null: the same
  bool bytes = false;             // int8
  const float* scales = nullptr;  // of int8 [groups * height]: a row is values times its scale
  const int32_t* sums = nullptr;  // of int8 [groups * height]: the sum of a row's values
};

static inline bool is_vectors(const VectorHeader& h) {
  return h.magic[0] == 'P' && h.magic[1] == 'R' && h.magic[2] == 'B' && h.magic[3] == 'K' &&
         h.version == 1 && h.kind >= kVectorsF32 && h.kind <= kVectorsI8;
}

static inline Vectors open_vectors(const void* blob) {
  const VectorHeader& h = *static_cast<const VectorHeader*>(blob);
  const char* base = static_cast<const char*>(blob);
  Vectors v;
  v.rows = static_cast<int64_t>(h.rows);
  v.cols = static_cast<int64_t>(h.cols);
  v.height = h.height;
  v.groups = (v.rows + v.height - 1) / v.height;
  v.pairs = h.kind == kVectorsBf16;
  v.offsets = reinterpret_cast<const uint32_t*>(base + h.offsets_at);
  v.columns = reinterpret_cast<const uint16_t*>(base + h.columns_at);
  v.values = base + h.values_at;
  v.bytes = h.kind == kVectorsI8;
  if (v.bytes) {
    const int64_t rows = v.groups * v.height;
    v.scales = reinterpret_cast<const float*>(base + h.values_at);
    v.sums = reinterpret_cast<const int32_t*>(v.scales + rows);
    v.values = base + (h.values_at + 8 * static_cast<uint64_t>(rows) + 63) / 64 * 64;
  }
  v.order = h.permuted ? reinterpret_cast<const uint32_t*>(base + sizeof(VectorHeader)) : nullptr;
  return v;
}

// Rows of the output buffer: all of them where they may come in any order.
static inline int64_t vector_buffer_rows(const Vectors& v) {
  return (v.order != nullptr ? v.rows : 64) + 2 * kMostHeight;
}

// The panel with a row of zeros behind, the output buffer, one group, and scratch for tiles. Of
// int8 a copy of the panel, too.
static inline int64_t vector_workspace_floats(const Vectors& v, int64_t panel) {
  const int64_t rows = v.bytes ? 2 * v.cols + v.cols / 4 : v.cols;
  return (rows + 64 + vector_buffer_rows(v) + kMostHeight) * panel + 4096;
}

}  // namespace prunus
