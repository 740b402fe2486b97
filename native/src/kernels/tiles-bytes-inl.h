// Groups of 16 or 32 outputs in int8 by products of tiles (Intel AMX): C [16 rows][16 tokens] +=
// A [16 rows][64 columns of W] times B [16 quads of columns of W][16 tokens], signed by unsigned
// bytes. Included after tiles-inl.h and bytes-inl.h, where gather_bytes, interleave_quads and
// quad_sums (for other heights) are defined.

// The rows of a tile narrower than 64 columns, zeros behind.
inline const int8_t* whole_bytes(const int8_t* tile, int64_t width, int8_t* scratch) {
  if (width == kByteColumns) return tile;
  for (int64_t r = 0; r < 16; ++r)
    for (int64_t i = 0; i < kByteColumns; ++i)
      scratch[r * kByteColumns + i] = i < width ? tile[r * width + i] : int8_t{0};
  return scratch;
}

// R tiles of W (1 or 2) times H tiles of X (up to 4 / R), those of vector `at` and behind.
template <int V, int R, int H>
void tile_bytes(const Vectors& w, int64_t g, const uint8_t* rows, int at, int32_t* sums) {
  alignas(64) uint8_t x[V * kByteTile];
  alignas(64) int8_t scratch[2 * 16 * kByteColumns];
  for (int64_t i = 0; i < V * kByteTile; ++i) x[i] = 0;
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  const int64_t end = w.offsets[g + 1];
  for (int64_t from = w.offsets[g]; from < end; from += kByteColumns) {
    const int64_t width = smaller(kByteColumns, end - from);
    const int8_t* tile = byte_values(w, from);
    interleave_quads<V>(rows, w.columns + from, width, x);
    const uint8_t* tokens = x + at * kByteTile;
    TILE_LOAD(4, whole_bytes(tile, width, scratch), 64);
    if (R > 1) TILE_LOAD(5, whole_bytes(tile + 16 * width, width, scratch + 1024), 64);
    TILE_LOAD(6, tokens, 64);
    TILE_PRODUCT_BYTES(0, 4, 6);
    if (R > 1) TILE_PRODUCT_BYTES(1, 5, 6);
    if (H > 1) {
      TILE_LOAD(7, tokens + kByteTile, 64);
      TILE_PRODUCT_BYTES(2, 4, 7);
      if (R > 1) TILE_PRODUCT_BYTES(3, 5, 7);
    }
    if (H > 2) {
      TILE_LOAD(6, tokens + 2 * kByteTile, 64);
      TILE_PRODUCT_BYTES(1, 4, 6);
    }
    if (H > 3) {
      TILE_LOAD(7, tokens + 3 * kByteTile, 64);
      TILE_PRODUCT_BYTES(3, 4, 7);
    }
  }
  int32_t* to = sums + at * 16;
  TILE_STORE(0, to, V * 64);
  if (R > 1) TILE_STORE(1, to + 16 * V * 16, V * 64);
  if (H > 1) TILE_STORE(2, to + 16, V * 64);
  if (H > 1 && R > 1) TILE_STORE(3, to + 16 * V * 16 + 16, V * 64);
  if (H > 2) TILE_STORE(1, to + 32, V * 64);
  if (H > 3) TILE_STORE(3, to + 48, V * 64);
}

struct TileBytes {
  static constexpr int64_t kWidth = kBytePanel, kUnit = 16;

  template <class Layout, int V>
  static void gather(const Task& task, int64_t first, int64_t count, float* panel) {
    gather_bytes<Layout, V>(task, first, count, panel);
  }

  template <int V>
  static void group(const Vectors& w, int64_t g, const float* panel, float* out) {
    const auto* rows = reinterpret_cast<const uint8_t*>(behind(panel));
    alignas(64) int32_t sums[kMostHeight * V * 16];
    if (w.height == 16) {
      tile_bytes<V, 1, V>(w, g, rows, 0, sums);
    } else if (w.height == 32) {
      tile_bytes<V, 2, (V > 1 ? 2 : 1)>(w, g, rows, 0, sums);
      if constexpr (V > 2) tile_bytes<V, 2, (V > 3 ? 2 : 1)>(w, g, rows, 2, sums);
    } else {
      quad_sums<V>(w, g, panel, sums);
    }
    finish_bytes<V * 16>(w, g, panel, byte_copies(panel, w.cols), sums, out);
  }
};

template <class Layout>
void tiles_of_bytes(const Task& task) {
  TILE_CONFIGURE(&kTileConfig);
  vectors<Layout, TileBytes>(task);
  TILE_RELEASE();
}
