// Groups of outputs in int8 by dot products of four bytes (AVX512_VNNI). Included after
// bytes-inl.h.
//
// A row of the panel holds the bytes of 64 tokens so that interleaving four rows within 128-bit
// lanes gives tokens 0 to 15, 16 to 31, ... in order: 32-bit word 4 l + v holds tokens 16 v + 4 l
// to 16 v + 4 l + 3.

constexpr int64_t kByteTile = 1024;  // bytes of 16 quads of columns of 16 tokens
constexpr int64_t kTilesAtOnce = 4;

inline __m512i dot_quads(__m512i sum, __m512i x, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
  return sum;
}

// 16 tokens of one row to their places.
inline void store_bytes(uint8_t* row, int vector, Vec value, const float* inverse,
                        const int32_t* zeros) {
  const __m512i four = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(mul(value, load(inverse))),
                                         _mm512_loadu_si512(zeros));
  const __m128i bytes =
      _mm512_cvtusepi32_epi8(_mm512_max_epi32(whole, _mm512_setzero_si512()));
  const __m512i spread = _mm512_permutexvar_epi32(four, _mm512_castsi128_si512(bytes));
  _mm512_mask_storeu_epi32(row, static_cast<__mmask16>(0x1111 << vector), spread);
}

template <class Layout, int V>
struct ByteGather;

template <int V>
struct ByteGather<Tokens, V> {
  static void measure(const Task& task, int64_t first, int64_t count, ByteRange* range) {
    for (int64_t t = 0; t < count; ++t) {
      const float* x = task.x + (first + t) * task.ldx;
      Vec low[4], high[4], odd[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) low[i] = high[i] = odd[i] = zero();
      int64_t k = 0;
      for (; k + 4 * kLanes <= task.w.cols; k += 4 * kLanes)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) take(load(x + k + i * kLanes), &low[i], &high[i], &odd[i]);
      for (; k < task.w.cols; k += kLanes)
        take(load_n(x + k, task.w.cols - k), &low[0], &high[0], &odd[0]);
      range->low[t] = _mm512_reduce_min_ps(
          minimum(minimum(low[0], low[1]), minimum(low[2], low[3])));
      range->high[t] = _mm512_reduce_max_ps(
          maximum(maximum(high[0], high[1]), maximum(high[2], high[3])));
      range->odd[t] = _mm512_reduce_add_ps(add(add(odd[0], odd[1]), add(odd[2], odd[3])));
    }
  }

  static void take(Vec x, Vec* low, Vec* high, Vec* odd) {
    *low = minimum(x, *low);
    *high = maximum(x, *high);
    *odd = add(*odd, sub(x, x));
  }

  static void run(const Task& task, int64_t first, int64_t count, const ByteTokens& tokens,
                  const float* inverse, uint8_t* panel) {
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
          uint8_t* to = panel + k * kMostTokens;
          if (width == kLanes) {
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i)
              store_bytes(to + i * kMostTokens, v, block[i], inverse + token, tokens.zero + token);
          } else {
            for (int64_t i = 0; i < width; ++i)
              store_bytes(to + i * kMostTokens, v, block[i], inverse + token, tokens.zero + token);
          }
        }
      }
    }
  }
};

template <int V>
struct ByteGather<Planes, V> {
  static void measure(const Task& task, int64_t first, int64_t count, ByteRange* range) {
    for (int v = 0; v < V; ++v) {
      Vec low = zero(), high = zero(), odd = zero();
      for (int64_t k = 0; k < task.w.cols; ++k)
        ByteGather<Tokens, V>::take(
            load_n(task.x + k * task.ldx + first + v * kLanes, count - v * kLanes), &low, &high,
            &odd);
      store(range->low + v * kLanes, low);
      store(range->high + v * kLanes, high);
      store(range->odd + v * kLanes, odd);
    }
  }

  static void run(const Task& task, int64_t first, int64_t count, const ByteTokens& tokens,
                  const float* inverse, uint8_t* panel) {
    for (int64_t k = 0; k < task.w.cols; ++k)
      for (int v = 0; v < V; ++v) {
        const int64_t token = v * kLanes;
        const Vec x = load_n(task.x + k * task.ldx + first + token, count - token);
        store_bytes(panel + k * kMostTokens, v, x, inverse + token, tokens.zero + token);
      }
  }
};

