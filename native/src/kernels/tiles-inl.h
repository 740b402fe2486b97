// Groups of 16 or 32 outputs in bfloat16 by products of tiles (Intel AMX): C [16 rows][16 columns
// of X] += A [16 rows][32 columns of W] times B [16 pairs of columns of W][16 columns of X].
// The rows of X that a tile of W wants are gathered and interleaved in pairs, then multiplied.
// Included after vectors-inl.h, where these are defined: TILE_* (the instructions, or tiles in
// software), (the attribute of functions that use them), Pairs (the product for other
// heights; its panel), gather_pairs, and interleave(panel, pitch, columns, width, to): pairs
// [width / 2] of 32 columns of X, the first 16 at `to`, the others 256 floats behind.

#ifndef TILE_CONFIGURE
#define TILE_CONFIGURE(config) _tile_loadconfig(config)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
// GCC's intrinsic does not say that it reads memory: what was written must be there before.
#define TILE_LOAD(t, from, stride)       \
  do {                                   \
    const void* tile_from = (from);      \
    __asm__ volatile("" ::: "memory");   \
    _tile_loadd(t, tile_from, stride);   \
  } while (0)
#define TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define TILE_PRODUCT(c, a, b) _tile_dpbf16ps(c, a, b)
#define TILE_PRODUCT_BYTES(c, a, b) _tile_dpbsud(c, a, b)
#endif

constexpr int64_t kTileFloats = 256;

// Eight tiles of 16 rows of 64 bytes. In static memory: GCC's intrinsic names only the first bytes
// of its operand, so that a local one is optimised away.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static const TileConfig kTileConfig = {
    1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// 4 tiles of X, 2 tiles of W.
struct TileScratch {
  alignas(64) float x[4 * kTileFloats];
  alignas(64) uint16_t w[2 * 16 * kTileColumns];
};

// The rows of a tile narrower than 32 columns, zeros behind.
inline const uint16_t* whole_tile(const uint16_t* tile, int64_t width, uint16_t* scratch) {
  if (width == kTileColumns) return tile;
  for (int64_t r = 0; r < 16; ++r)
    for (int64_t i = 0; i < kTileColumns; ++i)
      scratch[r * kTileColumns + i] = i < width ? tile[r * width + i] : uint16_t{0};
  return scratch;
}

// Two tiles of X, zeros behind the width.
inline void tile_pairs(const uint16_t* panel, int64_t pitch, const uint16_t* columns,
                       int64_t width, float* to) {
  interleave(panel, pitch, columns, width, to);
  for (int64_t p = width / 2; p < 16; ++p)
    for (int64_t t = 0; t < 16; ++t) to[p * 16 + t] = to[kTileFloats + p * 16 + t] = 0.0f;
}

// A group of 16: four tiles of sums, up to 64 columns of X.
template <int V>
void tile_group_16(const Vectors& w, int64_t g, const uint16_t* panel, float* out) {
  constexpr int64_t pitch = kPairPitch<V>;
  TileScratch scratch;
  const int64_t begin = w.offsets[g], end = w.offsets[g + 1];
  const auto* values = static_cast<const uint16_t*>(w.values);
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int64_t at = begin; at < end; at += kTileColumns) {
    const int64_t width = smaller(kTileColumns, end - at);
    tile_pairs(panel, pitch, w.columns + at, width, scratch.x);
    if (V > 2) tile_pairs(panel + 32, pitch, w.columns + at, width, scratch.x + 2 * kTileFloats);
    TILE_LOAD(4, whole_tile(values + at * 16, width, scratch.w), 64);
    TILE_LOAD(5, scratch.x, 64);
    TILE_PRODUCT(0, 4, 5);
    if (V > 1) {
      TILE_LOAD(6, scratch.x + kTileFloats, 64);
      TILE_PRODUCT(1, 4, 6);
    }
    if (V > 2) {
      TILE_LOAD(7, scratch.x + 2 * kTileFloats, 64);
      TILE_PRODUCT(2, 4, 7);
    }
    if (V > 3) {
      TILE_LOAD(5, scratch.x + 3 * kTileFloats, 64);
      TILE_PRODUCT(3, 4, 5);
    }
  }
  TILE_STORE(0, out, V * 64);
  if (V > 1) TILE_STORE(1, out + 16, V * 64);
  if (V > 2) TILE_STORE(2, out + 32, V * 64);
  if (V > 3) TILE_STORE(3, out + 48, V * 64);
}

// A group of 32: two tiles of W times H (1 or 2) tiles of X at a time.
template <int V, int H>
void tile_half_32(const Vectors& w, int64_t g, const uint16_t* panel, float* out) {
  constexpr int64_t pitch = kPairPitch<V>;
  TileScratch scratch;
  const int64_t begin = w.offsets[g], end = w.offsets[g + 1];
  const auto* values = static_cast<const uint16_t*>(w.values);
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int64_t at = begin; at < end; at += kTileColumns) {
    const int64_t width = smaller(kTileColumns, end - at);
    const uint16_t* tile = values + at * 32;
    tile_pairs(panel, pitch, w.columns + at, width, scratch.x);
    TILE_LOAD(4, whole_tile(tile, width, scratch.w), 64);
    TILE_LOAD(5, whole_tile(tile + 16 * width, width, scratch.w + 16 * kTileColumns), 64);
    TILE_LOAD(6, scratch.x, 64);
    TILE_PRODUCT(0, 4, 6);
    TILE_PRODUCT(1, 5, 6);
    if (H > 1) {
      TILE_LOAD(7, scratch.x + kTileFloats, 64);
      TILE_PRODUCT(2, 4, 7);
      TILE_PRODUCT(3, 5, 7);
    }
  }
  TILE_STORE(0, out, V * 64);
  TILE_STORE(1, out + 16 * V * 16, V * 64);
  if (H > 1) {
    TILE_STORE(2, out + 16, V * 64);
    TILE_STORE(3, out + 16 * V * 16 + 16, V * 64);
  }
}

struct TileProduct {
  static constexpr int64_t kWidth = kPairPanel, kUnit = 16;

  template <class Layout, int V>
  static void gather(const Task& task, int64_t first, int64_t count, float* panel) {
    gather_pairs<Layout, V>(task, first, count, panel);
  }

  template <int V>
  static void group(const Vectors& w, int64_t g, const float* panel, float* out) {
    const auto* source = reinterpret_cast<const uint16_t*>(panel);
    if (w.height == 16) {
      tile_group_16<V>(w, g, source, out);
    } else if (w.height == 32) {
      tile_half_32<V, (V > 1 ? 2 : 1)>(w, g, source, out);
      if (V > 2) tile_half_32<V, (V > 3 ? 2 : 1)>(w, g, source + 32, out + 32);
    } else {
      Pairs::template group<V>(w, g, panel, out);
    }
  }
};

// A thread's tiles are its own, and let go of as soon as the share is done.
template <class Layout>
void tiles(const Task& task) {
  TILE_CONFIGURE(&kTileConfig);
  vectors<Layout, TileProduct>(task);
  TILE_RELEASE();
}
