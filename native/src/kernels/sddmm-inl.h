// Sampled dense-dense product, for any instruction set: the values of G^T X at the non-zeros of a
// pattern, which is the gradient of a sparse weight. Included after spmm-inl.h.

// Tokens per panel in vectors: long panels pay for the sum across lanes of each non-zero.
constexpr int kLongPanel = 8;
constexpr int kShortPanel = 4;

// Columns of X in a panel: 512 KiB of a long panel stay within the second-level cache.
constexpr int64_t kPanelColumns = 1024;

// Where the column of X that belongs to a column of the pattern begins.
struct InPanel {
  const float* panel;
  int64_t origin, stride;
  const float* operator()(uint16_t column) const { return panel + (column - origin) * stride; }
};

#ifndef PRUNUS_SUM_LANES
// The sum of each vector's lanes.
inline Vec sum_lanes(Vec (&block)[kLanes]) {
  transpose(block);
#pragma GCC unroll 16
  for (int step = kLanes / 2; step > 0; step /= 2)
#pragma GCC unroll 16
    for (int j = 0; j < step; ++j) block[j] = add(block[j], block[j + step]);
  return block[0];
}
#endif

// out[i] (+)= <g, from(columns[i])>, i in [begin, end): kLanes products side by side, whose
// lanes are then added up together. In the tail the last column fills up groups of four.
template <int V, class From>
inline void dots(const float* g, const From& from, const uint16_t* columns, uint32_t begin,
                 uint32_t end, bool add_to, float* out) {
  constexpr int kGroup = 4;
  Vec left[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) left[v] = load(g + v * kLanes);
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t count = smaller(kLanes, end - i);
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int group = 0; group < kLanes; group += kGroup) {
      if (group < count) {
#pragma GCC unroll 16
        for (int j = group; j < group + kGroup; ++j) {
          const float* row = from(columns[smaller(i + j, end - 1)]);
          Vec sum = fma(left[0], load(row), zero());
#pragma GCC unroll 16
          for (int v = 1; v < V; ++v) sum = fma(left[v], load(row + v * kLanes), sum);
          block[j] = sum;
        }
      } else {
#pragma GCC unroll 16
        for (int j = group; j < group + kGroup; ++j) block[j] = zero();
      }
    }
    const Vec sums = sum_lanes(block);
    store_n(out + i, add_to ? add(load_n(out + i, count), sums) : sums, count);
  }
}

// The first place in [begin, end) whose column is at least `column`.
inline uint32_t first_from(const uint16_t* columns, uint32_t begin, uint32_t end, int64_t column) {
  while (begin < end) {
    const uint32_t middle = begin + (end - begin) / 2;
    if (columns[middle] < column) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Rows [begin_row, end_row) of the pattern, over all tokens; a row's values do not depend on the
// range that it is in. Columns pass in chunks: cursors remember where in its row each chunk begins.
template <class Layout, int V>
inline void sddmm_rows(const Task& task) {
  constexpr int64_t tokens = V * kLanes;
  const Weight& w = task.w;
  float* panel = task.workspace;
  float* left = panel + (kPanelColumns + kRowGroup) * tokens;
  const int64_t rows = task.end_row - task.begin_row;
  uint32_t* cursors = reinterpret_cast<uint32_t*>(left + (rows + kRowGroup) * tokens);
  for (int64_t first = 0; first < task.n; first += tokens) {
    const int64_t count = smaller(tokens, task.n - first);
    const bool add_to = first > 0 || (task.flags & kAccumulate);
    Task part = task;
    part.w.cols = rows;
    part.x = task.g + task.begin_row * Layout::row_step(task.ldg);
    part.ldx = task.ldg;
    Layout::template gather<V>(part, first, count, left);
    part.ldx = task.ldx;
    for (uint32_t b = 0; b < w.blocks; ++b) {
      const uint32_t* offsets = w.offsets + b * w.rows + task.begin_row;
      const int64_t start = static_cast<int64_t>(b) * w.block;
      const int64_t width = smaller(w.block, w.cols - start);
      for (int64_t r = 0; r < rows; ++r) cursors[r] = offsets[r];
      for (int64_t chunk = 0; chunk < width; chunk += kPanelColumns) {
        const bool last = chunk + kPanelColumns >= width;
        part.w.cols = smaller(kPanelColumns, width - chunk);
        part.x = task.x + (start + chunk) * Layout::row_step(task.ldx);
        Layout::template gather<V>(part, first, count, panel);
        const InPanel from{panel, chunk, tokens};
        for (int64_t r = 0; r < rows; ++r) {
          const uint32_t begin = cursors[r];
          uint32_t end = offsets[r + 1];
          if (!last) end = first_from(w.columns, begin, end, chunk + kPanelColumns);
          cursors[r] = end;
          dots<V>(left + r * tokens, from, w.columns, begin, end, add_to, task.y);
        }
      }
    }
  }
}

struct TokenRows : Tokens {
  static int64_t row_step(int64_t) { return 1; }
};

struct PlaneRows : Planes {
  static int64_t row_step(int64_t stride) { return stride; }
};

template <class Layout>
inline void sddmm(const Task& task) {
  if (task.n > kShortPanel * kLanes) {
    sddmm_rows<Layout, kLongPanel>(task);
  } else {
    sddmm_rows<Layout, kShortPanel>(task);
  }
}

void sddmm_tokens_f32(const Task& task) { sddmm<TokenRows>(task); }
void sddmm_planes_f32(const Task& task) { sddmm<PlaneRows>(task); }
