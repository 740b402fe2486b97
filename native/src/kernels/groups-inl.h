// Direct convolution one group of channels at a time, for any instruction set: depthwise ones, and
// weights without zeros. Included after conv-inl.h. A unit of work is a band of the positions of
// one image, for one group; conv.h describes positions.

constexpr int kLineVectors = 2 * kMaxVectors;

// Rows of a full weight whose outputs share each load of the input; as registers allow.
constexpr int kSharing = kLanes == 8 ? 2 : 4;

// out[r][...] = row r of a full weight times V vectors of positions.
template <int R, int V>
inline void full_rows(const float* values, int64_t cols, const int32_t* offsets, const float* from,
                      float* out, int64_t stride) {
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = zero();
  for (int64_t k = 0; k < cols; ++k) {
    const float* at = from + offsets[k];
    Vec x[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) x[v] = load(at + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec weight = broadcast(values[r * cols + k]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = fma(weight, x[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(out + r * stride + v * kLanes, acc[r][v]);
}

// The same for one row of a sparse weight; the order of its sum does not depend on V.
template <int V>
inline void sparse_row(const Weight& w, int64_t row, const int32_t* offsets, const float* from,
                       float* out) {
  Vec acc[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) acc[v] = zero();
  for (uint32_t b = 0; b < w.blocks; ++b) {
    const uint32_t* bounds = w.offsets + b * w.rows + row;
    const int32_t* shifts = offsets + static_cast<int64_t>(b) * w.block;
    for (uint32_t i = bounds[0]; i < bounds[1]; ++i) {
      const Vec weight = broadcast(w.values[i]);
      const float* at = from + shifts[w.columns[i]];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[v] = fma(weight, load(at + v * kLanes), acc[v]);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) store(out + v * kLanes, acc[v]);
}

// Row `row` times `count` positions, a multiple of kPanel.
inline void sparse_line(const Weight& w, int64_t row, const int32_t* offsets, const float* panel,
                        int64_t count, float* out) {
  int64_t at = 0;
  for (; at + kLineVectors * kLanes <= count; at += kLineVectors * kLanes)
    sparse_row<kLineVectors>(w, row, offsets, panel + at, out + at);
  if (at < count) sparse_row<kMaxVectors>(w, row, offsets, panel + at, out + at);
}

template <int R>
inline void full_lines(const Weight& w, int64_t row, const int32_t* offsets, const float* panel,
                       int64_t count, float* out) {
  for (int64_t at = 0; at < count; at += kPanel)
    full_rows<R, kMaxVectors>(w.values + row * w.cols, w.cols, offsets, panel + at, out + at,
                              count);
}

// Lines of outputs, `count` floats apart, to the pixels of an image's planes `row` and following.
inline void write_lines(const Task& task, const Run* runs, const Run* end, int64_t image,
                        int64_t row, int64_t lines, const float* from, int64_t count) {
  for (int64_t r = row; r < row + lines; ++r, from += count) {
    const Vec bias = task.bias ? broadcast(task.bias[r]) : zero();
    const int64_t plane = (image * task.w.rows + r) * task.ldy;
    for (const Run* run = runs; run != end; ++run)
      for (int64_t i = 0; i < run->count; i += kLanes)
        write(task, plane + run->from + i, load(from + run->at + i), bias,
              smaller(kLanes, run->count - i), (image * task.w.rows + r) * task.skew);
  }
}

void conv_groups(const Task& task) {
  const auto& c = static_cast<const GroupConv&>(*task.conv);
  const Weight& w = task.w;
  const int64_t band = c.panels * kPanel, rows = w.rows / c.all_groups;
  const int64_t each = c.images * c.all_groups;
  const int64_t reach = c.down.shift * c.across.extent + c.across.shift;
  float* tile = task.workspace + conv_panel_floats(c);
  Run* inputs = reinterpret_cast<Run*>(tile + kSharing * band + kLanes);
  Run *inputs_end = inputs, *outputs = inputs, *outputs_end = inputs;
  auto* offsets = reinterpret_cast<int32_t*>(inputs) + group_runs_floats(c, kPanel);
  fill_offsets(c, offsets);
  const bool full = is_full(w);
  int64_t listed = -1, count = 0;
  for (int64_t unit = task.begin_panel; unit < task.end_panel; ++unit) {
    const int64_t image = unit % each / c.all_groups, group = unit % c.all_groups;
    if (unit / each != listed) {
      listed = unit / each;
      const int64_t first = listed * band, exact = smaller(band, task.n - first);
      count = (exact + kPanel - 1) / kPanel * kPanel;
      inputs_end = outputs = list_inputs(c, task.ldx, first, count + reach, inputs);
      outputs_end = list_outputs(c, 0, first, exact, outputs);
    }
    const float* x = task.x + (image * c.all_groups + group) * c.channels * task.ldx;
    for (int64_t i = 0; i < c.channels; ++i)
      fill_channel(c, x + i * task.ldx, inputs, inputs_end,
                   task.workspace + i * conv_copies(c) * c.length);
    const int64_t until = (group + 1) * rows;
    for (int64_t row = group * rows; row < until;) {
      const int64_t lines = full && row + kSharing <= until ? kSharing : 1;
      if (lines > 1) {
        full_lines<kSharing>(w, row, offsets, task.workspace, count, tile);
      } else {
        sparse_line(w, row, offsets, task.workspace, count, tile);
      }
      write_lines(task, outputs, outputs_end, image, row, lines, tile, count);
      row += lines;
    }
  }
}
