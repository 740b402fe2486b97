// Weights of which no row keeps more than a few of any 16 neighbouring columns (2:4, 1:4, 4:8 and
// the like), as src/prunus/kernels/nm.py writes them (little-endian), and the product's driver.
#pragma once
#include "blob.h"

namespace prunus {

constexpr uint16_t kNmF32 = 40, kNmBf16 = 41;
constexpr int64_t kWindow = 16;  // columns of a window
constexpr int64_t kMostSlots = 8;

// Groups of 16 rows, cut into windows of 16 columns; in each a row has `slots` places for values,
// a place for each value's column within the window (4 bits), and zeros where it keeps fewer.
//   float32: values [group][window][slot][16 rows]; the pick of row r in bits
//     32 (r % 2) + 4 (r / 2) of uint64 [group][window][slot].
//   bfloat16: slots in pairs, values [group][window][pair][16 rows][2]; the pick of row 4 q + i and
//     slot s of a pair in bits 32 i + 16 s + 4 q of 128, as uint64 [group][window][pair][2].
struct NmWeight {
  int64_t rows, cols, groups, windows, slots;
  bool pairs;  // bfloat16
  const uint64_t* picks;
  const void* values;
};

inline bool is_nm(const BlobHeader& h) {
  return h.magic[0] == 'P' && h.magic[1] == 'R' && h.magic[2] == 'B' && h.magic[3] == 'K' &&
         h.version == kBlobVersion && (h.kind == kNmF32 || h.kind == kNmBf16);
}

inline NmWeight open_nm(const void* blob) {
  const BlobHeader& h = *static_cast<const BlobHeader*>(blob);
  const char* base = static_cast<const char*>(blob);
  NmWeight w{};
  w.rows = static_cast<int64_t>(h.rows);
  w.cols = static_cast<int64_t>(h.cols);
  w.groups = (w.rows + kRowGroup - 1) / kRowGroup;
  w.windows = (w.cols + kWindow - 1) / kWindow;
  w.slots = h.block;
  w.pairs = h.kind == kNmBf16;
  w.picks = reinterpret_cast<const uint64_t*>(base + h.columns_at);
  w.values = base + h.values_at;
  return w;
}

// Tokens that one pass over the weight serves, a multiple of 8: large weights come from afar, so a
// panel may well be larger than the second-level cache.
static inline int64_t nm_panel(const NmWeight& w) {
  constexpr int64_t kPanelFloats = 640 * 1024;
  const int64_t tokens = kPanelFloats / (w.windows * kWindow + kWindow) / 8 * 8;
  return tokens < 16 ? 16 : tokens > 128 ? 128 : tokens;
}

// Floats between the tokens of a panel: no power of two, so that they do not compete for the same
// places in the cache.
static inline int64_t nm_pitch(const NmWeight& w) { return w.windows * kWindow + kWindow; }

// The panel, the sums of 64 rows, and a flag for each token.
static inline int64_t nm_workspace_floats(const NmWeight& w, int64_t panel) {
  return (nm_pitch(w) + kTileRows + 1) * panel + 64;
}

struct NmCall {
  NmWeight w;
  const float* x;  // [n, cols]
  float* y;        // [n, rows]
  int64_t n;
  const float* bias;      // or null
  const float* residual;  // [n, rows] or null
  uint32_t flags;
  int threads;
  const Kernels* kernels;
};

// False if memory for a panel cannot be had. The result does not depend on the threads.
bool run_nm(const NmCall& call);

}  // namespace prunus
