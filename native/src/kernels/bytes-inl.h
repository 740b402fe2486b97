// Groups of outputs in int8. Each column of X (a token) becomes bytes u with a scale s and a zero
// z, x ~ s (u - z), and W has a scale per row: y = (sum w u - z sum w) s scale, sums in int32.
// Included after vectors-inl.h. Here: what every instruction set shares, and the product where no
// instruction multiplies bytes: in float32, whose sums of whole numbers are exact below 2^24.

constexpr float kByteMost = 255.0f;
constexpr float kLeastRange = 1e-30f;  // of a token that bytes can stand for
constexpr float kRounding = 12582912.0f;  // added: the nearest whole number in the low bits
constexpr int32_t kRoundingBits = 0x4B400000;
constexpr int64_t kMostTokens = 64;
constexpr int64_t kSpan = 512;  // columns: 512 times 255 times 127 is below 2^24

#if defined(PRUNUS_TILES) || (defined(__AVX512VBMI2__) && defined(__AVX512VNNI__))
constexpr int64_t kBytePanel = kMostTokens;
#else
constexpr int64_t kBytePanel = kVectorPanel;
#endif

// In front of a panel. Tokens whose bit is set in `exact` are not finite, or too large or small:
// they are multiplied one by one, from a copy behind the panel.
struct ByteTokens {
  float scale[kMostTokens];
  int32_t zero[kMostTokens];
  uint64_t exact, unused[7];
};

// The least and largest of each token, zero included; `odd` is not zero where one is not finite.
struct ByteRange {
  float low[kMostTokens], high[kMostTokens], odd[kMostTokens];
};

inline float* behind(float* panel) { return panel + sizeof(ByteTokens) / sizeof(float); }
inline const float* behind(const float* panel) {
  return panel + sizeof(ByteTokens) / sizeof(float);
}

// The copies behind a panel of bytes.
inline float* byte_copies(float* panel, int64_t cols) {
  return behind(panel) + (cols + 1) * (kMostTokens / 4);
}
inline const float* byte_copies(const float* panel, int64_t cols) {
  return behind(panel) + (cols + 1) * (kMostTokens / 4);
}

inline int32_t nearest(float value) {
  const float shifted = value + kRounding;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  return bits - kRoundingBits;
}

// Fills what is known of each token; inverse[t]: what it is multiplied by.
inline void settle(const ByteRange& range, int64_t count, ByteTokens* tokens, float* inverse) {
  tokens->exact = 0;
  for (int64_t t = 0; t < kMostTokens; ++t) {
    const float low = t < count ? range.low[t] : 0.0f;
    const float width = t < count ? range.high[t] - low : 0.0f;
    const bool some = width >= kLeastRange && width <= 3.4e38f;
    inverse[t] = some ? kByteMost / width : 0.0f;
    if (t < count && (range.odd[t] != 0.0f || !(some || width == 0.0f))) {
      tokens->exact |= uint64_t{1} << t;
      inverse[t] = 0.0f;
    }
    const bool empty = inverse[t] == 0.0f;
    const float from = -low * inverse[t];
    tokens->scale[t] = empty ? 0.0f : width / kByteMost;
    tokens->zero[t] = empty ? 0 : nearest(from);
  }
}

// Elements between the tokens of X.
template <class Layout>
inline int64_t token_step(const Task& task);
template <>
inline int64_t token_step<Tokens>(const Task& task) {
  return task.ldx;
}
template <>
inline int64_t token_step<Planes>(const Task&) {
  return 1;
}

// Copies of the tokens that are multiplied one by one.
template <class Layout>
inline void keep_exact(const Task& task, int64_t first, const ByteTokens& tokens, float* to) {
  for (uint64_t left = tokens.exact; left != 0; left &= left - 1) {
    const int64_t t = __builtin_ctzll(left);
    const float* from = task.x + (first + t) * token_step<Layout>(task);
    for (int64_t k = 0; k < task.w.cols; ++k)
      to[t * task.w.cols + k] = from[Layout::row_of(task, k)];
  }
}

inline const int8_t* byte_values(const Vectors& w, int64_t column) {
  return static_cast<const int8_t*>(w.values) + column * w.height;
}

// out[r][t] of the tokens in `exact`: every stored weight that is not zero, in order.
inline void multiply_exact(const Vectors& w, int64_t g, const ByteTokens& tokens,
                           const float* copies, float* out, int64_t stride) {
  const int64_t begin = w.offsets[g], end = w.offsets[g + 1];
  for (uint64_t left = tokens.exact; left != 0; left &= left - 1) {
    const int64_t t = __builtin_ctzll(left);
    for (int64_t r = 0; r < w.height; ++r) {
      float total = 0.0f;
      for (int64_t at = begin; at < end; at += kByteColumns) {
        const int64_t width = smaller(kByteColumns, end - at);
        const int8_t* row = byte_values(w, at) + r * width;
        for (int64_t i = 0; i < width; ++i)
          if (row[i] != 0) total += widen(row[i]) * copies[t * w.cols + w.columns[at + i]];
      }
      out[r * stride + t] = total * w.scales[g * w.height + r];
    }
  }
}

