// What a kernel is given, and the table of kernels that each instruction set exports.
#pragma once
#include <stdint.h>

#include "attention.h"
#include "conv.h"
#include "norm.h"
#include "token.h"
#include "vectors.h"

namespace prunus {

// Task::flags, one at most: what is done to each output after bias and residual.
enum : uint32_t { kRelu = 1u, kGelu = 2u, kGeluTanh = 4u, kSilu = 8u, kRelu6 = 16u };

// Task::flags of a sampled product: add to what is in the output.
constexpr uint32_t kAccumulate = 1u << 16;

// Row ranges given to a kernel start at multiples of this many rows.
constexpr int64_t kRowGroup = 16;

// Panels that one unit of a 1x1 convolution straight from the planes spans at most.
constexpr int kPointPanels = 2;

// A packed weight; see blob.h for the layout. In tiles, `offsets` are entries instead.
struct Weight {
  int64_t rows, cols, nnz;
  uint32_t block, blocks;
  const uint32_t* offsets;  // [blocks * rows + 1]
  const uint16_t* columns;  // [nnz], relative to the block
  const float* values;      // [nnz]
  int64_t tile;             // rows of a tile, a multiple of kRowGroup; 0: not in tiles
  const uint32_t* starts;   // [tiles + 1], first non-zero of each tile; or null
};

// One share of a product: the positions (panel, row) from `begin` up to but without `end`, in
// lexicographic order; a panel is `Kernels::panel` columns of the product.
struct Task {
  Weight w;
  const float* x;
  int64_t ldx;
  float* y;
  int64_t ldy;
  int64_t n;
  const float* bias;      // [rows] or null
  const float* residual;  // laid out as y, added before the activation; or null
  uint32_t flags;
  int64_t begin_panel, begin_row, end_panel, end_row;
  const Conv* conv;  // null but for convolutions
  const float* g;  // of a sampled product: the other factor, ldg floats between its rows
  int64_t ldg;
  const struct BitmapWeight* bitmap;  // of a bitmap-packed product, whose panels have
  int64_t panel;                      // this many columns of X
  const Attention* attention;  // begin_row and end_row count blocks of queries
  const LayerNorm* norm;       // they count its rows
  const TokenAttention* token;  // they count heads
  const Vectors* vectors;  // of a product of groups; w holds the shape only
  const struct NmWeight* nm;  // of an n:m product, whose panels have `panel` tokens
  float* workspace;  // 64-byte aligned, workspace_floats() long
  bool panel_in, panel_out;  // of a weight in tiles and one panel: x and y are panels themselves
  int64_t skew;  // of a convolution: floats that planes of the residual lie further apart than of y
  bool padded_in, padded_out;  // of a convolution: planes of x and y have room for whole vectors
};

using KernelFunction = void (*)(const Task&);

struct Kernels {
  const char* isa;
  int64_t panel;
  int64_t vector_panel, pair_panel, byte_panel;  // of products of groups: fp32, bf16, int8
  int64_t query_block;                           // of attention
#define PRUNUS_KERNEL(name, layout, description) KernelFunction name;
#include "kernels.def"
#undef PRUNUS_KERNEL
};

// Rows of the output tile: it stays in the first-level cache while the column blocks pass, and
// each token of the output gets several neighbouring lines at a time.
constexpr int64_t kTileRows = 64;

// Rows of a weight in tiles whose outputs are kept at once, and the most and fewest of one tile.
constexpr int64_t kMostTiledRows = 1024;
constexpr int64_t kMostTile = 256;
constexpr int64_t kLeastTile = 128;

// Static: an inline function would be a weak symbol in every ISA file.
static inline int64_t workspace_floats(const Weight& w, int64_t panel) {
  int64_t rows = kTileRows;
  if (w.tile != 0) {
    rows = (w.rows + w.tile - 1) / w.tile * w.tile;
    if (rows > kMostTiledRows) rows = kMostTiledRows;
  }
  return (w.cols + rows + 2 * kRowGroup) * panel;
}

// Parts of the workspace of a convolution, each a multiple of 16 floats long: the panel, the output
// tile, the runs in and out (of up to two panels), the offset of each column within the panel,
// where each chunk of columns begins in each row.
static inline int64_t conv_panel_floats(const Conv& c) {
  return c.channels * conv_copies(c) * c.length + 16;
}
static inline int64_t conv_tile_floats(int64_t panel) { return (kTileRows + 2) * panel + 16; }
static inline int64_t conv_runs_floats(const Conv& c, int64_t panel) {
  const int64_t runs = conv_runs_in(c) + conv_runs_out(c, 2 * panel);
  return (runs * int64_t{sizeof(Run) / sizeof(float)} + 15) / 16 * 16;
}

// Columns of W that pass at a time: what they read of a panel stays in the first-level cache, but
// each row has enough of them to pay for taking up its sums again.
constexpr int64_t kNearFloats = 8 * 1024;
constexpr int64_t kLeastRun = 16;

static inline int64_t conv_chunk(const Weight& w, const Conv& c, int64_t panel) {
  const int64_t area = c.down.kernel * c.across.kernel, channels = c.channels / c.groups;
  if (w.blocks != 1 || w.rows == 0) return w.cols;
  const int64_t reach = c.down.shift * c.across.extent + c.across.shift;
  const int64_t near = kNearFloats / (conv_copies(c) * (2 * panel + reach));
  const int64_t wanted = near == 0 ? channels : (channels + near - 1) / near;
  const int64_t most = w.nnz / (w.rows * kLeastRun);
  const int64_t chunks = wanted < most ? wanted : most;
  return chunks <= 1 ? w.cols : (channels + chunks - 1) / chunks * area;
}
static inline int64_t conv_chunks(const Weight& w, int64_t chunk) {
  return chunk == 0 ? 1 : (w.cols + chunk - 1) / chunk;
}

static inline int64_t conv_columns_floats(const Weight& w, const Conv& c, int64_t panel) {
  return (w.cols + 15) / 16 * 16 + w.rows * (conv_chunks(w, conv_chunk(w, c, panel)) + 1);
}
static inline int64_t conv_workspace_floats(const Weight& w, const Conv& c, int64_t panel) {
  return conv_panel_floats(c) + conv_tile_floats(panel) + conv_runs_floats(c, panel) +
         conv_columns_floats(w, c, panel);
}

// Whether an axis keeps its pixels as they are.
static inline bool is_plain(const Axis& axis) {
  return axis.kernel == 1 && axis.stride == 1 && axis.before == 0 && axis.in == axis.out;
}
// Whether a convolution multiplies pixels only, and its planes are best read in place: of small
// images that are not padded, several share a panel.
constexpr int64_t kFewPixels = 64;
static inline bool is_pointwise(const Weight& w, const Conv& c) {
  const int64_t pixels = conv_pixels(c);
  const bool small = c.batch > 1 && pixels < kFewPixels && pixels % 16 != 0;
  return !small && c.groups == 1 && w.blocks == 1 && is_plain(c.down) && is_plain(c.across);
}

// As for a convolution, but the tile holds the output's gradient of two panels.
static inline int64_t grad_tile_floats(int64_t panel) { return kTileRows * 2 * panel + 16; }
static inline int64_t grad_workspace_floats(const Weight& w, const Conv& c, int64_t panel) {
  return conv_panel_floats(c) + grad_tile_floats(panel) + conv_runs_floats(c, panel) +
         conv_columns_floats(w, c, panel);
}

// Whether a weight has no zeros, so that its values are the rows of a matrix.
static inline bool is_full(const Weight& w) {
  return w.blocks == 1 && w.nnz == w.rows * w.cols;
}

// The same for groups: all positions of a band are in the tile, for at most four rows at a time.
constexpr int64_t kMostSharing = 4;
static inline int64_t group_runs_floats(const Conv& c, int64_t panel) {
  const int64_t runs = conv_runs_in(c) + conv_runs_out(c, c.panels * panel);
  return (runs * int64_t{sizeof(Run) / sizeof(float)} + 15) / 16 * 16;
}
static inline int64_t group_workspace_floats(const Weight& w, const Conv& c, int64_t panel) {
  return conv_panel_floats(c) + kMostSharing * c.panels * panel + 32 +
         group_runs_floats(c, panel) + w.cols;
}

extern const Kernels kernels_scalar;
extern const Kernels kernels_amx_emulated;
#ifdef PRUNUS_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_vnni;
#ifdef PRUNUS_HAS_BF16
extern const Kernels kernels_avx512_bf16;
#endif
#ifdef PRUNUS_HAS_AMX
extern const Kernels kernels_amx;
#endif
#endif
#ifdef PRUNUS_NEON
extern const Kernels kernels_neon;
#endif

}  // namespace prunus
