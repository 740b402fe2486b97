// Groups of outputs that share their columns, times a dense matrix: a load of X serves `height`
// rows. Included after spmm-inl.h, whose panels it uses, with
//   kVectorRows: rows whose sums are held in registers at a time, for kVectorPanel columns of X.

constexpr int kPanelVectors = 3;
constexpr int64_t kVectorPanel = kPanelVectors * kLanes;

// Columns of X in a panel of bfloat16, and the values of a row of it that are V vectors of 16.
#if defined(PRUNUS_PAIRS) || defined(PRUNUS_TILES)
constexpr int64_t kPairPanel = 64;
template <int V>
constexpr int64_t kPairPitch = (V + 1) / 2 * 32;
#else
constexpr int64_t kPairPanel = kVectorPanel;
#endif

// Columns taken before the next rows of the group: their part of the panel stays in the cache.
constexpr int64_t kColumnChunk = 128;

#include "kernels/widen-inl.h"

// To the nearest bfloat16, ties to even; NaN stays NaN.
inline void round_to_bf16(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, values + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
    bits = (bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits | 0x400000u) & 0xFFFF0000u : rounded;
    __builtin_memcpy(values + i, &bits, sizeof bits);
  }
}

// out[r] (+)= sum over i of values[i * column_step + r * row_step] times panel row columns[i].
template <int V, int R, class Value>
inline void vector_rows(const Value* values, int64_t column_step, int64_t row_step,
                        const uint16_t* columns, int64_t count, const float* panel, float* out,
                        bool first) {
  constexpr int64_t stride = V * kLanes;
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = first ? zero() : load(out + r * stride + v * kLanes);
  for (int64_t i = 0; i < count; ++i) {
    const float* row = panel + columns[i] * stride;
    const Value* weights = values + i * column_step;
    Vec x[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) x[v] = load(row + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec weight = broadcast(widen(weights[r * row_step]));
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = fma(weight, x[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(out + r * stride + v * kLanes, acc[r][v]);
}

struct FloatVectors {
  using Value = float;
  static constexpr int64_t kChunk = kColumnChunk;
  static int64_t column_step(int64_t height, int64_t) { return height; }
  static constexpr int64_t row_step(int64_t) { return 1; }
  static void prepare(float*, int64_t) {}
};

struct HalfVectors {
  using Value = uint16_t;
  static constexpr int64_t kChunk = kTileColumns;
  static constexpr int64_t column_step(int64_t, int64_t) { return 1; }
  static int64_t row_step(int64_t width) { return width; }
  static void prepare(float* panel, int64_t count) { round_to_bf16(panel, count); }
};

// out [height][V * kLanes] = the group's rows times the panel.
template <class Kind, int V>
inline void vector_group(const Vectors& w, int64_t group, const float* panel, float* out) {
  const int64_t begin = w.offsets[group], count = w.offsets[group + 1] - begin;
  const auto* values = static_cast<const typename Kind::Value*>(w.values) + begin * w.height;
  const uint16_t* columns = w.columns + begin;
  int64_t at = 0;
  do {
    const int64_t width = smaller(Kind::kChunk, count - at);
    const auto* tile = values + at * w.height;
    const int64_t across = Kind::column_step(w.height, width), down = Kind::row_step(width);
    int64_t r = 0;
    for (; r + kVectorRows <= w.height; r += kVectorRows)
      vector_rows<V, kVectorRows>(tile + r * down, across, down, columns + at, width, panel,
                                  out + r * V * kLanes, at == 0);
    for (; r < w.height; r += 4)
      vector_rows<V, 4>(tile + r * down, across, down, columns + at, width, panel,
                        out + r * V * kLanes, at == 0);
    at += width;
  } while (at < count);
}

// What a kernel of groups does with one panel of X, for any layout of X and Y.
// Product: kWidth columns of a panel in vectors of kUnit, gather<Layout, V>(task, first, count,
// panel) and group<V>(w, g, panel, out).
template <class Layout, int V, class Product>
inline void vector_panel(const Task& task, int64_t first, int64_t count, int64_t begin,
                         int64_t end) {
  constexpr int64_t stride = V * Product::kUnit;
  const Vectors& w = *task.vectors;
  float* buffer = task.workspace;
  float* group_rows = buffer + vector_buffer_rows(w) * stride;
  float* panel = group_rows + kMostHeight * stride;
  Product::template gather<Layout, V>(task, first, count, panel);
  const int64_t tile_groups = 64 / w.height;
  for (int64_t group = begin; group < end; group += tile_groups) {
    const int64_t stop = smaller(group + tile_groups, end);
    for (int64_t g = group; g < stop; ++g) {
      float* out = w.order ? group_rows : buffer + (g - group) * w.height * stride;
      Product::template group<V>(w, g, panel, out);
      if (w.order == nullptr) continue;
      const int64_t top = g * w.height;
      for (int64_t r = top; r < smaller(top + w.height, w.rows); ++r)
        for (int64_t t = 0; t < stride; t += kLanes)
          store(buffer + w.order[r] * stride + t, load(out + (r - top) * stride + t));
    }
    if (w.order) continue;
    const int64_t row = group * w.height;
    Layout::template scatter<stride / kLanes>(task, first, count, row, smaller(stop * w.height, w.rows), buffer);
  }
  if (w.order) Layout::template scatter<stride / kLanes>(task, first, count, 0, w.rows, buffer);
}

template <class Kind>
struct Broadcasts {
  static constexpr int64_t kWidth = kVectorPanel, kUnit = kLanes;

  template <class Layout, int V>
  static void gather(const Task& task, int64_t first, int64_t count, float* panel) {
    const int64_t cols = task.w.cols;
    Layout::template gather<V>(task, first, count, panel);
    Kind::prepare(panel, cols * V * kLanes);
    for (int64_t t = 0; t < V * kLanes; ++t) panel[cols * V * kLanes + t] = 0.0f;
  }

  template <int V>
  static void group(const Vectors& w, int64_t g, const float* panel, float* out) {
    vector_group<Kind, V>(w, g, panel, out);
  }
};

// begin_row and end_row of the task count groups.
template <class Layout, class Product>
inline void vectors(const Task& task) {
  constexpr int64_t width = Product::kWidth, unit = Product::kUnit;
  for (int64_t p = task.begin_panel; p <= task.end_panel; ++p) {
    const int64_t begin = p == task.begin_panel ? task.begin_row : 0;
    const int64_t end = p == task.end_panel ? task.end_row : task.vectors->groups;
    if (begin >= end) continue;
    const int64_t first = p * width, count = smaller(width, task.n - first);
    switch ((count + unit - 1) / unit) {
      case 1: vector_panel<Layout, 1, Product>(task, first, count, begin, end); break;
      case 2: vector_panel<Layout, 2, Product>(task, first, count, begin, end); break;
      case 3: vector_panel<Layout, 3, Product>(task, first, count, begin, end); break;
      default:
        if constexpr (width / unit > 3)
          vector_panel<Layout, 4, Product>(task, first, count, begin, end);
    }
  }
}
