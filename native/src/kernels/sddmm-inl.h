// Sampled dense-dense product, for any instruction set: the values of G^T X at the non-zeros of a
// pattern, which is the gradient of a sparse weight. Included after spmm-inl.h.

// Tokens per panel in vectors: long panels pay for the sum across lanes of each non-zero.
constexpr int kLongPanel = 8;
constexpr int kShortPanel = 4;

// Columns up to which a long panel stays within the second-level cache.
constexpr int64_t kLongPanelColumns = 1536;

// out[i] (+)= <g, panel row columns[i]>, i in [begin, end): kLanes products side by side, then one
// register transpose adds up their lanes. In the tail the last column fills up groups of four.
template <int V>
inline void dots(const float* g, const float* panel, const uint16_t* columns, uint32_t begin,
                 uint32_t end, bool add_to, float* out) {
  constexpr int64_t stride = V * kLanes;
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
          const float* row = panel + columns[smaller(i + j, end - 1)] * stride;
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
    transpose(block);
#pragma GCC unroll 16
    for (int step = kLanes / 2; step > 0; step /= 2)
#pragma GCC unroll 16
      for (int j = 0; j < step; ++j) block[j] = add(block[j], block[j + step]);
    if (add_to) block[0] = add(load_n(out + i, count), block[0]);
    store_n(out + i, block[0], count);
  }
}

// Rows [begin_row, end_row) of the pattern, over all tokens; a row's values do not depend on the
// range that it is in.
template <class Layout, int V>
inline void sddmm_rows(const Task& task) {
  constexpr int64_t tokens = V * kLanes;
  const Weight& w = task.w;
  float* panel = task.workspace;
  float* left = panel + (w.cols + kRowGroup) / kRowGroup * kRowGroup * tokens;
  for (int64_t first = 0; first < task.n; first += tokens) {
    const int64_t count = smaller(tokens, task.n - first);
    const bool add_to = first > 0 || (task.flags & kAccumulate);
    Layout::template gather<V>(task, first, count, panel);
    for (int64_t row = task.begin_row; row < task.end_row; row += kTileRows) {
      const int64_t stop = smaller(row + kTileRows, task.end_row);
      Task part = task;
      part.w.cols = stop - row;
      part.x = task.g + row * Layout::row_step(task.ldg);
      part.ldx = task.ldg;
      Layout::template gather<V>(part, first, count, left);
      for (uint32_t b = 0; b < w.blocks; ++b) {
        const uint32_t* offsets = w.offsets + b * w.rows;
        const float* source = panel + static_cast<int64_t>(b) * w.block * tokens;
        for (int64_t r = row; r < stop; ++r)
          dots<V>(left + (r - row) * tokens, source, w.columns, offsets[r], offsets[r + 1], add_to,
                  task.y);
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
  if (task.w.cols <= kLongPanelColumns && task.n > kShortPanel * kLanes) {
    sddmm_rows<Layout, kLongPanel>(task);
  } else {
    sddmm_rows<Layout, kShortPanel>(task);
  }
}

void sddmm_tokens_f32(const Task& task) { sddmm<TokenRows>(task); }
void sddmm_planes_f32(const Task& task) { sddmm<PlaneRows>(task); }
