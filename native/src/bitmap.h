// A weight packed with a bitmap, as src/prunus/kernels/bitmap.py writes it (little-endian): groups
// of 16 rows, each cut into quads of 4 columns; a quad has one 64-bit mask, lowest bit first, and
// its values follow in the order of the bits.
//   float32, bfloat16: bit 16 c + r stands for column c, row r of the quad.
//   int8: bit 4 r + c, so that a row's four values share 32 bits.
#pragma once
#include "blob.h"

namespace prunus {

constexpr uint16_t kBitmapF32 = 16, kBitmapBf16 = 17, kBitmapI8 = 18;
constexpr int64_t kQuad = 4;

// Columns of X that one pass over the weight serves, at most.
constexpr int64_t kBitmapPanel = 12;

struct BitmapWeight {
  int64_t rows, cols, groups, quads;
  int kind;
  const uint32_t* offsets;  // [groups + 1]: the first value of each group
  const uint64_t* masks;    // [groups * quads]
  const void* values;       // readable up to 64 bytes beyond the last one
  const float* scales;      // int8: [16 groups], one per row
  const int32_t* sums;      // int8: [16 groups], the sum of each row's values
};

inline bool is_bitmap(const BlobHeader& h) {
  return h.magic[0] == 'P' && h.magic[1] == 'R' && h.magic[2] == 'B' && h.magic[3] == 'K' &&
         h.version == kBlobVersion && h.kind >= kBitmapF32 && h.kind <= kBitmapI8;
}

inline BitmapWeight open_bitmap(const void* blob) {
  const BlobHeader& h = *static_cast<const BlobHeader*>(blob);
  const char* base = static_cast<const char*>(blob);
  BitmapWeight w{};
  w.rows = static_cast<int64_t>(h.rows);
  w.cols = static_cast<int64_t>(h.cols);
  w.groups = (w.rows + kRowGroup - 1) / kRowGroup;
  w.quads = (w.cols + kQuad - 1) / kQuad;
  w.kind = h.kind;
  w.offsets = reinterpret_cast<const uint32_t*>(base + h.offsets_at);
  w.masks = reinterpret_cast<const uint64_t*>(base + h.columns_at);
  w.values = base + h.values_at;
  if (w.kind == kBitmapI8) {
    const uint64_t scales_at = (h.offsets_at + 4 * (w.groups + 1) + 63) / 64 * 64;
    w.scales = reinterpret_cast<const float*>(base + scales_at);
    w.sums = reinterpret_cast<const int32_t*>(w.scales + kRowGroup * w.groups);
  }
  return w;
}

// Floats of workspace: the columns of X in the kernel's order, for either kind of values.
static inline int64_t bitmap_workspace_floats(const BitmapWeight& w) {
  return 2 * (kQuad * w.quads + 16) * kBitmapPanel;
}

struct BitmapCall {
  BitmapWeight w;
  const float* x;  // [n, cols]
  float* y;        // [n, rows]
  int64_t n;
  const float* bias;      // or null
  const float* residual;  // [n, rows] or null
  uint32_t flags;
  int threads;
  const struct Kernels* kernels;
};

// False if memory for a panel cannot be had. The result does not depend on the threads.
bool run_bitmap(const BitmapCall& call);

}  // namespace prunus