// out = (sums - z sum w) s scale for the rows of a group; both [height][stride].
template <int64_t kStride>
inline void finish_bytes(const Vectors& w, int64_t g, const float* panel, const float* copies,
                         const int32_t* sums, float* out) {
  const auto& tokens = *reinterpret_cast<const ByteTokens*>(panel);
  for (int64_t r = 0; r < w.height; ++r) {
    const auto weights = static_cast<uint32_t>(w.sums[g * w.height + r]);
    const float scale = w.scales[g * w.height + r];
    for (int64_t t = 0; t < kStride; ++t) {
      const uint32_t shift = static_cast<uint32_t>(tokens.zero[t]) * weights;
      const auto sum = static_cast<int32_t>(static_cast<uint32_t>(sums[r * kStride + t]) - shift);
      out[r * kStride + t] = static_cast<float>(sum) * (tokens.scale[t] * scale);
    }
  }
  if (tokens.exact != 0) multiply_exact(w, g, tokens, copies, out, kStride);
}

// The range of each token of a panel of floats.
template <int V>
inline void measure_panel(const float* panel, int64_t cols, ByteRange* range) {
  for (int v = 0; v < V; ++v) {
    Vec low = zero(), high = zero(), odd = zero();
    for (int64_t k = 0; k < cols; ++k) {
      const Vec x = load(panel + (k * V + v) * kLanes);
      low = minimum(x, low);
      high = maximum(x, high);
      odd = add(odd, sub(x, x));
    }
    store(range->low + v * kLanes, low);
    store(range->high + v * kLanes, high);
    store(range->odd + v * kLanes, odd);
  }
}

// Whole numbers 0 to 255 in the place of floats.
inline void quantise_panel(float* panel, int64_t cols, int64_t stride, const ByteTokens& tokens,
                           const float* inverse) {
  for (int64_t k = 0; k < cols; ++k, panel += stride)
    for (int64_t t = 0; t < stride; ++t) {
      const float scaled = panel[t] * inverse[t];
      const int32_t u = nearest(scaled) + tokens.zero[t];
      panel[t] = static_cast<float>(u < 0 ? 0 : u > 255 ? 255 : u);
    }
}

// A panel of floats that are bytes, and a row of zeros behind; then the copies.
template <class Layout, int V>
inline void gather_rounded(const Task& task, int64_t first, int64_t count, float* panel) {
  constexpr int64_t stride = V * kLanes;
  const int64_t cols = task.w.cols;
  auto& tokens = *reinterpret_cast<ByteTokens*>(panel);
  float* rows = behind(panel);
  Layout::template gather<V>(task, first, count, 0, cols, rows);
  ByteRange range;
  float inverse[kMostTokens];
  measure_panel<V>(rows, cols, &range);
  settle(range, count, &tokens, inverse);
  quantise_panel(rows, cols, stride, tokens, inverse);
  for (int64_t t = 0; t < stride; ++t) rows[cols * stride + t] = 0.0f;
  keep_exact<Layout>(task, first, tokens, rows + (cols + 1) * stride);
}

struct RoundedBytes {
  static constexpr int64_t kWidth = kVectorPanel, kUnit = kLanes;

  template <class Layout, int V>
  static void gather(const Task& task, int64_t first, int64_t count, float* panel) {
    gather_rounded<Layout, V>(task, first, count, panel);
  }

  // out [height][stride] (+)= a tile of W times the panel.
  template <int V>
  static void multiply_tile(const Vectors& w, int64_t at, int64_t width, const float* rows,
                            float* out, bool first) {
    float wide[kMostHeight * kByteColumns];
    const int8_t* tile = byte_values(w, at);
    for (int64_t i = 0; i < w.height * width; ++i) wide[i] = widen(tile[i]);
    int64_t r = 0;
    for (; r + kVectorRows <= w.height; r += kVectorRows)
      vector_rows<V, kVectorRows>(wide + r * width, int64_t{1}, width, w.columns + at, width, rows,
                                  out + r * V * kLanes, first);
    for (; r < w.height; r += 4)
      vector_rows<V, 4>(wide + r * width, int64_t{1}, width, w.columns + at, width, rows,
                        out + r * V * kLanes, first);
  }

  template <int V>
  static void group(const Vectors& w, int64_t g, const float* panel, float* out) {
    constexpr int64_t stride = V * kLanes;
    const float* rows = behind(panel);
    const int64_t begin = w.offsets[g], end = w.offsets[g + 1], size = w.height * stride;
    int32_t sums[kMostHeight * stride];
    for (int64_t i = 0; i < size; ++i) sums[i] = 0;
    for (int64_t from = begin; from < end; from += kSpan) {
      const int64_t stop = smaller(from + kSpan, end);
      for (int64_t at = from; at < stop; at += kByteColumns)
        multiply_tile<V>(w, at, smaller(kByteColumns, stop - at), rows, out, at == from);
      for (int64_t i = 0; i < size; ++i) sums[i] += static_cast<int32_t>(out[i]);
    }
    finish_bytes<stride>(w, g, panel, rows + (w.cols + 1) * stride, sums, out);
  }
};
