// The blob's header, as src/prunus/kernels/blob.py writes it (little-endian).
#pragma once
#include "kernel.h"

namespace prunus {

struct BlobHeader {
  char magic[4];
  uint16_t version, kind;
  uint64_t rows, cols, nnz;
  uint32_t block, blocks;
  uint64_t offsets_at, columns_at, values_at;
};
static_assert(sizeof(BlobHeader) == 64, "the header is 64 bytes");

constexpr uint16_t kBlobVersion = 1;
constexpr uint16_t kCsrF32 = 1;
constexpr uint16_t kTiledF32 = 8;

// Magic, version and kind; the rest was validated when the blob was made or loaded.
inline bool is_blob(const BlobHeader& h) {
  return h.magic[0] == 'P' && h.magic[1] == 'R' && h.magic[2] == 'B' && h.magic[3] == 'K' &&
         h.version == kBlobVersion && (h.kind == kCsrF32 || h.kind == kTiledF32);
}

inline bool is_tiled(const BlobHeader& h) { return h.kind == kTiledF32; }

// Rows of a tile: at least 128, so that many have equally many non-zeros in a block, and an even
// number of tiles if there are several, so that two threads share a panel well.
inline int64_t tile_rows(int64_t rows) {
  if (rows <= kLeastTile) return kLeastTile;
  const int64_t tiles = (rows + 2 * kMostTile - 1) / (2 * kMostTile) * 2;
  return ((rows + tiles - 1) / tiles + kRowGroup - 1) / kRowGroup * kRowGroup;
}

inline Weight open_blob(const void* blob) {
  const BlobHeader& h = *static_cast<const BlobHeader*>(blob);
  const char* base = static_cast<const char*>(blob);
  Weight w{};
  w.rows = static_cast<int64_t>(h.rows);
  w.cols = static_cast<int64_t>(h.cols);
  w.nnz = static_cast<int64_t>(h.nnz);
  w.block = h.block;
  w.blocks = h.blocks;
  w.offsets = reinterpret_cast<const uint32_t*>(base + h.offsets_at);
  w.columns = reinterpret_cast<const uint16_t*>(base + h.columns_at);
  w.values = reinterpret_cast<const float*>(base + h.values_at);
  if (is_tiled(h)) {
    w.tile = tile_rows(w.rows);
    w.starts = w.offsets + w.rows * w.blocks;
  }
  return w;
}

}  // namespace prunus