// A panel of bytes, a row of zeros behind; then the copies.
template <class Layout, int V>
inline void gather_bytes(const Task& task, int64_t first, int64_t count, float* panel) {
  auto& tokens = *reinterpret_cast<ByteTokens*>(panel);
  auto* rows = reinterpret_cast<uint8_t*>(behind(panel));
  ByteRange range;
  float inverse[kMostTokens];
  ByteGather<Layout, V>::measure(task, first, count, &range);
  settle(range, count, &tokens, inverse);
  ByteGather<Layout, V>::run(task, first, count, tokens, inverse, rows);
  for (int64_t t = 0; t < kMostTokens; ++t) rows[task.w.cols * kMostTokens + t] = 0;
  keep_exact<Layout>(task, first, tokens, byte_copies(panel, task.w.cols));
}

// Quads of columns, interleaved: V tiles of 16 tokens.
template <int V>
inline void interleave_quads(const uint8_t* panel, const uint16_t* columns, int64_t width,
                             uint8_t* to) {
  for (int64_t i = 0; i < width; i += 4, to += 64) {
    const __m512i a = _mm512_loadu_si512(panel + columns[i] * kMostTokens);
    const __m512i b = _mm512_loadu_si512(panel + columns[i + 1] * kMostTokens);
    const __m512i c = _mm512_loadu_si512(panel + columns[i + 2] * kMostTokens);
    const __m512i d = _mm512_loadu_si512(panel + columns[i + 3] * kMostTokens);
    const __m512i ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi16(ab, cd));
    if (V > 1) _mm512_storeu_si512(to + kByteTile, _mm512_unpackhi_epi16(ab, cd));
    const __m512i top = _mm512_unpackhi_epi8(a, b), bottom = _mm512_unpackhi_epi8(c, d);
    if (V > 2) _mm512_storeu_si512(to + 2 * kByteTile, _mm512_unpacklo_epi16(top, bottom));
    if (V > 3) _mm512_storeu_si512(to + 3 * kByteTile, _mm512_unpackhi_epi16(top, bottom));
  }
}

// sums [R rows][V vectors] (+)= R rows of W, `count` columns in tiles, times interleaved quads.
template <int V, int R>
inline void quad_rows(const int8_t* values, int64_t height, int64_t row, int64_t count,
                      const uint8_t* x, int32_t* sums, bool first) {
  __m512i acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      acc[r][v] = first ? _mm512_setzero_si512() : _mm512_loadu_si512(sums + (r * V + v) * 16);
  for (int64_t at = 0; at < count; at += kByteColumns, x += V * kByteTile) {
    const int64_t width = smaller(kByteColumns, count - at);
    const int8_t* weights = values + at * height + row * width;
    for (int64_t i = 0; i < width; i += 4) {
      __m512i quads[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) quads[v] = _mm512_loadu_si512(x + v * kByteTile + i * 16);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int32_t four;
        __builtin_memcpy(&four, weights + r * width + i, sizeof four);
        const __m512i w = _mm512_set1_epi32(four);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) acc[r][v] = dot_quads(acc[r][v], quads[v], w);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) _mm512_storeu_si512(sums + (r * V + v) * 16, acc[r][v]);
}

// sums [height][V * 16] of a group.
template <int V>
inline void quad_sums(const Vectors& w, int64_t g, const float* panel, int32_t* sums) {
  alignas(64) uint8_t x[kTilesAtOnce * V * kByteTile];
  const auto* rows = reinterpret_cast<const uint8_t*>(behind(panel));
  const int64_t begin = w.offsets[g], end = w.offsets[g + 1];
  int64_t from = begin;
  do {
    const int64_t count = smaller(kTilesAtOnce * kByteColumns, end - from);
    for (int64_t at = 0; at < count; at += kByteColumns)
      interleave_quads<V>(rows, w.columns + from + at, smaller(kByteColumns, count - at),
                          x + at / kByteColumns * V * kByteTile);
    const int8_t* values = byte_values(w, from);
    constexpr int R = V > 2 ? 4 : 8;
    int64_t r = 0;
    for (; r + R <= w.height; r += R)
      quad_rows<V, R>(values, w.height, r, count, x, sums + r * V * 16, from == begin);
    for (; r < w.height; r += 4)
      quad_rows<V, 4>(values, w.height, r, count, x, sums + r * V * 16, from == begin);
    from += count;
  } while (from < end);
}

struct QuadBytes {
  static constexpr int64_t kWidth = kBytePanel, kUnit = kLanes;

  template <class Layout, int V>
  static void gather(const Task& task, int64_t first, int64_t count, float* panel) {
    gather_bytes<Layout, V>(task, first, count, panel);
  }

  template <int V>
  static void group(const Vectors& w, int64_t g, const float* panel, float* out) {
    alignas(64) int32_t sums[kMostHeight * V * kLanes];
    quad_sums<V>(w, g, panel, sums);
    finish_bytes<V * kLanes>(w, g, panel, byte_copies(panel, w.cols), sums, out);
  }
};
