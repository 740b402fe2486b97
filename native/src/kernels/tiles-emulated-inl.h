// Tiles in software, after Intel's definition of LDTILECFG, TILELOADD, TILESTORED, TILEZERO and
// TDPBF16PS, so that the kernels of tiles-inl.h are proved where no CPU has tiles. For tests.

struct EmulatedTiles {
  uint8_t rows[8];
  uint16_t row_bytes[8];
  unsigned char data[8][16][64];
  bool configured;

  template <class Config>
  void configure(const Config* config) {
    for (int t = 0; t < 8; ++t) {
      rows[t] = config->rows[t];
      row_bytes[t] = config->row_bytes[t];
      zero_tile(t);
    }
    configured = config->palette == 1;
  }
  void zero_tile(int t) { memset(data[t], 0, sizeof data[t]); }
  void release() { configured = false; }

  void load_tile(int t, const void* from, int64_t stride) {
    zero_tile(t);
    for (int r = 0; r < rows[t]; ++r)
      memcpy(data[t][r], static_cast<const char*>(from) + r * stride, row_bytes[t]);
  }
  void store_tile(int t, void* to, int64_t stride) const {
    for (int r = 0; r < rows[t]; ++r)
      memcpy(static_cast<char*>(to) + r * stride, data[t][r], row_bytes[t]);
  }

  static float number(const unsigned char* at) {
    float value;
    memcpy(&value, at, sizeof value);
    return value;
  }

  // bfloat16 and fp32 below the smallest normal number count as zero, before and after.
  static float flushed(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7F800000u) == 0) bits &= 0x80000000u;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  static float half(const unsigned char* at) {
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
    return flushed(widen(bits));
  }

  // Sums of the even and of the odd columns apart, then both, then the accumulator. Not configured:
  // an illegal instruction on a CPU, NaN here.
  void product(int c, int a, int b) {
    for (int m = 0; m < rows[c]; ++m)
      for (int n = 0; n < row_bytes[c] / 4; ++n) {
        float sums[2] = {0.0f, 0.0f};
        for (int k = 0; k < row_bytes[a] / 4; ++k)
          for (int odd = 0; odd < 2; ++odd) {
            const float left = half(&data[a][m][4 * k + 2 * odd]);
            const float right = half(&data[b][k][4 * n + 2 * odd]);
            sums[odd] = flushed(sums[odd] + flushed(left * right));
          }
        float total = flushed(flushed(number(&data[c][m][4 * n])) + flushed(sums[0] + sums[1]));
        if (!configured) total = __builtin_nanf("");
        memcpy(&data[c][m][4 * n], &total, sizeof total);
      }
  }
};

// TDPBSUD: four signed bytes of a times four unsigned ones of b, in each 32-bit sum.
inline void emulated_bytes(EmulatedTiles& tiles, int c, int a, int b) {
  for (int m = 0; m < tiles.rows[c]; ++m)
    for (int n = 0; n < tiles.row_bytes[c] / 4; ++n) {
      uint32_t total;
      memcpy(&total, &tiles.data[c][m][4 * n], sizeof total);
      for (int k = 0; k < tiles.row_bytes[a]; ++k)
        total += static_cast<uint32_t>(static_cast<int8_t>(tiles.data[a][m][k]) *
                                       tiles.data[b][k / 4][4 * n + k % 4]);
      if (!tiles.configured) total = 0x80000000u;
      memcpy(&tiles.data[c][m][4 * n], &total, sizeof total);
    }
}

// One set of tiles for each thread, as in hardware.
thread_local EmulatedTiles emulated_tiles;

#define TILE_CONFIGURE(config) emulated_tiles.configure(config)
#define TILE_RELEASE() emulated_tiles.release()
#define TILE_ZERO(t) emulated_tiles.zero_tile(t)
#define TILE_LOAD(t, from, stride) emulated_tiles.load_tile(t, from, stride)
#define TILE_STORE(t, to, stride) emulated_tiles.store_tile(t, to, stride)
#define TILE_PRODUCT(c, a, b) emulated_tiles.product(c, a, b)
#define TILE_PRODUCT_BYTES(c, a, b) emulated_bytes(emulated_tiles, c, a, b)

