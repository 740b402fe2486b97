// Groups of outputs in bfloat16 by dot products of pairs (AVX512_BF16). Included after
// vectors-inl.h.
//
// A row of the panel holds 32 columns of X in 64 bytes so that interleaving two rows within 128-bit
// lanes gives columns 0 to 15 (low halves) and 16 to 31 (high halves) in order.

// 16 columns of one row, rounded, into the low or high places of their half of the panel.
inline void store_bf16(uint16_t* row, int vector, Vec value) {
  const __m512i twice = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
  const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(value);
  const __m512i spread = _mm512_permutexvar_epi64(twice, _mm512_castsi256_si512(rounded));
  _mm512_mask_storeu_epi64(row + vector / 2 * 32, vector % 2 ? 0xAA : 0x55, spread);
}

template <class Layout, int V>
struct PairGather;

template <int V>
struct PairGather<Tokens, V> {
  static void run(const Task& task, int64_t first, int64_t count, uint16_t* panel) {
    const int64_t cols = task.w.cols;
    for (int64_t chunk = 0; chunk < cols; chunk += kChunk) {
      const int64_t stop = smaller(cols, chunk + kChunk);
      for (int v = 0; v < V; ++v) {
        const int64_t token = v * kLanes;
        for (int64_t k = chunk; k < stop; k += kLanes) {
          const int64_t width = smaller(kLanes, cols - k);
          Vec block[kLanes];
          load_block(task.x + (first + token) * task.ldx + k, task.ldx, count - token, width,
                     block);
          transpose(block);
          uint16_t* to = panel + k * kPairPitch<V>;
          if (width == kLanes) {
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) store_bf16(to + i * kPairPitch<V>, v, block[i]);
          } else {
            for (int64_t i = 0; i < width; ++i) store_bf16(to + i * kPairPitch<V>, v, block[i]);
          }
        }
      }
    }
  }
};

template <int V>
struct PairGather<Planes, V> {
  static void run(const Task& task, int64_t first, int64_t count, uint16_t* panel) {
    for (int64_t k = 0; k < task.w.cols; ++k)
      for (int v = 0; v < V; ++v) {
        const float* from = task.x + k * task.ldx + first + v * kLanes;
        store_bf16(panel + k * kPairPitch<V>, v, load_n(from, count - v * kLanes));
      }
  }
};

// The panel with a row of zeros behind it.
template <class Layout, int V>
inline void gather_pairs(const Task& task, int64_t first, int64_t count, float* to) {
  uint16_t* panel = reinterpret_cast<uint16_t*>(to);
  PairGather<Layout, V>::run(task, first, count, panel);
  for (int64_t t = 0; t < kPairPitch<V>; ++t) panel[task.w.cols * kPairPitch<V> + t] = 0;
}

// R rows times H vectors of 16 columns; `count` columns of W, even.
template <int H, int R>
inline void pair_rows(const uint16_t* values, int64_t row_step,
                                  const uint16_t* columns, int64_t count, const uint16_t* panel,
                                  int64_t pitch, float* out, int64_t stride, bool first) {
  Vec acc[R][H];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int h = 0; h < H; ++h) acc[r][h] = first ? zero() : load(out + r * stride + h * kLanes);
  for (int64_t i = 0; i < count; i += 2) {
    const __m512i one = _mm512_loadu_si512(panel + columns[i] * pitch);
    const __m512i two = _mm512_loadu_si512(panel + columns[i + 1] * pitch);
    __m512i x[2];
    x[0] = _mm512_unpacklo_epi16(one, two);
    if (H == 2) x[1] = _mm512_unpackhi_epi16(one, two);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, values + r * row_step + i, sizeof pair);
      const __m512i weights = _mm512_set1_epi32(pair);
#pragma GCC unroll 16
      for (int h = 0; h < H; ++h)
        acc[r][h] = _mm512_dpbf16_ps(acc[r][h], (__m512bh)x[h], (__m512bh)weights);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int h = 0; h < H; ++h) store(out + r * stride + h * kLanes, acc[r][h]);
}

template <int H, int R>
inline void pair_rows_down(const Vectors& w, const uint16_t* tile, int64_t width,
                           const uint16_t* columns, const uint16_t* panel, int64_t pitch,
                           float* out, int64_t stride, bool first) {
  for (int64_t r = 0; r < w.height; r += R) {
    const uint16_t* rows = tile + r * width;
    if (width == kTileColumns) {
      pair_rows<H, R>(rows, kTileColumns, columns, width, panel, pitch, out + r * stride, stride,
                      first);
    } else {
      pair_rows<H, R>(rows, width, columns, width, panel, pitch, out + r * stride, stride, first);
    }
  }
}

struct Pairs {
  static constexpr int64_t kWidth = kPairPanel, kUnit = kLanes;

  template <class Layout, int V>
  static void gather(const Task& task, int64_t first, int64_t count, float* panel) {
    gather_pairs<Layout, V>(task, first, count, panel);
  }

  template <int V>
  static void group(const Vectors& w, int64_t g, const float* panel, float* out) {
    constexpr int64_t pitch = kPairPitch<V>, stride = V * kLanes;
    const auto* source = reinterpret_cast<const uint16_t*>(panel);
    const int64_t begin = w.offsets[g], count = w.offsets[g + 1] - begin;
    const auto* values = static_cast<const uint16_t*>(w.values) + begin * w.height;
    int64_t at = 0;
    do {
      const int64_t width = smaller(kTileColumns, count - at);
      const uint16_t* tile = values + at * w.height;
      const uint16_t* columns = w.columns + begin + at;
      for (int v = 0; v < V; v += 2) {
        const uint16_t* part = source + v / 2 * 32;
        float* to = out + v * kLanes;
        const bool both = v + 1 < V, first = at == 0;
        if (w.height == 4) {
          both ? pair_rows_down<2, 4>(w, tile, width, columns, part, pitch, to, stride, first)
               : pair_rows_down<1, 4>(w, tile, width, columns, part, pitch, to, stride, first);
        } else {
          both ? pair_rows_down<2, 8>(w, tile, width, columns, part, pitch, to, stride, first)
               : pair_rows_down<1, 8>(w, tile, width, columns, part, pitch, to, stride, first);
        }
      }
      at += width;
    } while (at < count);
  }
};

// Rows of two columns, interleaved: 16 columns of X at `to`, 16 more 256 floats behind.
inline void interleave(const uint16_t* panel, int64_t pitch, const uint16_t* columns,
                       int64_t width, float* to) {
  for (int64_t i = 0; i < width; i += 2) {
    const __m512i one = _mm512_loadu_si512(panel + columns[i] * pitch);
    const __m512i two = _mm512_loadu_si512(panel + columns[i + 1] * pitch);
    _mm512_storeu_si512(to + i * 8, _mm512_unpacklo_epi16(one, two));
    _mm512_storeu_si512(to + 256 + i * 8, _mm512_unpackhi_epi16(one, two));
  }
}