// Panel rows of bfloat16 in order, and a row of zeros behind; a piece of fp32 panel on the way.
template <class Layout, int V>
inline void gather_pairs(const Task& task, int64_t first, int64_t count, float* to) {
  constexpr int64_t width = V * 16, pitch = kPairPitch<V>;
  uint16_t* panel = reinterpret_cast<uint16_t*>(to);
  float* wide = to + (task.w.cols + 1) * pitch / 2;
  memset(panel, 0, (task.w.cols + 1) * pitch * sizeof(uint16_t));
  constexpr int64_t kPiece = 16;
  Task piece = task;
  for (int64_t k = 0; k < task.w.cols; k += kPiece) {
    piece.w.cols = smaller(kPiece, task.w.cols - k);
    piece.x = task.x + Layout::row_of(task, k);
    Layout::template gather<width / kLanes>(piece, first, count, 0, piece.w.cols, wide);
    round_to_bf16(wide, piece.w.cols * width);
    for (int64_t i = 0; i < piece.w.cols; ++i)
      for (int64_t t = 0; t < width; ++t) {
        uint32_t bits;
        memcpy(&bits, wide + i * width + t, sizeof bits);
        panel[(k + i) * pitch + t] = static_cast<uint16_t>(bits >> 16);
      }
  }
}

inline void interleave(const uint16_t* panel, int64_t pitch, const uint16_t* columns,
                       int64_t width, float* to) {
  for (int64_t p = 0; p < width / 2; ++p)
    for (int64_t t = 0; t < 32; ++t) {
      const uint16_t pair[2] = {panel[columns[2 * p] * pitch + t],
                                panel[columns[2 * p + 1] * pitch + t]};
      memcpy(to + t / 16 * 256 + p * 16 + t % 16, pair, sizeof pair);
    }
}

// Groups of other heights.
struct Pairs {
  template <int V>
  static void group(const Vectors& w, int64_t g, const float* panel, float* out) {
    const auto* source = reinterpret_cast<const uint16_t*>(panel);
    const int64_t begin = w.offsets[g], count = w.offsets[g + 1] - begin;
    const auto* values = static_cast<const uint16_t*>(w.values) + begin * w.height;
    memset(out, 0, w.height * V * 16 * sizeof(float));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = i / kTileColumns * kTileColumns;
      const int64_t width = smaller(kTileColumns, count - at);
      const uint16_t* row = source + w.columns[begin + i] * kPairPitch<V>;
      for (int64_t r = 0; r < w.height; ++r)
        for (int64_t t = 0; t < V * 16; ++t)
          out[r * V * 16 + t] +=
              widen(values[at * w.height + r * width + i - at]) * widen(row[t]);
    }
  }
};

constexpr int64_t kByteTile = 1024;  // bytes of 16 quads of columns of 16 tokens

// Panel rows of bytes in order, a row of zeros behind, then the copies. Rounded as floats there.
template <class Layout, int V>
inline void gather_bytes(const Task& task, int64_t first, int64_t count, float* panel) {
  constexpr int64_t width = V * 16;
  const int64_t cols = task.w.cols;
  auto* bytes = reinterpret_cast<uint8_t*>(behind(panel));
  auto& tokens = *reinterpret_cast<ByteTokens*>(panel);
  float* wide = byte_copies(panel, cols);
  Layout::template gather<width / kLanes>(task, first, count, 0, cols, wide);
  ByteRange range;
  float inverse[kMostTokens];
  measure_panel<width / kLanes>(wide, cols, &range);
  settle(range, count, &tokens, inverse);
  quantise_panel(wide, cols, width, tokens, inverse);
  for (int64_t k = 0; k <= cols; ++k)
    for (int64_t t = 0; t < kMostTokens; ++t)
      bytes[k * kMostTokens + t] =
          k < cols && t < width ? static_cast<uint8_t>(wide[k * width + t]) : uint8_t{0};
  keep_exact<Layout>(task, first, tokens, wide);
}

template <int V>
inline void interleave_quads(const uint8_t* panel, const uint16_t* columns, int64_t width,
                             uint8_t* to) {
  for (int64_t i = 0; i < width; ++i)
    for (int64_t t = 0; t < V * 16; ++t)
      to[t / 16 * kByteTile + i / 4 * 64 + t % 16 * 4 + i % 4] =
          panel[columns[i] * kMostTokens + t];
}

// Groups of other heights.
template <int V>
inline void quad_sums(const Vectors& w, int64_t g, const float* panel, int32_t* sums) {
  const auto* rows = reinterpret_cast<const uint8_t*>(behind(panel));
  memset(sums, 0, w.height * V * 16 * sizeof(int32_t));
  for (int64_t at = w.offsets[g]; at < w.offsets[g + 1]; at += kByteColumns) {
    const int64_t width = smaller(kByteColumns, w.offsets[g + 1] - at);
    for (int64_t r = 0; r < w.height; ++r)
      for (int64_t i = 0; i < width; ++i)
        for (int64_t t = 0; t < V * 16; ++t)
          sums[r * V * 16 + t] += byte_values(w, at)[r * width + i] *
                                  rows[w.columns[at + i] * kMostTokens + t];
  }
}
